"""Windows of frames, rows and columns: who hears whom on grids of any size, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dit.backbones.dit import DiT
from dit.embeddings import rotary
from dit.grid import Grid
from dit.ledger import macs_of
from dit.mixers.full import Full, FullMixer, Mixer
from dit.mixers.window import Windows, window_attention_reference
from dit.model import Context
from dit.routing import RouteDecision
from dit.spec import parse

GRIDS = [Grid(4, 6, 5), Grid(1, 7, 4), Grid(9, 1, 1), Grid(2, 2, 2)]
SIDES = [(2, 3, 2), (4, 4, 4), (1, 1, 1), (3, 2, 5)]
WIDTH, HEADS = 16, 2


def filled(module: nn.Module) -> Any:
    torch.manual_seed(0)
    for one in module.parameters():
        nn.init.normal_(one, std=0.3)
    return module.eval()


def mixer(sides: tuple[int, int, int], shift: str, **settings: Any) -> Any:
    names = dict(zip(("frames", "height", "width"), sides, strict=True))
    return filled(Windows(**names, shift=shift, **settings).build(WIDTH, HEADS))


def tokens(grid: Grid) -> Tensor:
    return torch.randn(2, grid.tokens, WIDTH, generator=torch.Generator().manual_seed(1))


def context(grid: Grid | None, **more: Any) -> Context:
    return Context(grid, torch.zeros(2, WIDTH), **more)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shift", ["always", "never"])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("grid", GRIDS)
def test_windows_are_full_attention_under_a_mask(
    grid: Grid, sides: tuple[int, int, int], shift: str, masked: bool
) -> None:
    attn, x = mixer(sides, shift, qk_norm=True), tokens(grid)
    table = rotary((4, 2, 2), grid, 0, 100.0, "cpu")
    keys = torch.ones(2, 1, 1, grid.tokens, dtype=torch.bool)
    if masked:
        keys[0, ..., ::5] = False
    ours = attn(hidden_states=x, context=context(grid, rotary=table, mask=keys if masked else None))
    assert ours.isfinite().all()
    theirs = window_attention_reference(attn, x, grid, keys if masked else None, table)
    reached = _reached(attn, grid, keys)  # where nothing may be heard, the answer is finite and of no use
    assert reached.float().mean() > 0.75
    torch.testing.assert_close(ours[reached], theirs[reached], atol=1e-5, rtol=1e-4)


def _reached(attn: Any, grid: Grid, keys: Tensor) -> Tensor:
    """Which tokens have one that may be heard in their window, [B, N]."""
    window = attn.window(grid)
    near = window.mask()
    both = window.split(keys[:, 0, 0]).unsqueeze(1)
    both = both if near is None else both & near.repeat(2, 1, 1)
    both = both.expand(-1, window.length, -1)
    found: Tensor = window.join(both.any(-1, keepdim=True)).squeeze(-1)
    return found


def test_one_window_is_full_attention() -> None:
    grid = Grid(2, 3, 4)
    attn, x = mixer((4, 4, 4), "always"), tokens(Grid(2, 3, 4))
    full = FullMixer(WIDTH, HEADS)
    full.load_state_dict(attn.state_dict())
    ours = attn(hidden_states=x, context=context(grid))
    torch.testing.assert_close(ours, full(hidden_states=x, context=context(grid)))


def test_a_token_is_heard_in_its_window_alone() -> None:
    grid, attn = Grid(4, 4, 4), mixer((2, 2, 2), "never")
    x = tokens(grid)
    louder = x.clone()
    louder[:, 0] += 1
    out = attn(hidden_states=torch.cat([x, louder]), context=Context(grid, torch.zeros(4, WIDTH)))
    changed = (out[2:] - out[:2]).abs().sum(-1)[0] > 1e-6
    assert torch.equal(changed, (grid.positions() < 2).all(-1))


def test_two_blocks_carry_over_the_borders_of_windows() -> None:
    grid = Grid(4, 4, 4)
    settings = Windows(frames=2, height=2, width=2)
    torch.manual_seed(0)
    plain, moved = (settings.at(i).build(WIDTH, HEADS) for i in range(2))
    x = tokens(grid).requires_grad_()
    inner = plain(hidden_states=x, context=context(grid))
    out = moved(hidden_states=inner, context=context(grid))
    out[0, 0].sum().backward()  # the corner: shifted, it is alone
    assert x.grad is not None
    assert int((x.grad[0].abs().sum(-1) > 0).sum()) == 8
    x.grad = None
    moved(hidden_states=plain(hidden_states=x, context=context(grid)), context=context(grid))[
        0, 21
    ].sum().backward()
    assert (
        int((x.grad[0].abs().sum(-1) > 0).sum()) == 64
    )  # the window in the middle has a token of each of the 8


def test_windows_are_shifted_in_every_second_block() -> None:
    assert [Windows().at(i).shift for i in range(4)] == ["never", "always", "never", "always"]
    assert [parse(Mixer, "window:shift=never").at(i).shift for i in range(2)] == ["never"] * 2  # type: ignore[attr-defined]
    model = DiT(sample_size=16, width=WIDTH, depth=3, heads=HEADS, num_classes=2, mixer="window")
    assert [one.attn.shifted for one in model.transformer_blocks] == [False, True, False]
    assert not Windows().build(WIDTH, HEADS).shifted  # type: ignore[truthy-function]


def test_samples_do_not_hear_each_other() -> None:
    grid, attn = Grid(3, 5, 5), mixer((2, 2, 2), "always")
    x = tokens(grid)
    both = attn(hidden_states=x, context=context(grid))
    for i in range(2):
        one = attn(hidden_states=x[i : i + 1], context=context(grid))
        torch.testing.assert_close(one, both[i : i + 1])


def test_routed_heads_are_left_out_in_every_window() -> None:
    grid, attn = Grid(2, 4, 4), mixer((2, 2, 2), "never")
    x = tokens(grid)
    gates = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    out = attn(hidden_states=x, context=context(grid, route=RouteDecision("time", heads=gates)))
    plain = attn(hidden_states=x, context=context(grid))
    torch.testing.assert_close(out[1], plain[1])
    attn.to_out[0].weight.data[:, : WIDTH // HEADS] = (
        0  # what is left of sample 0 is head 0: now nothing but the bias
    )
    out = attn(hidden_states=x, context=context(grid, route=RouteDecision("time", heads=gates)))
    torch.testing.assert_close(out[0], attn.to_out[0].bias.expand_as(out[0]))


@pytest.mark.parametrize("grid", GRIDS)
def test_costs_are_told_right_and_grow_as_the_tokens_do(grid: Grid) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        attn = Windows(frames=2, height=3, width=2, shift="always").build(WIDTH, HEADS)
        x = torch.empty(1, grid.tokens, WIDTH)
        attn(hidden_states=x, context=Context(grid, x[:, 0]))
        assert counter.get_total_flops() == 2 * macs_of(attn, grid.tokens, 0, grid)
        long, short = (macs_of(attn, 0, 0, Grid(2, 12 * side, 12)) for side in (16, 1))
        assert long == 16 * short < macs_of(Full().build(WIDTH, HEADS), 2 * 12 * 12 * 16)
    assert macs_of(attn, 25) == macs_of(attn, 36) == macs_of(attn, 0, 0, Grid(2, 3, 6))


def test_what_windows_cannot_serve_is_refused() -> None:
    attn = mixer((2, 2, 2), "never")
    x = tokens(Grid(1, 2, 2))
    with pytest.raises(ValueError, match=r"window: needs context.grid"):
        attn(hidden_states=x, context=context(None))
    with pytest.raises(ValueError, match="no place for 2 text tokens"):
        attn(hidden_states=x, context=context(Grid(1, 1, 2), length=2))
    with pytest.raises(ValueError, match=r"mask of keys \[B, 1, 1, 4\], got one of shape \(4, 4\)"):
        attn(hidden_states=x, context=context(Grid(1, 2, 2), mask=torch.ones(4, 4, dtype=torch.bool)))
    with pytest.raises(ValueError, match="window: does not join"):
        Windows().build_joint(WIDTH, HEADS)
    with pytest.raises(ValueError, match="frames must be a whole number of at least 1"):
        Windows(frames=0)
