"""From what a network predicts to what it returns.

Paper: Back to Basics: Let Denoising Generative Models Denoise, Li and He 2025, arXiv:2511.13720.
"""

from __future__ import annotations

from torch import Tensor

from dit.grid import Grid

SMALLEST_NOISE = 1e-3
"""Below this noise level a predicted picture no longer defines a velocity, and the division is held."""


def velocity_from_picture(picture: Tensor, noisy: Tensor, timestep: Tensor, patch: int = 1) -> Tensor:
    """Return the velocity, noise - picture, at a noisy picture whose clean one was predicted; all [B, C, (F,) H, W].

    `timestep` is [B], or [B, N] with one time a patch of `patch` pixels, on 0..1000.
    """
    noise_level = timestep.to(noisy.dtype) / 1000
    if noise_level.dim() == 2:
        grid = Grid.of(noisy, (1, patch, patch))
        sides = (grid.frames, grid.height, grid.width)[5 - noisy.dim() :]
        noise_level = noise_level.reshape(-1, 1, *sides)
        noise_level = noise_level.repeat_interleave(patch, -2).repeat_interleave(patch, -1)
    else:
        noise_level = noise_level.reshape(-1, *(1 for _ in noisy.shape[1:]))
    return (noisy - picture.to(noisy.dtype)) / noise_level.clamp_min(SMALLEST_NOISE)
