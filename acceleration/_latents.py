"""The latents among the arguments of a call, and how far apart two of them are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LATENTS = ("hidden_states", "x", "sample", "latents", "x_t")
_POSITIONS = ("img_ids", "image_ids")


def relative(x: Tensor, y: Tensor) -> float:
    """Return the mean distance of x from y [B, ...] over the mean size of y, of the sample where it is largest."""
    dims = tuple(range(1, x.dim())) if x.dim() > 2 else tuple(range(x.dim()))
    x, y = (one.detach().float() if one.dtype.itemsize < 4 else one.detach() for one in (x, y))
    far, size = (x - y).abs().mean(dims), y.abs().mean(dims)
    found = torch.where(
        far == 0, torch.zeros_like(far), far / size
    )  # nothing compared with nothing is no distance
    return float(found.max())


def wiener(latent: Tensor, level: float, power: float) -> Tensor:
    """Clear a latent [B, C, ...] of noise of a level (0-1), taking its spectrum to fall with frequency as 1/f^power.

    The gain is scaled to a mean of 1, so that distances at different levels can be added up.
    """
    axes = tuple(range(2, latent.dim()))
    x = latent.detach().double() if latent.dtype == torch.float64 else latent.detach().float()
    level = min(max(level, 1e-4), 1 - 1e-4)
    squares = torch.zeros((), device=x.device, dtype=x.dtype)
    for axis in axes:
        shape = [-1 if other == axis else 1 for other in axes]
        squares = (
            squares + torch.fft.fftfreq(x.shape[axis], device=x.device, dtype=x.dtype).reshape(shape) ** 2
        )
    lowest = 0.5 / max(
        x.shape[axis] for axis in axes
    )  # the mean of the picture counts as half its lowest wave
    spectrum = squares.clamp(min=lowest**2) ** (-power / 2)
    gain = (1 - level) * spectrum / ((1 - level) ** 2 * spectrum + level**2)
    return torch.fft.ifftn(torch.fft.fftn(x, dim=axes) * (gain / gain.mean()), dim=axes).real


def latents_of(given: Mapping[str, Any]) -> list[Tensor]:
    """Return the latents of a call as [B, C, ...]; tokens [B, N, C] are laid out by their positions where these are given."""
    value = next((given[name] for name in LATENTS if given.get(name) is not None), None)
    if isinstance(value, list | tuple):  # one [C, ...] a sample
        return [one.unsqueeze(0) for one in value if isinstance(one, Tensor) and one.dim() > 1]
    if not isinstance(value, Tensor) or value.dim() < 3:
        return []
    if value.dim() > 3:
        return [value]
    rows = _rows(given, value.shape[1])
    return [value.transpose(1, 2).unflatten(2, (rows, -1))]


def _rows(given: Mapping[str, Any], tokens: int) -> int:
    ids = next((given[name] for name in _POSITIONS if isinstance(given.get(name), Tensor)), None)
    if ids is not None and ids.shape[-1] >= 3 and ids.shape[-2] == tokens:
        high, wide = (int(ids[..., axis].max() - ids[..., axis].min()) + 1 for axis in (-2, -1))
        if high * wide == tokens:
            return high
    shapes = given.get("img_shapes")
    while isinstance(shapes, list | tuple) and shapes and isinstance(shapes[0], list | tuple):
        shapes = shapes[0]
    if isinstance(shapes, tuple) and len(shapes) == 3 and math.prod(shapes) == tokens:
        return int(shapes[0] * shapes[1])
    side = math.isqrt(tokens)
    return side if side * side == tokens else 1
