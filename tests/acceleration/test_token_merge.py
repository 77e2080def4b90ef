from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acceleration import AdaSpa, DeltaCache, Refused, TaylorCache, TokenMerge, Untouched, accelerated
from acceleration._merged import Merging, position_wise
from acceleration._merging import Windows, plan
from acceleration.base import Run
from dit.backbones.dit import DiT
from dit.backbones.mmdit import MMDiT
from dit.seams import Attending

SMALL: dict[str, Any] = {"min_tokens": 16, "window": 16}
STEPS = 6


def mmdit() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = MMDiT(
        sample_size=8, in_channels=4, patch_size=1, width=16, heads=4, dual_depth=2, single_depth=1,
        context_dim=8, pooled_dim=8,
    ).eval()  # fmt: skip
    for one in net.parameters():
        one.data.normal_(0, 0.2)
    given = {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 7, 8)}
    return net, given | {"pooled_projections": torch.randn(2, 8)}


@torch.no_grad()
def sample(net: Any, given: dict[str, Tensor], steps: int = STEPS) -> list[Tensor]:
    return [
        net(**given | {"hidden_states": given["hidden_states"] * (1 - step / 20)},
            timestep=torch.full((len(given["hidden_states"]),), 900.0 - 100 * step), return_dict=False)[0]
        for step in range(steps)
    ]  # fmt: skip


def states(run: Run) -> list[str]:
    return [cell["states"] for cell in run.report().cells]


def reference(q: Tensor, k: Tensor, v: Tensor, found: Any, text: tuple[int, int], heard: Tensor) -> Tensor:
    """Write merged attention down with dense matrices, one sample after the other."""
    B, K, N, _ = q.shape
    first, last = text
    outputs = []
    for b in range(B):
        windows, share = found.windows, found.share[b]
        rows = N - first - last
        U = torch.zeros(N, first + found.kept.shape[1] + last)
        for one in range(first):
            U[one, one] = 1
        for one in range(last):
            U[N - 1 - one, U.shape[1] - 1 - one] = 1
        size, count = share.shape[1:]
        for place, token in enumerate(windows.order.tolist()):
            window, row = divmod(place, size)
            U[first + token, first + window * count : first + (window + 1) * count] = share[window, row]
        for place, token in enumerate(windows.rest.tolist()):
            U[first + token, first + len(share) * count + place] = 1
        weights = U * heard[b, :, None]
        counts = weights.sum(0)
        own = torch.tensor([*range(first), *(found.kept[b] + first).tolist(), *range(first + rows, N)])
        for head in range(K):
            value = (weights / counts.clamp_min(1e-6)).t() @ v[b, head]
            scores = q[b, head, own] @ k[b, head, own].t() * 0.3 + counts.log()
            outputs.append(U @ torch.softmax(scores, -1) @ value)
    return torch.stack(outputs).view(B, K, N, -1)


@pytest.mark.parametrize("text", [(0, 0), (5, 0), (0, 5), (2, 3)])
@pytest.mark.parametrize("padded", [False, True])
def test_merged_attention_is_what_dense_matrices_say(text: tuple[int, int], padded: bool) -> None:
    torch.manual_seed(0)
    tokens, N = 22, 22 + sum(text)
    q, k, v = (torch.randn(2, 3, N, 8) for _ in range(3))
    heard = torch.ones(2, N, dtype=torch.bool)
    if padded:
        heard[1, -4:] = False
        heard[0, :1] = False
    found = plan(torch.randn(2, tokens, 6), Windows.of(None, tokens, 4, torch.device("cpu")), 2)
    mask = heard[:, None, None, :] if padded else None
    call = Attending(
        path="", kind="joint", q=q, k=k, v=v, mask=mask, text=text, query_text=text, scale=0.3, causal=False,
        dropout=0.0, exact=lambda: q,
    )  # fmt: skip
    merging = Merging(TokenMerge(), Run(nn.Module(), (), None, None))
    value = v[:, :, text[0] : text[0] + tokens].transpose(1, 2).flatten(2)
    out = merging._attend(call, found, value, heard if padded else None)
    assert torch.allclose(out, reference(q, k, v, found, text, heard.float()), atol=1e-5)


def test_keys_alone_leave_every_query_its_own_answer() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    k, v = (
        one[:, :, ::4].repeat_interleave(4, 2) for one in (k, v)
    )  # fours of equal keys merge without loss
    found = plan(v.transpose(1, 2).flatten(2), Windows.of(None, 20, 4, torch.device("cpu")), 1)
    call = Attending(
        path="", kind="self", q=q, k=k, v=v, mask=None, text=(0, 0), query_text=(0, 0), scale=None, causal=False,
        dropout=0.0, exact=lambda: q,
    )  # fmt: skip
    merging = Merging(TokenMerge(queries=False), Run(nn.Module(), (), None, None))
    out = merging._attend(call, found, v.transpose(1, 2).flatten(2), None)
    exact = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert torch.allclose(out, exact, atol=1e-5)


@pytest.mark.parametrize("modules", ["both", "attention", "feed-forward"])
def test_it_says_what_was_merged(modules: str) -> None:
    net, given = mmdit()
    plain = sample(net, given)
    with accelerated(net, TokenMerge(modules=modules, ratio=0.25, warmup=2, **SMALL), steps=STEPS) as run:
        first, second = sample(net, given), sample(net, given)
    report = run.report()
    assert states(run) == (["CCC"] * 2 + ["MMM"] * 4) * 2
    assert (report.merged, report.computed) == (24, 36)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    same = [torch.equal(a, b) for a, b in zip(plain, first, strict=True)]
    assert same == [True] * 2 + [False] * 4
    merged = [row for row in report.attention if row["merged"]]
    assert {(row["tokens"], row["kept"]) for row in merged} == {(64, 48)}
    kinds = {row["kind"] == "feed-forward" for row in merged}
    assert kinds == {"both": {True, False}, "attention": {False}, "feed-forward": {True}}[modules]
    assert not any("context" in row["layer"] for row in merged)  # the prompt's own perceptrons are exact
    assert "48 of 64 kept" in report.effective[0]
    assert report.bytes > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, sample(net, given), strict=True))


