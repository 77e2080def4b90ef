"""Attention within captions and scenes: against a mask of all pairs, in one stream and two, what is heard, what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dit.attention import attend
from dit.backbones.mmdit import MMDiT
from dit.embeddings import rotary
from dit.grid import Grid
from dit.ledger import counted, macs_of
from dit.mixers.full import Full
from dit.mixers.scenes import Scenes, attend_scenes, attend_scenes_reference
from dit.model import Context
from dit.seams import Attending, attention_seam
from dit.segments import Segments

WIDTH, HEADS = 16, 2
UNEQUAL = Segments((3, 0, 5), (4, 9, 2))
EQUAL = Segments((4, 4), (6, 6))


def sequence(segments: Segments, heads: int = HEADS, size: int = 8) -> list[Tensor]:
    """Queries, keys and values of all captions and scenes."""
    draw = torch.Generator().manual_seed(1)
    shape = (2, segments.length + segments.tokens, heads, size)
    return [torch.randn(shape, generator=draw).requires_grad_() for _ in range(3)]


def padding(segments: Segments) -> Tensor:
    """A mask of keys in which the second sample's first two text tokens are padding."""
    mask = torch.ones(2, 1, 1, segments.length + segments.tokens, dtype=torch.bool)
    mask[1, ..., :2] = False
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("segments", [EQUAL, UNEQUAL, Segments((4,), (7,)), Segments((0, 0), (3, 2))])
def test_values_and_gradients_equal_the_reference(segments: Segments, masked: bool) -> None:
    mask = padding(segments) if masked and segments.length else None
    ours, theirs = sequence(segments), sequence(segments)
    out = attend_scenes(*ours, mask, segments=segments)
    expected = attend_scenes_reference(*theirs, mask, segments=segments)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_text_that_does_not_ask_is_still_heard() -> None:
    q, k, v = sequence(UNEQUAL)
    asking = q[:, UNEQUAL.length :]
    out = attend_scenes(asking, k, v, segments=UNEQUAL)
    torch.testing.assert_close(
        out, attend_scenes_reference(asking, k, v, segments=UNEQUAL), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(
        out, attend_scenes(q, k, v, segments=UNEQUAL)[:, UNEQUAL.length :], atol=1e-6, rtol=1e-5
    )


def test_one_scene_is_plain_attention() -> None:
    q, k, v = sequence(Segments((4,), (7,)))
    assert torch.equal(
        attend_scenes(q, k, v, segments=Segments((4,), (7,))),
        torch.cat([attend(q[:, :4], k, v), attend(q[:, 4:], k, v)], dim=1),
    )


def test_nothing_as_large_as_a_mask_of_all_pairs_is_made() -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple | list) else (out,):
                if isinstance(one, Tensor):
                    self.elements = max(self.elements, one.numel())
            return out

    segments = Segments((20, 30, 25), (400, 300, 500))
    total = segments.length + segments.tokens
    q, k, v = (one.detach()[:1] for one in sequence(segments))
    with Largest() as ours:
        attend_scenes(q, k, v, segments=segments)
    with Largest() as theirs:
        attend_scenes_reference(q, k, v, segments=segments)
    assert theirs.elements >= total**2
    assert ours.elements <= q.numel() < total**2 / 10


def test_a_caption_sends_no_gradient_to_other_scenes() -> None:
    q, k, v = sequence(EQUAL)
    out = attend_scenes(q, k, v, segments=EQUAL)
    for scene, (_, (first, last)) in enumerate(EQUAL.bounds):
        gradients = torch.autograd.grad(out[:, first:last].square().sum(), (k, v), retain_graph=True)
        for other, ((start, end), _) in enumerate(EQUAL.bounds):
            for one in gradients:
                assert bool(one[:, start:end].any()) == (scene == other)


# As the slot of a network


def mixers(**options: Any) -> tuple[Any, Any]:
    """A mixer of scenes and one of full attention with the same weights."""
    torch.manual_seed(0)
    name = "build_joint" if options.pop("joint", False) else "build"
    ours = getattr(Scenes(caption=4), name)(WIDTH, HEADS, qk_norm=True, **options)
    full = getattr(Full(), name)(WIDTH, HEADS, qk_norm=True, **options)
    full.load_state_dict(ours.state_dict())
    return ours, full


