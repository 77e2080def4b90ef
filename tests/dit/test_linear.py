"""Linear attention: the two orders of one product agree, the convolution is the picture's alone, sizes are the papers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acceleration import AdaSpa, DeltaCache, Untouched, XAttention, accelerated
from dit.backbones.dit import DiT
from dit.backbones.mmdit import MMDiT
from dit.embeddings import rotary
from dit.grid import Grid
from dit.ledger import analytic, counted, parameters_of
from dit.mixers.full import Mixer
from dit.mixers.linear import Linear, LinearMixer, convolved, linear_attention, linear_attention_reference
from dit.model import Context
from dit.presets import build
from dit.routing import RouteDecision
from dit.spec import parse

GRID = Grid(1, 5, 6)


def context(grid: Grid | None = GRID, **about: Any) -> Context:
    return Context(grid, torch.zeros(1, 24), **about)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixer(settings: str = "linear", width: int = 24, seed: int = 0, **about: Any) -> LinearMixer:
    torch.manual_seed(seed)
    made = parse(Mixer, settings).build(width, 4, **about)
    assert isinstance(made, LinearMixer)
    return made


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "queries"), [(1, 37), (3, 37), (6, 30)])
def test_both_orders_of_the_product_agree(heads: int, queries: int, turned: bool, masked: bool) -> None:
    q, k, v = (draw(2, 37, heads, 24 // heads, seed=i) for i in range(3))
    given = {
        "table": rotary((0, 4, 4), Grid(1, 4, 8), 5, 100.0, "cpu") if turned else None,
        "heard": torch.rand(2, 37, generator=torch.Generator().manual_seed(4)) < 0.7 if masked else None,
    }
    fast = linear_attention(q[:, -queries:], k, v, **given)
    plain = linear_attention_reference(q[:, -queries:], k, v, **given)
    assert fast.shape == (2, queries, heads, 24 // heads)
    assert float((fast - plain).abs().max()) < 1e-4 * float(plain.abs().max())
    if masked:
        changed = torch.where(given["heard"][..., None, None], v, v + 100)
        assert torch.equal(linear_attention(q[:, -queries:], k, changed, **given), fast)


def test_weights_of_every_token_add_up_to_one() -> None:
    q, k = draw(1, 9, 2, 6), draw(1, 9, 2, 6, seed=1)
    out = linear_attention(q + 1, k + 1, torch.full((1, 9, 2, 6), 3.0))
    assert torch.allclose(out, torch.tensor(3.0), atol=1e-4)


def test_a_query_without_kernels_is_no_nan() -> None:
    q, k, v = -draw(1, 4, 1, 3).abs(), draw(1, 4, 1, 3), draw(1, 4, 1, 3)
    q.requires_grad_()
    out = linear_attention(q, k, v)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert q.grad is not None
    assert torch.isfinite(q.grad).all()


def test_rotary_makes_weights_depend_on_distance_alone() -> None:
    """One query and one key moved together keep their share of the answer."""
    table = rotary((0, 4, 4), Grid(1, 8, 8), 0, 100.0, "cpu")
    q, k = draw(1, 1, 1, 8).abs(), draw(1, 1, 1, 8, seed=1).abs()
    answers = []
    for i, j in ((0, 9), (18, 27), (36, 45)):  # each one row and one column apart
        queries, keys, values = torch.zeros(1, 64, 1, 8), torch.zeros(1, 64, 1, 8), torch.zeros(1, 64, 1, 8)
        queries[:, i], keys[:, j], values[:, j] = q, k, 1.0
        answers.append(linear_attention(queries, keys, values, table=table)[0, i])
    torch.testing.assert_close(answers[0], answers[1])
    torch.testing.assert_close(answers[0], answers[2])
    queries, values = torch.zeros(1, 64, 1, 8), torch.zeros(1, 64, 1, 8)
    queries[:, 0], values[:, 9] = q, 1.0
    keys = torch.zeros(1, 64, 1, 8)
    keys[:, 9] = k
    assert not torch.allclose(linear_attention(queries, keys, values)[0, 0], answers[0])


def test_a_zero_convolution_is_plain_linear_attention() -> None:
    plain, local = mixer("linear:kernel=0"), mixer()
    local.load_state_dict(plain.state_dict(), strict=False)
    assert plain.conv is None
    assert local.conv is not None
    x = draw(2, GRID.tokens, 24)
    assert not torch.allclose(
        local(hidden_states=x, context=context()), plain(hidden_states=x, context=context())
    )
    for one in local.conv.parameters():
        nn.init.zeros_(one)
    assert torch.equal(local(hidden_states=x, context=context()), plain(hidden_states=x, context=context()))


def test_the_convolution_sees_the_grid_frame_by_frame() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    x = draw(2, 3 * 4 * 5, 4)
    ours = convolved(conv, x, Grid(3, 4, 5))
    pictures = x.reshape(2, 3, 4, 5, 4).permute(0, 1, 4, 2, 3).flatten(0, 1)
    theirs = conv(pictures).unflatten(0, (2, 3)).permute(0, 1, 3, 4, 2).flatten(1, 3)
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="needs all 60, got 59"):
        convolved(conv, x[:, 1:], Grid(3, 4, 5))


def test_text_in_one_stream_is_left_out_of_the_convolution() -> None:
    """The text tokens of a single-stream block stand first; what surrounds an image token is image alone."""
    one = mixer("linear:kernel=3", pre_only=True)
    x = draw(1, 7 + GRID.tokens, 24)
    whole = one(hidden_states=x, context=context(length=7))
    q, k, v = one.project(x)
    expected = linear_attention(q, k, v).flatten(2)
    expected[:, 7:] += one.local(v[:, 7:], GRID)
    torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize("pre_only", [False, True])
def test_two_streams_hear_each_other(pre_only: bool) -> None:
    torch.manual_seed(0)
    joint = Linear(kernel=3).build_joint(24, 4, context_pre_only=pre_only)
    image, text = draw(2, GRID.tokens, 24), draw(2, 7, 24, seed=1)
    mask = torch.ones(2, 1, 1, 7 + GRID.tokens, dtype=torch.bool)
    mask[1, ..., 5:7] = False

    def run(text: Tensor) -> tuple[Tensor, Tensor | None]:
        out = joint(hidden_states=image, encoder_hidden_states=text, context=context(mask=mask))
        return (out, None) if pre_only else out

    heard, answer = run(text)
    assert heard.shape == image.shape
    assert pre_only or answer.shape == text.shape
    louder = text.clone()
    louder[0, 5:] += 10
    assert not torch.allclose(run(louder)[0][0], heard[0])
    masked = text.clone()
    masked[1, 5:] += 10
    torch.testing.assert_close(run(masked)[0][1], heard[1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [("linear:kernel=4", "kernel must be odd"), ("linear:heads=5", "24 does not divide by 5 heads")],
)
def test_sizes_that_do_not_fit_are_refused(settings: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(Mixer, settings).build(24, 4)


@pytest.mark.parametrize("settings", ["linear", "gated"])
def test_a_router_may_turn_heads_off(settings: str) -> None:
    """All on is nothing; all off leaves the bias of the map out; one off is a change that its gradient feels."""
    torch.manual_seed(0)
    one, x = parse(Mixer, settings).build(24, 4), draw(2, GRID.tokens, 24)

    def run(*gates: float) -> Tensor:
        heads = torch.tensor([gates, gates], requires_grad=True)
        out: Tensor = one(hidden_states=x, context=context(route=RouteDecision("time", heads=heads)))
        (grad,) = torch.autograd.grad(out.square().sum(), heads)
        assert grad.isfinite().all()
        assert bool(grad.any()) or not any(gates)
        return out

    plain = one(hidden_states=x, context=context())
    assert torch.equal(run(1.0, 1.0, 1.0, 1.0), plain)
    nothing = one.to_out[0](torch.zeros_like(x))
    assert torch.equal(run(0.0, 0.0, 0.0, 0.0), nothing)
    parts = [run(*(float(i == j) for j in range(4))) - nothing for i in range(4)]
    torch.testing.assert_close(sum(parts) + nothing, plain)


def test_a_mask_of_pairs_is_refused() -> None:
    pairs = torch.ones(1, 1, GRID.tokens, GRID.tokens, dtype=torch.bool)
    with pytest.raises(ValueError, match="sums up its keys once"):
        mixer()(hidden_states=draw(1, GRID.tokens, 24), context=context(mask=pairs))


@pytest.mark.parametrize(
    ("size", "millions", "heads"), [("s", 32.96, 2), ("b", 130.3, 3), ("l", 457.8, 4), ("xl", 674.8, 4)]
)
def test_sizes_are_those_of_dit_and_a_convolution_a_block(size: str, millions: float, heads: int) -> None:
    with torch.device("meta"):
        lit, dit = build(f"lit-{size}/2"), build(f"dit-{size}/2")
    assert lit.transformer_blocks[0].attn.heads == heads
    convolutions = lit.config.depth * lit.config.width * (5 * 5 + 1)
    assert parameters_of(lit) == parameters_of(dit) + convolutions
    assert parameters_of(lit) / 1e6 == pytest.approx(millions, rel=0.01)


def test_costs_grow_with_the_tokens_and_not_with_their_square() -> None:
    with torch.device("meta"):
        model = build("lit-s/2", depth=1)
        inputs = {
            "hidden_states": torch.empty(1, 4, 32, 48),
            "timestep": torch.empty(1),
            "class_labels": torch.zeros(1, dtype=torch.long),
        }
    assert analytic(model, 32, 48).macs == counted(model, inputs).macs
    costs = [analytic(model, side, side).by_kind()["attention"] / (side // 2) ** 2 for side in (32, 64, 256)]
    assert costs[0] == costs[1] == costs[2]
    softmax = build("dit-s/2", depth=1)
    assert analytic(softmax, 256, 256).by_kind()["attention"] > 10 * costs[2] * 128**2


def test_half_precision_keeps_its_sums_in_float32() -> None:
    q, k, v = (draw(1, 4096, 2, 16, seed=i) for i in range(3))
    half = linear_attention(*(one.bfloat16() for one in (q, k, v)))
    assert half.dtype == torch.float32
    exact = linear_attention(*(one.bfloat16().double() for one in (q, k, v)))
    torch.testing.assert_close(half, exact.float(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "method", [AdaSpa(min_tokens=2, measure=False), XAttention(min_tokens=2, measure=False)]
)
def test_sparse_methods_say_that_there_is_nothing_to_thin_out(method: Any) -> None:
    torch.manual_seed(0)
    model = DiT(sample_size=8, width=24, depth=2, heads=2, num_classes=3, mixer="linear").eval()
    given = {"hidden_states": draw(1, 4, 8, 8), "class_labels": torch.tensor([1])}

    def sample() -> None:
        with torch.no_grad(), accelerated(model, method, steps=4):
            for step in range(4):
                model(**given, timestep=torch.tensor([1000.0 - 250 * step]))

    with pytest.raises(Untouched, match="attention"):
        sample()


def test_caches_around_blocks_work_as_ever() -> None:
    torch.manual_seed(0)
    model = MMDiT(
        in_channels=4, patch_size=2, width=24, heads=2, dual_depth=1, single_depth=2, context_dim=12, pooled_dim=None,
        mixer="linear", rope_axes=(0, 6, 6),
    ).eval()  # fmt: skip
    given = {"hidden_states": draw(1, 4, 8, 8), "encoder_hidden_states": draw(1, 5, 12)}
    with (
        torch.no_grad(),
        accelerated(model, DeltaCache(mode="rear", warmup=1, cached_fraction=0.5), steps=8) as run,
    ):
        for step in range(8):
            model(**given, timestep=torch.tensor([1000.0 - 125 * step]))
    assert run.report().reused > 0
