"""The scan of a clip: in every order and from both ends it is the recurrence; review tokens tell of what is to come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dit.backbones.dit import DiT
from dit.grid import Grid
from dit.ledger import macs_of
from dit.mixers import mamba
from dit.mixers.full import Full, Mixer
from dit.mixers.lingen import LinGen, LinGenMixer
from dit.mixers.mamba import ORDERS, ROTARY, Mamba, MambaMixer, scan_order
from dit.mixers.window import WindowMixer
from dit.model import Context
from dit.presets import build
from dit.routing import RouteDecision
from dit.scan import state_space_scan_reference
from dit.spec import parse

GRIDS = [Grid(3, 4, 2), Grid(1, 5, 6), Grid(7, 1, 1), Grid(1, 1, 1)]
WIDTH, HEADS = 16, 2


def filled(settings: Mixer) -> Any:
    torch.manual_seed(0)
    module = settings.build(WIDTH, HEADS).double()
    for one in module.parameters():
        nn.init.normal_(one, std=0.3)
    return module.eval()


def tokens(grid: Grid) -> Tensor:
    return torch.randn(2, grid.tokens, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def context(grid: Grid | None, **more: Any) -> Context:
    return Context(grid, torch.zeros(2, WIDTH), **more)


def step_by_step(mixer: MambaMixer, x: Tensor, grid: Grid, orders: dict[str, list[int]]) -> Tensor:
    """One token after the other, on lists: what `MambaMixer` is compared to."""
    order, out = orders[mixer.order], torch.zeros_like(x)
    boxes: dict[tuple[int, ...], list[int]] = {}
    sides = [-(-axis // max(mixer.review, 1)) for axis in (grid.frames, grid.height, grid.width)]
    for token in order:
        place = grid.positions()[token].tolist()
        boxes.setdefault(tuple(at // side for at, side in zip(place, sides, strict=True)), []).append(token)
    axes = ROTARY[mixer.order]
    first = [
        x[:, boxes[key]].mean(1) for key in sorted(boxes, key=lambda at: [at[axis] for axis in axes])
    ] if mixer.review else []  # fmt: skip
    for end in range(2 if mixer.both_ends else 1):
        walk = order[::-1] if end else order
        branch: Any = mixer.scans[-1 if end else 0]
        sequence = torch.stack(first + [x[:, token] for token in walk], dim=1)
        answers = branch(sequence, scan=state_space_scan_reference)[:, len(first) :]
        for token, answer in zip(walk, answers.unbind(1), strict=True):
            out[:, token] += answer
    return out


def by_sorting(grid: Grid) -> dict[str, list[int]]:
    places = grid.positions().tolist()
    return {
        name: sorted(range(grid.tokens), key=lambda token: [places[token][axis] for axis in axes])
        for name, axes in ROTARY.items()
    }


@pytest.mark.parametrize(
    "settings", ["", "shared=true", "both_ends=false", "review=0", "review=2,expand=1,kernel=1"]
)
@pytest.mark.parametrize("order", ROTARY)
@pytest.mark.parametrize("grid", GRIDS)
def test_the_mixer_is_the_recurrence_from_both_ends(grid: Grid, order: str, settings: str) -> None:
    mixer = filled(parse(Mixer, f"mamba:state=3,scan={order},{settings}"))
    x = tokens(grid)
    ours = mixer(hidden_states=x, context=context(grid))
    assert ours.dtype == torch.float64
    assert float((ours - step_by_step(mixer, x, grid, by_sorting(grid))).detach().abs().max()) < 1e-8


@pytest.mark.parametrize("review", [0, 3])
def test_long_clips_go_through_in_segments(monkeypatch: pytest.MonkeyPatch, review: int) -> None:
    """Also where review tokens fill more than one of them, and where some tokens are not heard."""
    grid = Grid(5, 4, 2)
    mixer, x = filled(Mamba(state=3, review=review)), tokens(grid)
    about = context(grid, mask=(torch.arange(2 * grid.tokens).reshape(2, 1, 1, -1) % 7) > 0)
    whole = mixer(hidden_states=x, context=about)
    for segment in (1, 7, 24):
        monkeypatch.setattr(mamba, "SEGMENT", segment)
        parts = mixer(hidden_states=x, context=about)
        assert float((parts - whole).detach().abs().max()) < 1e-8


def test_a_direction_is_the_block_of_the_paper() -> None:
    """Convolution, steps, scan, skip, gate and norm, written token by token."""
    one = filled(Mamba(state=3, both_ends=False, review=0)).scans[0]
    x = tokens(Grid(1, 1, 5))
    out, state = [], torch.zeros(2, 4, 8, 3, dtype=x.dtype)
    for n in range(5):
        z, _, dt = one.in_proj(x[:, n]).split(one.sizes, dim=-1)
        mixed = one.conv.bias.expand(2, -1)
        for back in range(min(n + 1, 4)):
            mixed = (
                mixed
                + one.conv.weight[:, 0, 3 - back] * one.in_proj(x[:, n - back]).split(one.sizes, dim=-1)[1]
            )
        v, keys, queries = nn.functional.silu(mixed).split([32, 3, 3], dim=-1)
        v, dt = v.unflatten(-1, (4, 8)), nn.functional.softplus(dt + one.dt_bias)
        kept = torch.exp(-dt * one.A_log.exp())[..., None, None]
        state = kept * state + (dt[..., None] * v)[..., None] * keys[:, None, None]  # [B, K, e, d]
        y = ((state * queries[:, None, None]).sum(-1) + one.D[:, None] * v).flatten(1) * nn.functional.silu(z)
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * one.norm.weight
        out.append(y @ one.out_proj.weight.T)
    assert float((one(x) - torch.stack(out, dim=1)).detach().abs().max()) < 1e-8


def test_orders() -> None:
    grid = Grid(2, 2, 3)  # 0 1 2 / 3 4 5, then 6 7 8 / 9 10 11
    assert scan_order("rows", grid) is None
    found = {order: scan_order(order, grid).tolist() for order in ORDERS[1:]}  # type: ignore[union-attr]
    assert found["columns"] == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert found["time-rows"] == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]
    assert found["time-columns"] == [0, 6, 3, 9, 1, 7, 4, 10, 2, 8, 5, 11]
    for one in (Grid(3, 3, 4), Grid(2, 4, 3), Grid(1, 1, 5)):
        walk = scan_order("zigzag", one)
        assert walk is not None
        assert sorted(walk.tolist()) == list(range(one.tokens))
        assert (one.positions()[walk].diff(dim=0).abs().sum(-1) == 1).all()  # never leaps


def test_orders_follow_each_other_from_block_to_block() -> None:
    def orders(scan: str) -> list[str]:
        return [parse(Mixer, f"mamba:scan={scan}").at(i).scan for i in range(6)]  # type: ignore[attr-defined]

    assert orders("rotary") == ["rows", "columns", "time-rows", "time-columns", "rows", "columns"]
    assert orders("zigzag") == ["zigzag"] * 6
    model = DiT(sample_size=8, width=WIDTH, depth=3, heads=HEADS, num_classes=2, mixer="lingen")
    blocks: Any = model.transformer_blocks
    assert [one.attn.mamba.order for one in blocks] == ["rows", "columns", "time-rows"]
    assert [one.attn.shifted for one in blocks] == [False, True, False]


@pytest.mark.parametrize("order", ["rows", "time-columns"])
def test_review_tokens_tell_of_what_is_to_come(order: str) -> None:
    """With one direction a token hears those before it; with review tokens all of them."""
    grid = Grid(3, 4, 2)
    place = by_sorting(grid)[order].index(13)
    for review, heard in ((0, place + 1), (2, grid.tokens)):
        mixer = filled(Mamba(scan=order, review=review, both_ends=False))
        x = tokens(grid).requires_grad_()
        mixer(hidden_states=x, context=context(grid))[:, 13].sum().backward()
        assert x.grad is not None
        assert int((x.grad[0].abs().sum(-1) > 0).sum()) == heard


@pytest.mark.parametrize("settings", ["mamba", "mamba:scan=time-rows", "lingen:frames=2,height=2,width=2"])
def test_what_may_not_be_heard_changes_nothing(settings: str) -> None:
    grid, mixer = Grid(3, 4, 4), filled(parse(Mixer, settings))
    x = tokens(grid)
    there = torch.ones(2, grid.tokens, dtype=torch.bool)
    there[0, ::5], there[1, :16] = False, False  # single tokens; a whole frame
    about = context(grid, mask=there[:, None, None])
    plain = mixer(hidden_states=x, context=about)
    other = mixer(hidden_states=torch.where(there.unsqueeze(-1), x, 9.0), context=about)
    assert plain.isfinite().all()
    torch.testing.assert_close(other[there], plain[there])
    assert not torch.allclose(mixer(hidden_states=x, context=context(grid))[there], plain[there], atol=1e-3)
    all_heard = mixer(hidden_states=x, context=context(grid, mask=torch.ones_like(there)[:, None, None]))
    torch.testing.assert_close(all_heard, mixer(hidden_states=x, context=context(grid)))


def test_routed_heads_are_silent() -> None:
    grid, mixer = Grid(2, 3, 3), filled(Mamba(expand=2))
    x, gates = tokens(grid), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    plain = mixer(hidden_states=x, context=context(grid))
    out = mixer(hidden_states=x, context=context(grid, route=RouteDecision("time", heads=gates)))
    assert not out[0].any()
    torch.testing.assert_close(out[1], plain[1])


def test_samples_do_not_hear_each_other() -> None:
    grid, mixer = Grid(3, 5, 3), filled(LinGen(frames=2, height=2, width=2))
    x = tokens(grid)
    both = mixer(hidden_states=x, context=context(grid))
    for i in range(2):
        torch.testing.assert_close(mixer(hidden_states=x[i : i + 1], context=context(grid)), both[i : i + 1])


def test_branches_are_added_and_can_be_left_out() -> None:
    grid, x = Grid(3, 4, 4), tokens(Grid(3, 4, 4))
    both = filled(LinGen(state=8))
    near, far = (filled(LinGen(state=8, **{name: False})) for name in ("mamba", "windows"))
    assert [type(one) for one in (both, near, far)] == [LinGenMixer, WindowMixer, MambaMixer]
    near.load_state_dict({k: v for k, v in both.state_dict().items() if not k.startswith("mamba.")})
    far.load_state_dict(both.mamba.state_dict())
    out = [one(hidden_states=x, context=context(grid)) for one in (both, near, far)]
    torch.testing.assert_close(out[0], out[1] + out[2])
    with pytest.raises(ValueError, match="mamba or windows must be on"):
        LinGen(mamba=False, windows=False)


@pytest.mark.parametrize(
    "settings", ["mamba", "mamba:shared=true,review=3", "lingen", "lingen:both_ends=false,shift=always"]
)
@pytest.mark.parametrize("grid", [Grid(5, 6, 7), Grid(1, 40, 40), Grid(1, 1, 1)])
def test_costs_are_told_right(grid: Grid, settings: str) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        mixer = parse(Mixer, settings).build(WIDTH, HEADS)
        x = torch.empty(1, grid.tokens, WIDTH)
        mixer(hidden_states=x, context=Context(grid, x[:, 0]))
    assert counter.get_total_flops() == 2 * macs_of(mixer, grid.tokens, 0, grid)


def test_costs_grow_as_the_tokens_do() -> None:
    with torch.device("meta"):
        ours, full = LinGen().build(64, 4), Full().build(64, 4)
    for few, many in ((16, 64), (64, 256)):  # frames of 16 x 16: 4k, 16k and 64k tokens
        grids = Grid(few, 16, 16), Grid(many, 16, 16)
        assert macs_of(ours, 0, 0, grids[1]) / macs_of(ours, 0, 0, grids[0]) < 4.01
        assert macs_of(full, grids[1].tokens) / macs_of(full, grids[0].tokens) > 12
    assert macs_of(ours, 4096) <= macs_of(ours, 0, 0, Grid(16, 16, 16)) * 1.01


def test_what_it_cannot_serve_is_refused() -> None:
    mixer, x = filled(Mamba()), tokens(Grid(1, 2, 2))
    with pytest.raises(ValueError, match=r"mamba: needs context.grid"):
        mixer(hidden_states=x)
    with pytest.raises(ValueError, match=r"mamba: needs .* no place for 2 text tokens"):
        mixer(hidden_states=x, context=context(Grid(1, 1, 2), length=2))
    with pytest.raises(ValueError, match="mamba: width 16 does not divide by 3 heads"):
        Mamba().build(16, 3)
    with pytest.raises(ValueError, match="lingen: does not join"):
        LinGen().build_joint(WIDTH, HEADS)
    with pytest.raises(ValueError, match=r"scan must be one of rotary, rows, .*did you mean 'columns'"):
        parse(Mixer, "lingen:scan=colums")


def test_presets() -> None:
    with torch.device("meta"):
        model = build("lingen-s/2", depth=2)
    assert [type(one.attn) for one in model.transformer_blocks] == [LinGenMixer] * 2
