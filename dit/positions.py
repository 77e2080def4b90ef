"""Positions of clips whose size or number of scenes is not the trained one: laid into the trained plane, or stretched.

Paper: CogVideoX, Yang et al. 2024, arXiv:2408.06072 (rotary positions of frame, row and column; a table of three axes);
Mask^2DiT, Qi et al. 2025, arXiv:2503.19881 (one count of frames through all scenes).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dit.embeddings import Rotary, sincos_1d
from dit.grid import Grid


def rotary_fitted(
    size: int, grid: Grid, trained: Grid, *, theta: float = 10000.0, device: torch.device | str = "cpu"
) -> Rotary:
    """Return cosines and sines [N, head size] of a clip of `grid` for heads of `size` channels.

    A quarter of the channels turns with the frame, which counts on whatever was trained; the rest with row and column. The
    plane is made as large as it can be within that of `trained`, in the middle of it, with its sides in proportion.
    """
    kind = torch.float32 if torch.device(device).type == "mps" else torch.float64
    where = grid.positions(device).to(kind)
    fit = min(trained.height / grid.height, trained.width / grid.width)
    axes = (
        (size // 4, 0, 0),
        (3 * size // 8, trained.height, grid.height),
        (3 * size // 8, trained.width, grid.width),
    )
    angles = []
    for axis, (channels, side, count) in enumerate(axes):
        places = where[:, axis : axis + 1]
        if side:
            taken = round(fit * count)
            places = places * (taken / count) + round((side - taken) / 2)
        steps = torch.arange(0, channels, 2, dtype=kind, device=device) / channels
        angles.append(places * theta**-steps)
    full = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)
    return full.cos().float(), full.sin().float()


def places_at(index: Tensor, grid: Grid) -> Tensor:
    """Return frame, row and column of every token of `grid`, whose frames stand in time at `index` [B, F]: [B, N, 3]."""
    plane = Grid(1, grid.height, grid.width).positions(index.device)[:, 1:].expand(*index.shape, -1, 2)
    time = index[..., None, None].expand(*plane.shape[:3], 1)
    return torch.cat([time, plane.to(torch.promote_types(time.dtype, plane.dtype))], dim=-1).flatten(1, 2)


def still(table: Rotary | None, text: int) -> Rotary | None:
    """Put text before a clip's tokens, turned by nothing: [N, head size] -> [L + N, head size]."""
    if table is None:
        return None
    cos, sin = table
    return F.pad(cos, (0, 0, text, 0), value=1.0), F.pad(sin, (0, 0, text, 0))


def sincos_3d(
    width: int,
    grid: Grid,
    *,
    spatial_scale: float = 1.0,
    frame_scale: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the table [N, D] of a clip: a quarter of the channels holds the frame, the others the column and the row.

    The scales are how many frames, and how many rows or columns, are one step.
    """
    where, plane = grid.positions(device), 3 * width // 8
    axes = [
        sincos_1d(width // 4, where[:, 0] / frame_scale),
        sincos_1d(plane, where[:, 2] / spatial_scale),
        sincos_1d(plane, where[:, 1] / spatial_scale),
    ]
    return torch.cat(axes, dim=1).float()


def stretched(table: Tensor, own: Grid, grid: Grid, scenes: int) -> Tensor:
    """Stretch the table [N', D] of one scene of `own` over `scenes` scenes and to the plane of `grid`: [1, N, D].

    Trilinear. A clip with fewer frames than the scenes would have takes the first; one with more is stretched to them.
    """
    lattice = (
        table.float().T.unflatten(1, (own.frames, own.height, own.width)).unsqueeze(0)
    )  # [1, D, f, h, w]
    frames = max(grid.frames, own.frames * scenes)
    lattice = F.interpolate(lattice, (frames, grid.height, grid.width), mode="trilinear", align_corners=False)
    return lattice[:, :, : grid.frames].flatten(2).transpose(1, 2)
