"""Positions of clips of other sizes and more scenes than trained: laid into the trained plane, or stretched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import (
    get_1d_rotary_pos_embed,
    get_3d_rotary_pos_embed,
    get_3d_sincos_pos_embed,
)
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import nn

from dit.grid import Grid
from dit.positions import rotary_fitted, sincos_3d, still, stretched


@pytest.mark.parametrize(("rows", "columns"), [(30, 45), (20, 30), (45, 30), (20, 45), (7, 60), (33, 33)])
def test_rotary_positions_lie_in_the_region_of_the_cogvideox_pipeline(rows: int, columns: int) -> None:
    """The places of a region are evenly apart, its end left out, as at the time of the release.

    diffusers 0.42.1 shortens the end as if every region began at 0, and so agrees only for those that do.
    """
    region = get_resize_crop_region_for_grid((rows, columns), 45, 30)
    ours = rotary_fitted(32, Grid(5, rows, columns), Grid(2, 30, 45))
    (top, left), (bottom, right) = region
    places = [
        torch.from_numpy(np.linspace(start, end, count, endpoint=False))
        for start, end, count in ((0, 5, 5), (top, bottom, rows), (left, right, columns))
    ]
    tables = [
        get_1d_rotary_pos_embed(size, at, use_real=True) for size, at in zip((8, 12, 12), places, strict=True)
    ]
    for part, one in enumerate(ours):
        lattice = one.reshape(5, rows, columns, 32)
        for axis, channels in enumerate(lattice.split((8, 12, 12), dim=-1)):
            line = channels.movedim(axis, 0)[:, 0, 0]
            torch.testing.assert_close(line, tables[axis][part].float(), atol=1e-4, rtol=0)
            assert torch.equal(
                channels,
                channels.movedim(axis, 0)[:, :1, :1].expand_as(channels.movedim(axis, 0)).movedim(0, axis),
            )
    if (top, left) == (0, 0):
        theirs = get_3d_rotary_pos_embed(32, region, (rows, columns), 5)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_the_table_of_three_axes_is_that_of_cogvideox() -> None:
    theirs = get_3d_sincos_pos_embed(32, (5, 3), 4, 1.875, 2.0, output_type="pt").flatten(0, 1)
    ours = sincos_3d(32, Grid(4, 3, 5), spatial_scale=1.875, frame_scale=2.0)
    torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=0)


def test_text_is_turned_by_nothing() -> None:
    assert still(None, 3) is None
    table = still(rotary_fitted(16, Grid(2, 1, 2), Grid(1, 1, 2)), 3)
    assert table is not None
    cos, sin = table
    assert cos.shape == sin.shape == (7, 16)
    assert bool((cos[:3] == 1).all())
    assert not bool(sin[:3].any())
    assert bool(sin[5:].any())


def test_positions_are_stretched_over_all_scenes() -> None:
    own, grid = Grid(2, 4, 4), Grid(6, 3, 5)
    table = torch.randn(own.tokens, 8, generator=torch.Generator().manual_seed(1))
    lattice = table.reshape(2, 4, 4, 8).permute(3, 0, 1, 2).unsqueeze(0)
    wide = nn.functional.interpolate(lattice, size=(6, 3, 5), mode="trilinear", align_corners=False)
    assert torch.equal(stretched(table, own, grid, 3), wide[0].permute(1, 2, 3, 0).reshape(1, -1, 8))
    few = stretched(table, own, Grid(4, 3, 5), 3)  # fewer frames take the first places of three whole scenes
    assert torch.equal(few, wide[0].permute(1, 2, 3, 0).reshape(1, -1, 8)[:, : few.shape[1]])
    assert stretched(table, own, Grid(9, 3, 5), 3).shape == (1, 135, 8)