def test_the_perceptrons_really_see_fewer_tokens() -> None:
    net, given = mmdit()
    seen: list[int] = []
    for one in position_wise(net):  # below what the method attaches

        def forward(x: Tensor, *others: Any, _inner: Any = one.module.forward) -> Any:
            seen.append(x.shape[1])
            return _inner(x, *others)

        one.module.__dict__["forward"] = forward
    with accelerated(net, TokenMerge(warmup=0, **SMALL), steps=1):
        sample(net, given, 1)
    assert seen == [32, 32, 39, 39]  # half of 64; single blocks carry seven tokens of text


def test_a_choice_lasts_its_steps_and_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counting(*given: Any) -> Any:
        made.append(given[3])
        return plan(*given)

    monkeypatch.setattr("acceleration._merged.plan", counting)
    net, given = mmdit()
    for layers, each in ((0, 1), (1, 3), (2, 2)):
        made.clear()
        with accelerated(net, TokenMerge(reuse=3, layers=layers, **SMALL), steps=STEPS):
            sample(net, given)
        assert made == [step for step in (1, 4) for _ in range(each)]


def test_it_goes_with_caches_in_any_order() -> None:
    net, given = mmdit()
    merge = TokenMerge(warmup=0, **SMALL)
    few: dict[str, Any] = {"interval": 2, "warmup": 1, "final_full": 0}
    for cache in (DeltaCache(mode="rear", **few), TaylorCache(**few), TaylorCache(level="modules", **few)):
        outputs = []
        for methods in ((merge, cache), (cache, merge)):
            with accelerated(net, *methods, steps=STEPS) as run:
                outputs.append(sample(net, given))
            letters = "".join(states(run))
            assert "M" in letters
            assert "R" in letters or "F" in letters
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_padding_is_respected() -> None:
    """HunyuanVideo masks its padded text in every call: what stands there must not change the picture."""
    torch.manual_seed(0)
    net: Any = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, num_single_layers=1, num_refiner_layers=1, text_embed_dim=16,
        pooled_projection_dim=16, guidance_embeds=False, rope_axes_dim=(2, 2, 4), attention_head_dim=8, num_attention_heads=2,
    ).eval()  # fmt: skip
    text, mask = torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.long)
    mask[:, 3:] = 0
    other = text.clone()
    other[:, 3:] = 9.0
    outputs = []
    for prompt in (text, other):
        given = {"hidden_states": torch.ones(2, 4, 2, 8, 8).cumsum(-1) / 8, "encoder_hidden_states": prompt}
        given |= {"encoder_attention_mask": mask, "pooled_projections": torch.ones(2, 16)}
        with accelerated(net, TokenMerge(warmup=0, **SMALL), steps=3) as run:
            outputs.append(sample(net, given, 3))
        assert run.report().merged == 9
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*outputs, strict=True))


def test_what_has_no_effect_is_said_in_words() -> None:
    net, given = mmdit()
    with (
        pytest.raises(Untouched, match="it has 64 tokens, and min_tokens is 256"),
        accelerated(net, TokenMerge(), steps=STEPS),
    ):
        sample(net, given)
    with pytest.raises(Refused, match="both decide about which keys a query hears"):
        with accelerated(net, AdaSpa(), TokenMerge()):
            pass
    for modules in ("both", "feed-forward"):
        with pytest.raises(Untouched, match="gradients are wanted"):
            with accelerated(net, TokenMerge(warmup=0, modules=modules, **SMALL), steps=1):
                net(**given, timestep=torch.full((2,), 500.0)).sample.sum().backward()
    net.transformer_blocks[0].compile(backend="eager")
    with pytest.raises(Refused, match=r"transformer_blocks.0 is compiled"), accelerated(net, TokenMerge()):
        pass


def test_a_perceptron_that_looks_around_is_left_alone() -> None:
    net: Any = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, caption_channels=16, sample_size=4, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, attention_head_dim=8, num_attention_heads=2,
    )  # fmt: skip
    assert position_wise(net) == []
    assert "treats every token alone" in str(TokenMerge(modules="feed-forward").refuses(net))


def test_a_perceptron_of_no_width_is_not_said_to_be_merged() -> None:
    net, _ = mmdit()
    before = [one.path for one in position_wise(net)]
    perceptron = net.get_submodule(before[0])
    first = next(one for one in perceptron.modules() if isinstance(one, nn.Linear))
    first.out_features = 0
    assert [one.path for one in position_wise(net)] == before[1:]


def test_a_class_conditional_model_runs() -> None:
    torch.manual_seed(0)
    net = DiT(sample_size=8, in_channels=4, patch_size=1, width=16, heads=2, depth=3).eval()
    given = {"hidden_states": torch.randn(2, 4, 8, 8), "class_labels": torch.tensor([1, 2])}
    with accelerated(net, TokenMerge(final_full=1, **SMALL), steps=STEPS) as run:
        sample(net, given)
    assert states(run) == ["CCC", *["MMM"] * 4, "CCC"]
