"""Attention over time and within frames: the same as full attention under a mask, at a share of its cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit.backbones.dit import DiT
from dit.embeddings import rotary
from dit.grid import Grid
from dit.ledger import macs_of
from dit.mixers.full import FullMixer, Mixer
from dit.mixers.spacetime import SpaceTime, SpaceTimeMixer, SpatialAttention, TemporalAttention
from dit.model import Context
from dit.routing import RouteDecision
from dit.spec import parse

GRIDS = [Grid(3, 2, 4), Grid(1, 3, 3), Grid(5, 1, 1)]
WIDTH, HEADS = 16, 2


def filled(module: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    for one in module.parameters():
        nn.init.normal_(one, std=0.3)
    return module.eval()


def tokens(grid: Grid, batch: int = 2) -> Tensor:
    return torch.randn(batch, grid.tokens, WIDTH, generator=torch.Generator().manual_seed(1))


def context(grid: Grid | None, **more: Any) -> Context:
    return Context(grid, torch.zeros(2, WIDTH), **more)


def same(grid: Grid, axes: slice) -> Tensor:
    """Who is at the same place along some axes: [1, 1, N, N]."""
    where = grid.positions()[:, axes]
    return (where[:, None] == where[None]).all(-1)[None, None]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_both_steps_are_full_attention_under_a_mask(grid: Grid, masked: bool, turned: bool) -> None:
    x = tokens(grid)
    table = rotary((4, 2, 2), grid, 0, 100.0, "cpu") if turned else None
    keys = torch.ones(2, 1, 1, grid.tokens, dtype=torch.bool)
    if masked:
        keys[0, ..., ::3] = False
        keys[1, ..., : grid.tokens // 2] = False
    about = context(grid, rotary=table, mask=keys if masked else None)
    temporal = filled(TemporalAttention(WIDTH, HEADS, qk_norm=turned))
    spatial = filled(SpatialAttention(WIDTH, HEADS))
    full: Any = FullMixer(WIDTH, HEADS)
    full.load_state_dict(spatial.state_dict())
    with torch.no_grad():
        over_time, within = same(grid, slice(1, 3)) & keys, same(grid, slice(0, 1)) & keys
        expected = temporal.proj(temporal.attn(temporal.norm(x), None, over_time, table))
        heard = over_time.any(-1).expand(2, 1, -1)[:, 0]  # a token that may hear nobody is no one's concern
        torch.testing.assert_close(temporal(x, about)[heard], expected[heard], atol=1e-5, rtol=1e-5)
        assert temporal(x, about).isfinite().all()
        expected, heard = full(x, None, within, table), within.any(-1).expand(2, 1, -1)[:, 0]
        torch.testing.assert_close(
            spatial(hidden_states=x, context=about)[heard], expected[heard], atol=1e-5, rtol=1e-5
        )
        assert spatial(hidden_states=x, context=about).isfinite().all()


def test_the_mixer_is_one_step_after_the_other() -> None:
    grid = Grid(3, 2, 2)
    mixer: Any = filled(SpaceTime(qk_norm=True).build(WIDTH, HEADS))
    x, about = tokens(grid), context(grid)
    assert isinstance(mixer, SpaceTimeMixer)
    with torch.no_grad():
        inner = x + mixer.temporal(x, about)
        expected = SpatialAttention.forward(mixer, inner, context=about)
        assert torch.equal(mixer(hidden_states=x, context=about), expected)
        assert not torch.allclose(expected, SpatialAttention.forward(mixer, x, context=about), atol=1e-2)


@pytest.mark.parametrize("temporal", [True, False])
def test_frames_hear_each_other_only_over_time(temporal: bool) -> None:
    grid = Grid(3, 2, 2)
    mixer = filled(SpaceTime(temporal=temporal).build(WIDTH, HEADS))
    x = tokens(grid).requires_grad_()
    mixer(hidden_states=x, context=context(grid))[:, :4].square().sum().backward()
    assert x.grad is not None
    reach = x.grad.abs().sum((0, 2)).reshape(3, 4) > 0
    assert reach[0].all()
    assert bool(reach[1:].all()) == temporal == bool(reach[1:].any())


def test_heads_that_are_off_are_off_in_every_frame() -> None:
    grid = Grid(3, 2, 2)
    mixer, x = filled(SpatialAttention(WIDTH, HEADS)), tokens(grid)

    def routed(heads: list[list[float]], *, compact: bool = False) -> Tensor:
        route = RouteDecision("sample", heads=torch.tensor(heads), compact=compact)
        with torch.no_grad():
            out: Tensor = mixer(hidden_states=x, context=context(grid, route=route))
        return out

    with torch.no_grad():
        plain = mixer(hidden_states=x, context=context(grid))
    off = routed([[1.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(off[1], plain[1])
    frames = (off[0] - plain[0]).abs().reshape(3, 4, WIDTH).amax((1, 2))
    assert (frames > 1e-2).all()
    torch.testing.assert_close(routed([[1.0, 0.0]] * 2), routed([[1.0, 0.0]] * 2, compact=True))


@pytest.mark.parametrize("grid", GRIDS)
def test_costs_are_linear_in_frames_for_space_and_in_places_for_time(grid: Grid) -> None:
    sites, frames = grid.height * grid.width, grid.frames
    temporal, spatial = TemporalAttention(WIDTH, HEADS), SpatialAttention(WIDTH, HEADS)
    maps = 4 * grid.tokens * WIDTH**2
    assert macs_of(spatial, 0, grid=grid) == maps + 2 * frames * sites**2 * WIDTH
    assert macs_of(temporal, 0, grid=grid) == maps + grid.tokens * WIDTH**2 + 2 * sites * frames**2 * WIDTH
    both = macs_of(SpaceTimeMixer(WIDTH, HEADS), 0, grid=grid)
    assert both == macs_of(spatial, 0, grid=grid) + macs_of(temporal, 0, grid=grid)
    assert macs_of(SpaceTimeMixer(WIDTH, HEADS, temporal=False), 0, grid=grid) == macs_of(
        spatial, 0, grid=grid
    )


def test_picture_weights_of_full_attention_fit_within_frames() -> None:
    torch.manual_seed(0)
    picture = DiT(sample_size=4, width=32, depth=1, heads=2, num_classes=2)
    clip = DiT(sample_size=4, width=32, depth=1, heads=2, num_classes=2, mixer="spacetime:temporal=false")
    clip.load_state_dict(picture.state_dict())
    nn.init.normal_(picture.proj_out.proj.weight)
    nn.init.normal_(picture.transformer_blocks[0].modulation.linear.weight, std=0.1)
    clip.load_state_dict(picture.state_dict())
    x, t, y = torch.randn(1, 4, 3, 4, 4), torch.tensor([500]), torch.tensor([1])
    with torch.no_grad():
        whole = clip(x, t, y).sample
        for i in range(3):
            torch.testing.assert_close(whole[:, :, i], picture(x[:, :, i], t, y).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("about", "words"),
    [
        (context(None), "a stream of text tokens"),
        (context(Grid(2, 2, 2), length=3), "no place for 3 text tokens"),
        (context(Grid(2, 2, 2), mask=torch.ones(1, 1, 8, 8)), "a mask of keys \\[B, 1, 1, 8\\]"),
    ],
)
def test_what_it_has_no_place_for_is_refused(about: Context, words: str) -> None:
    mixer = parse(Mixer, "spacetime").build(WIDTH, HEADS)
    with pytest.raises(ValueError, match=words):
        mixer(hidden_states=tokens(Grid(2, 2, 2)), context=about)


def test_two_streams_are_refused_when_the_network_is_made() -> None:
    with pytest.raises(ValueError, match="spacetime: does not join"):
        parse(Mixer, "spacetime").build_joint(WIDTH, HEADS)
