"""Proxies and windows: who hears whom on grids of any size, what stands for a window, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dit.backbones.dit import DiT
from dit.backbones.mmdit import MMDiT
from dit.embeddings import rotary
from dit.experts.dense import Experts
from dit.grid import Grid
from dit.ledger import macs_of
from dit.mixers.full import Full, Mixer
from dit.mixers.proxy import (
    Proxy,
    ProxyMixer,
    WindowAttention,
    pool,
    pool_reference,
    window_attention_reference,
)
from dit.model import Context
from dit.partition import Window, heard, window_mask
from dit.spec import kinds, parse

GRIDS = [Grid(1, 8, 8), Grid(1, 5, 7), Grid(3, 6, 5), Grid(1, 2, 2)]
SIDES = [(1, 4, 4), (2, 2, 3), (1, 1, 1), (2, 3, 2)]


def tokens(grid: Grid, width: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, grid.tokens, width, generator=torch.Generator().manual_seed(1))


def filled(module: nn.Module) -> Any:
    """Return a module whose zero maps are filled, so that everything in it counts."""
    torch.manual_seed(0)
    for one in module.parameters():
        if not one.any():
            nn.init.normal_(one, std=0.3)
    return module.eval()


def mixer(grid: Grid, width: int = 16, **settings: Any) -> tuple[Any, Context]:
    torch.manual_seed(0)
    return Proxy(**settings).build(width, 2).eval(), Context(grid, torch.zeros(2, width))


# Windows


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("grid", GRIDS)
def test_windows_keep_every_token_and_hear_who_is_near(grid: Grid, sides: Any, shifted: bool) -> None:
    window = Window(grid, sides, shifted)
    x = tokens(grid, 3)
    assert torch.equal(window.join(window.split(x)), x)
    assert window.split(x).shape == (2 * window.groups, window.length, 3)
    who = window.split(torch.arange(1, grid.tokens + 1)[None])  # [G, M], 0 where no token stands
    mask = window.mask()
    shape = (window.groups, window.length, window.length)
    near = torch.ones(shape, dtype=torch.bool) if mask is None else mask.expand(shape)
    found = torch.zeros(grid.tokens + 1, grid.tokens + 1, dtype=torch.bool)
    group, row, column = near.nonzero(as_tuple=True)
    found[who[group, row], who[group, column]] = True
    start = torch.tensor([side // 2 if shifted else 0 for side in sides])
    box = torch.div(grid.positions() - start, torch.tensor(sides), rounding_mode="floor")
    assert torch.equal(found[1:, 1:], (box[:, None] == box[None]).all(-1))


def test_windows_that_fit_have_no_mask_until_they_are_shifted() -> None:
    grid = Grid(2, 8, 4)
    assert Window(grid, (1, 4, 4)).mask() is None
    mask = Window(grid, (1, 4, 4), shifted=True).mask()
    assert mask is not None
    assert mask.shape == (4, 16, 16)
    assert Window(grid, (1, 1, 1), shifted=True).mask() is None


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("grid", "sides"), [(GRIDS[0], SIDES[0]), (GRIDS[1], SIDES[0]), (GRIDS[2], SIDES[3])]
)
def test_window_attention_equals_masked_full_attention(
    grid: Grid, sides: Any, turned: bool, shifted: bool
) -> None:
    settings = Proxy(frames=sides[0], height=sides[1], width=sides[2])
    torch.manual_seed(0)
    attn, window, x = WindowAttention(settings, 16, 2), Window(grid, sides, shifted), tokens(grid)
    table = rotary((2, 2, 4), grid, 0, 100.0, "cpu") if turned else None
    plain = Window(grid, sides)
    first = plain.split(torch.arange(grid.tokens)[None])[0]
    local = None if table is None else (table[0][first], table[1][first])
    out = attn(x, window, window_mask(window, 2, x.device), local)
    torch.testing.assert_close(out, window_attention_reference(attn, x, window, table))


def test_tokens_of_other_windows_have_no_weight_at_all() -> None:
    grid, sides = Grid(1, 5, 6), (1, 4, 4)
    torch.manual_seed(0)
    attn, window = WindowAttention(Proxy(), 16, 2), Window(grid, sides, shifted=True)
    x = tokens(grid, batch=1).requires_grad_()
    box = torch.div(grid.positions() - torch.tensor([0, 2, 2]), torch.tensor(sides), rounding_mode="floor")
    (gradient,) = torch.autograd.grad(attn(x, window, window_mask(window, 1, x.device))[0, 14].sum(), x)
    near = (box == box[14]).all(1)
    assert torch.equal(gradient[0].any(1), near)
    assert 1 < near.sum() < grid.tokens


@pytest.mark.parametrize("batch", [1, 2])
def test_shifted_windows_are_one_gather(batch: int) -> None:
    """The same as rolling and boxing, whatever comes with a token, and gradients come back to where tokens were."""
    grid = Grid(2, 5, 7)
    window, x = Window(grid, (1, 4, 4), shifted=True), tokens(grid, 6, batch).requires_grad_()
    rolled = window.lattice(x).permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, window.length, 6)
    parts = window.split(x)
    assert torch.equal(parts, rolled)
    assert torch.equal(window.split(x.unflatten(2, (2, 3))), rolled.unflatten(2, (2, 3)))
    weight = torch.randn(parts.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((parts * weight).sum(), x)
    assert torch.equal(gradient, window.join(weight))


def test_the_mask_of_shifted_windows_is_made_once_in_numbers() -> None:
    device, window = torch.device("cpu"), Window(Grid(1, 6, 6), (1, 4, 4), shifted=True)
    with torch.inference_mode():
        mask = window_mask(window, 2, device)
    assert mask is not None
    assert window_mask(window, 2, device) is mask
    near = heard(window.mask(), 2)
    assert near is not None
    assert torch.equal(mask == 0, near)
    assert torch.equal(mask == -torch.inf, ~near)
    other = window_mask(window, 1, device, torch.bfloat16)
    assert other is not None
    assert (other.dtype, len(other)) == (torch.bfloat16, 4)
    plain = window_mask(Window(Grid(1, 6, 6), (1, 4, 4)), 2, device)
    assert plain is not None
    assert plain.dtype == torch.bool  # keys that are not there: accelerators read them
    again = window_mask(window, 2, device)
    assert again is not mask  # one is kept, not all there ever were
    attn = WindowAttention(Proxy(), 16, 2)
    attn(tokens(window.grid), window, mask).sum().backward()  # made in inference, used in training
    assert attn.to_q.weight.grad is not None


@pytest.mark.parametrize("some", [1, 40, 1000])  # a window at a time, two, all
def test_windows_may_be_attended_to_some_at_a_time(some: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid(1, 9, 14)
    module, context = mixer(grid)
    filled(module)
    x, calls = tokens(grid), []
    monkeypatch.setattr("dit.mixers.proxy._SOME_TOKENS", some)
    monkeypatch.setattr(module.shift_attn, "processor", _counted(module.shift_attn.processor, calls))
    together = module(x, context=context)
    assert calls == [24]  # with gradients: all windows of both samples
    with torch.no_grad():
        torch.testing.assert_close(module(x, context=context), together)
    assert calls[1:] == {1: [1] * 24, 40: [2] * 12, 1000: [24]}[some]


def _counted(processor: Any, calls: list[int]) -> Any:
    def count(attn: nn.Module, hidden_states: Tensor, *rest: Any) -> Any:
        calls.append(len(hidden_states))
        return processor(attn, hidden_states, *rest)

    return count


# Proxies


@pytest.mark.parametrize(
    ("grid", "sides", "counts"),
    [
        (Grid(1, 8, 8), (1, 4, 4), (1, 1)),
        (Grid(1, 8, 8), (1, 4, 4), (2, 4)),
        (Grid(3, 5, 7), (2, 4, 6), (2, 3)),
        (Grid(1, 1, 3), (1, 4, 4), (2, 2)),
    ],
)
def test_means_equal_the_reference(grid: Grid, sides: Any, counts: tuple[int, int]) -> None:
    x, window = tokens(grid, 3), Window(grid, sides)
    proxies, there = pool(x, window, counts, "mean")
    torch.testing.assert_close(proxies, pool_reference(x, window, counts))
    assert (there is None) == (not window.padded)
    if there is not None:
        assert torch.equal(there, pool_reference(torch.ones(1, grid.tokens, 1), window, counts)[0, :, 0] > 0)


@pytest.mark.parametrize("choice", ["mean", "corner", "random"])
def test_windows_of_one_token_stand_for_themselves(choice: Any) -> None:
    grid = Grid(2, 3, 4)
    x = tokens(grid)
    assert torch.equal(pool(x, Window(grid, (1, 1, 1)), (1, 1), choice)[0], x)


def test_corner_and_random_proxies_are_tokens_of_their_window() -> None:
    grid = Grid(1, 7, 6)
    window, x = Window(grid, (1, 4, 4)), tokens(grid, 5)
    corners, _ = pool(x, window, (1, 1), "corner")
    rows = torch.tensor([0, 4, 24 + 0, 24 + 4])
    assert torch.equal(corners, x[:, rows])
    fixed, _ = pool(x, window, (1, 1), "random")
    assert torch.equal(fixed, pool(x, window, (1, 1), "random")[0])
    torch.manual_seed(0)
    draws = [pool(x, window, (1, 1), "random", draw=True)[0] for _ in range(8)]
    assert any(not torch.equal(one, draws[0]) for one in draws)
    box = torch.div(grid.positions(), torch.tensor([1, 4, 4]), rounding_mode="floor")
    for one in [fixed, *draws]:
        place = (one[0, :, None] == x[0]).all(-1).nonzero()[:, 1]  # which token each proxy is
        assert box[place].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]


# The mixer


@pytest.mark.parametrize("grid", [Grid(1, 8, 8), Grid(2, 5, 6)])
def test_untrained_mixer_is_window_attention(grid: Grid) -> None:
    module, context = mixer(grid)
    x = tokens(grid)
    attn = WindowAttention(Proxy(), 16, 2)
    attn.load_state_dict({k: v for k, v in module.state_dict().items() if k.startswith("to_")})
    expected = window_attention_reference(attn, x, Window(grid, (1, 4, 4)))
    torch.testing.assert_close(module(x, context=context), expected)


@pytest.mark.parametrize("settings", [{}, {"shift": False}, {"proxy_rows": 2, "choice": "corner"}])
def test_every_token_hears_every_window(settings: dict[str, Any]) -> None:
    grid = Grid(1, 6, 10)
    module, context = mixer(grid, **settings)
    filled(module)
    x = tokens(grid).requires_grad_()
    (gradient,) = torch.autograd.grad(module(x, context=context)[0, 7].sum(), x)
    box = torch.div(grid.positions(), torch.tensor([1, 4, 4]), rounding_mode="floor")
    heard = {tuple(one) for one in box[gradient[0].any(1)].tolist()}
    assert heard == {tuple(one) for one in box.tolist()}
    assert not gradient[1].any()


def test_weights_of_full_attention_fit_the_windows() -> None:
    module, _ = mixer(Grid(1, 4, 4))
    missing, unexpected = module.load_state_dict(Full().build(16, 2).state_dict(), strict=False)
    assert unexpected == []
    assert {name.split(".")[0] for name in missing} == {"proxies", "shift_attn", "shift_out"}


@pytest.mark.parametrize("joint", [True, False])
def test_text_is_among_the_proxies(joint: bool) -> None:
    """Masked words have no weight; the others reach all of the picture, and the picture reaches them."""
    layers = {"dual_depth": 1, "single_depth": 0} if joint else {"dual_depth": 0, "single_depth": 1}
    model = filled(
        MMDiT(
            in_channels=2,
            patch_size=1,
            width=16,
            heads=2,
            context_dim=6,
            pooled_dim=None,
            mixer="proxy",
            **layers,
        )
    )
    draw = torch.Generator().manual_seed(3)
    x, words = torch.randn(1, 2, 6, 6, generator=draw), torch.randn(1, 4, 6, generator=draw)
    mask = torch.tensor([[True, True, True, False]])
    out = model(x, torch.tensor([500.0]), words, encoder_attention_mask=mask).sample
    changed = words.clone()
    changed[:, 3] += 1
    same = model(x, torch.tensor([500.0]), changed, encoder_attention_mask=mask).sample
    assert torch.equal(same, out)
    changed[:, 0] += 1
    other = model(x, torch.tensor([500.0]), changed, encoder_attention_mask=mask).sample
    assert ((other - out).abs() > 1e-6).any(1).all()


# What it costs


@pytest.mark.parametrize(
    ("side", "window", "percent"), [(16, 2, 34.4), (32, 4, 9.8), (64, 8, 4.7), (128, 16, 3.5)]
)
def test_attention_costs_what_the_paper_says(side: int, window: int, percent: float) -> None:
    """256 to 2048 px; for the last the paper prints 2.3 %, its own formula gives 3.5."""
    grid = Grid(1, side, side)
    settings = Proxy(height=window, width=window)
    with torch.device("meta"):
        mixers = [one.build(64, 2) for one in (Full(), settings)]
        x, context = torch.empty(1, grid.tokens, 64), Context(grid, torch.empty(1, 64))
        flops = []
        for one in mixers:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                one(hidden_states=x, context=context)
            counts = counter.get_flop_counts()["Global"]
            flops.append(sum(n for op, n in counts.items() if "bmm" in str(op) or "attention" in str(op)))
            assert macs_of(one, grid.tokens, 0, grid) * 2 == counter.get_total_flops()
    assert flops[1] / flops[0] == pytest.approx(settings.share(grid.tokens), rel=1e-12)
    assert 100 * settings.share(grid.tokens) == pytest.approx(percent, abs=0.06)


def test_cost_by_the_count_of_tokens_is_that_of_a_row_of_windows() -> None:
    module, _ = mixer(Grid(1, 4, 4))
    assert (
        macs_of(module, 64) == macs_of(module, 64, 0, Grid(1, 8, 8)) == macs_of(module, 64, 0, Grid(1, 4, 16))
    )
    assert macs_of(module, 60, 0, Grid(1, 6, 10)) > macs_of(module, 64)  # six windows, not four


# In the slot


@pytest.mark.parametrize("name", sorted(kinds(Experts)))
def test_every_kind_of_experts_stands_behind_it(name: str, tmp_path: Any) -> None:
    model = DiT(
        sample_size=6, width=32, depth=2, heads=2, mlp_ratio=2.0, num_classes=3, mixer="proxy:height=2,width=2", experts=name
    )  # fmt: skip
    filled(model).train()
    inputs = (torch.randn(2, 4, 6, 10), torch.tensor([100.0, 700.0]), torch.tensor([0, 3]))
    loss = model(*inputs).sample.square().mean() + sum(model.auxiliary_losses().values())
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    model.eval()
    model.save_pretrained(tmp_path)
    again = DiT.from_pretrained(tmp_path)
    assert parse(Mixer, again.config.mixer) == Proxy(height=2, width=2)
    with torch.no_grad():
        torch.testing.assert_close(again(*inputs).sample, model(*inputs).sample)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("proxy:proxy_rows=3", "proxy_rows must divide the 4 tokens of a window, got 3"),
        ("proxy:height=0", "height must be a whole number of at least 1 tokens, got 0"),
        ("proxy:choice=middle", "choice must be one of mean, corner, random"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(Mixer, settings)


def test_without_a_grid_it_says_so() -> None:
    module = ProxyMixer(Proxy(), 16, 2)
    with pytest.raises(ValueError, match=r"needs context\.grid"):
        module(torch.zeros(1, 16, 16))
    with pytest.raises(ValueError, match="three sides of at least 1"):
        Window(Grid(1, 4, 4), (1, 0, 4))
