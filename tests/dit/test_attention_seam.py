from __future__ import annotations

import contextlib
import inspect
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit.backbones.dit import DiT
from dit.backbones.mmdit import MMDiT
from dit.seams import Attending, attention_layers, attention_seam, unseen


class Attn(nn.Module):
    """A joint attention that can put its text anywhere, or hear the text alone."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.to_q, self.order = nn.Linear(8, 8), order

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x, text = hidden_states, encoder_hidden_states
        keys = {"first": [text, x], "last": [x, text]}
        k = torch.cat(keys[self.order], dim=1) if self.order in keys else text if self.order == "cross" else x
        q = k if self.order in keys else x
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], k[:, None])[:, 0]
        return out[:, text.shape[1] :] if self.order == "first" else out[:, : x.shape[1]]


class Net(nn.Module):
    def __init__(self, *orders: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": Attn(order)}) for order in orders])

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, again: int = 1) -> Tensor:
        for block in self.blocks:
            for _ in range(again):
                hidden_states = hidden_states + block["attn"](hidden_states, encoder_hidden_states)
        return hidden_states


def heard(net: nn.Module, *args: Any, **kwargs: Any) -> list[Attending]:
    calls: list[Attending] = []

    def around(call: Attending) -> Tensor:
        calls.append(call)
        return call.exact()

    with torch.no_grad():
        plain = net(*args, **kwargs)
        with attention_seam(net, around):
            same = net(*args, **kwargs)
    first, second = (x if isinstance(x, Tensor) else x[0] for x in (plain, same))
    assert torch.equal(first, second)
    return calls


def test_it_tells_layers_kinds_and_where_the_text_stands() -> None:
    net = Net("first", "last", "cross", "self")
    calls = heard(net, torch.randn(1, 12, 8), torch.randn(1, 5, 8))
    assert [(call.path, call.kind, call.text, call.query_text) for call in calls] == [
        ("blocks.0.attn", "joint", (5, 0), (5, 0)),
        ("blocks.1.attn", "joint", (0, 5), (0, 5)),
        ("blocks.2.attn", "cross", (0, 0), (0, 0)),
        ("blocks.3.attn", "self", (0, 0), (0, 0)),
    ]
    assert [path for path, _ in attention_layers(net)] == [f"blocks.{place}.attn" for place in range(4)]


def test_a_text_longer_than_its_picture_is_still_the_text() -> None:
    calls = heard(Net("first", "last"), torch.randn(1, 4, 8), torch.randn(1, 9, 8))
    assert [call.text for call in calls] == [(9, 0), (0, 9)]


def test_the_answer_replaces_the_call_and_everything_is_restored() -> None:
    net = Net("self", "self")
    before = {name: dict(module.__dict__) for name, module in net.named_modules()}
    x, text = torch.randn(1, 6, 8), torch.randn(1, 3, 8)
    with attention_seam(net, lambda call: torch.zeros_like(call.q)):
        assert inspect.signature(net.forward).parameters.keys() >= {"hidden_states", "encoder_hidden_states"}
        assert torch.equal(net(x, text), x)
        assert not torch.equal(
            F.scaled_dot_product_attention(x, x, x), torch.zeros_like(x)
        )  # outside of its forward
    assert {name: dict(module.__dict__) for name, module in net.named_modules()} == before
    assert not torch.equal(net(x, text), x)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_cut_short_leaves_nothing_behind(error: type[BaseException]) -> None:
    net, calls = Net("self", "self"), []
    x, text = torch.randn(1, 6, 8), torch.randn(1, 3, 8)

    def around(call: Attending) -> Tensor:
        calls.append(call.path)
        if len(calls) == 1:
            raise error
        return call.exact()

    with attention_seam(net, around):
        with contextlib.suppress(error):
            net(x, text)
        assert torch.overrides._get_current_function_mode_stack() == []
        net(x, text)
    assert calls == ["blocks.0.attn", "blocks.0.attn", "blocks.1.attn"]
    assert not net.blocks[0]["attn"]._forward_hooks


def test_further_calls_of_one_layer_have_their_own_names() -> None:
    class Twice(Attn):
        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states, encoder_hidden_states) + super().forward(
                hidden_states, encoder_hidden_states
            )

    net = Net("self")
    net.blocks[0]["attn"] = Twice("self")
    assert [one.path for one in heard(net, torch.randn(1, 6, 8), torch.randn(1, 3, 8))] == [
        "blocks.0.attn",
        "blocks.0.attn#1",
    ]


def test_our_own_backbones_are_seen() -> None:
    net = MMDiT(
        sample_size=8,
        in_channels=4,
        patch_size=1,
        width=16,
        heads=2,
        dual_depth=2,
        single_depth=0,
        context_dim=12,
        pooled_dim=0,
    )
    calls = heard(net, torch.randn(1, 4, 8, 8), torch.full((1,), 500.0), torch.randn(1, 7, 12))
    assert [(call.path, call.kind, call.text) for call in calls] == [
        (f"transformer_blocks.{place}.attn", "joint", (7, 0)) for place in range(2)
    ]
    assert calls[0].query_text == (7, 0)
    assert calls[1].query_text == (0, 0)  # the last text stream is heard, but does not ask
    dit = DiT(sample_size=8, in_channels=4, patch_size=2, width=16, heads=2, depth=2)
    kinds = [
        call.kind for call in heard(dit, torch.randn(1, 4, 8, 8), torch.full((1,), 500), torch.tensor([1]))
    ]
    assert kinds == ["self", "self"]


def test_what_cannot_be_seen_is_said_in_words() -> None:
    assert unseen(Net("self")) is None
    net = Net("self")
    net.blocks[0]["attn"].compile(backend="eager")
    assert "blocks.0.attn is compiled" in (unseen(net) or "")
    config = {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "axes_dims_rope": (2, 2, 4),
    }
    sizes = {
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
    }
    flux = diffusers.FluxTransformer2DModel(**config, **sizes)
    assert unseen(flux) is None
    flux.set_attention_backend("flex")
    assert "backend 'flex'" in (unseen(flux) or "")
    flux.set_attention_backend("native")
    assert unseen(flux) is None