@pytest.mark.parametrize("segments", [None, UNEQUAL, Segments((2, 6), (3, 9))])
@pytest.mark.parametrize("pre_only", [False, True])
def test_two_streams_equal_masked_full_attention(segments: Segments | None, pre_only: bool) -> None:
    ours, full = mixers(joint=True, context_pre_only=pre_only)
    grid = Grid(2, 2, 3)
    known = segments or Segments((4, 4), (6, 6))  # two captions of four tokens make two scenes
    grid = grid if known.tokens == grid.tokens else Grid(1, 1, known.tokens)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, known.tokens, WIDTH, generator=draw)
    words = torch.randn(2, known.length, WIDTH, generator=draw)
    context = Context(grid, x, rotary=rotary((4, 2, 2), grid, known.length, 100.0, "cpu"), segments=segments)
    heard = known.mask()[known.length :] if pre_only else known.mask()
    masked = Context(grid, x, rotary=context.rotary, mask=heard[None, None])
    found = ours(hidden_states=x, encoder_hidden_states=words, context=context)
    expected = full(hidden_states=x, encoder_hidden_states=words, context=masked)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_one_stream_equals_masked_full_attention() -> None:
    ours, full = mixers()
    grid, known = Grid(3, 2, 2), Segments((4, 4, 4), (4, 4, 4))
    x = torch.randn(2, 24, WIDTH, generator=torch.Generator().manual_seed(1))
    found = ours(hidden_states=x, context=Context(grid, x, length=12))
    expected = full(hidden_states=x, context=Context(grid, x, mask=known.mask()[None, None]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_without_captions_it_is_full_attention() -> None:
    ours, full = mixers()
    x = torch.randn(2, 12, WIDTH, generator=torch.Generator().manual_seed(1))
    context = Context(Grid(3, 2, 2), x)
    assert torch.equal(ours(hidden_states=x, context=context), full(hidden_states=x, context=context))


@pytest.mark.parametrize("pre_only", [False, True])
def test_its_cost_is_the_counted_one(pre_only: bool) -> None:
    with torch.device("meta"):
        mixer: Any = Scenes(caption=5).build_joint(WIDTH, HEADS, context_pre_only=pre_only)
        x, words = torch.empty(1, 24, WIDTH), torch.empty(1, 15, WIDTH)
    grid = Grid(3, 2, 4)
    inputs = {"hidden_states": x, "encoder_hidden_states": words, "context": Context(grid, x)}
    assert macs_of(mixer, 24, 15, grid) == counted(mixer, inputs).macs
    full: Any = Full().build_joint(WIDTH, HEADS, context_pre_only=pre_only)
    assert macs_of(mixer, 24, 15, grid) < macs_of(full, 24, 15, grid)


def test_sparse_methods_see_the_scenes_ask_and_where_the_text_is() -> None:
    """Captions ask densely; every scene asks as in joint attention, its own caption first among the keys."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = mixers()[0]

        def forward(self, hidden_states: Tensor, context: Context) -> Any:
            return self.attn(hidden_states=hidden_states, context=context)

    seen: list[tuple[str, str, int, int, tuple[int, int], tuple[int, int]]] = []

    def around(call: Attending) -> Tensor:
        row = (call.path, call.kind, call.q.shape[2], call.k.shape[2], call.text, call.query_text)
        seen.append(row)
        return call.exact()

    network, x = Network(), torch.randn(1, 17, WIDTH)
    context = Context(Grid(1, 1, 12), x, length=5, segments=Segments((2, 3), (4, 8)))
    plain = network(x, context)
    with attention_seam(network, around):
        assert torch.equal(network(x, context), plain)
    assert seen == [
        ("attn", "cross", 2, 6, (0, 0), (0, 0)),
        ("attn#1", "joint", 4, 14, (2, 0), (0, 0)),
        ("attn#2", "cross", 3, 11, (0, 0), (0, 0)),
        ("attn#3", "joint", 8, 15, (3, 0), (0, 0)),
    ]


def test_a_dual_stream_network_takes_clips_and_keeps_captions_apart() -> None:
    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 6, 4, 4, generator=draw), torch.randn(2, 9, 6, generator=draw)
    time, by_token = torch.tensor([100.0, 900.0]), torch.tensor([[100.0], [900.0]]).expand(2, 24)
    for mixer, kind in (("scenes:caption=3", "velocity"), ("full", "sample")):
        torch.manual_seed(0)
        network = MMDiT(
            in_channels=4, patch_size=2, width=32, heads=2, dual_depth=1, single_depth=0, context_dim=6, pooled_dim=None,
            rope_axes=(4, 6, 6), mixer=mixer, prediction_type=kind,
        )  # fmt: skip
        for one in network.parameters():
            if not one.any():
                nn.init.normal_(one, std=0.2)
        words = text.clone().requires_grad_()
        out = network(x, time, words).sample
        assert out.shape == x.shape
        torch.testing.assert_close(network(x, by_token, words).sample, out, atol=1e-3, rtol=1e-4)
        (gradient,) = torch.autograd.grad(out[:, :, 2:4].square().sum(), words)
        reached = [bool(one.any()) for one in gradient.split(3, dim=1)]
        assert reached == ([False, True, False] if mixer != "full" else [True] * 3)


# What does not fit


def test_tensors_of_other_lengths_are_refused() -> None:
    q, k, v = sequence(EQUAL)
    with pytest.raises(ValueError, match=r"19 queries and 20 keys are not captions of \(4, 4\)"):
        attend_scenes(q[:, 1:], k, v, segments=EQUAL)
    with pytest.raises(ValueError, match=r"takes a mask of keys \[B, 1, 1, 20\]"):
        attend_scenes(q, k, v, torch.ones(1, 1, 20, 20, dtype=torch.bool), segments=EQUAL)
