"""Positions, times and labels as vectors.

Paper: Scalable Diffusion Models with Transformers, Peebles and Xie 2023, arXiv:2212.09748 (sine-cosine table, time and
label embedding); RoFormer, Su et al. 2021, arXiv:2104.09864 (rotary positions).
Differs: the sine-cosine table is computed for the grid at hand instead of stored, so any size works; frequencies divide by
the half width (shift 0) as in the released DiT, not by the half width minus one as in diffusers' `DiTTransformer2DModel`.
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from dit.grid import Grid

Rotary = tuple[Tensor, Tensor]


def sincos_1d(width: int, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Return [N, width]: sines, then cosines, of `positions` [N] at `width / 2` geometric frequencies."""
    half = width // 2
    kind = torch.float32 if positions.device.type == "mps" else torch.float64
    freqs = base ** (-torch.arange(half, dtype=kind, device=positions.device) / half)
    angles = positions.to(kind)[:, None] * freqs
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(width: int, grid: Grid, device: torch.device | str = "cpu") -> Tensor:
    """Return the frozen table [N, D] of one frame: the first half of the channels holds the column, the second the row.

    Raises: ValueError unless `width` divides by 4.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, got {width}")
    where = Grid(1, grid.height, grid.width).positions(device)
    table = torch.cat([sincos_1d(width // 2, where[:, 2]), sincos_1d(width // 2, where[:, 1])], dim=1)
    return table.float().repeat(grid.frames, 1)


def rotary(axes: tuple[int, int, int], grid: Grid, text: int, theta: float, device: torch.device | str) -> Rotary:
    """Return cosines and sines [L + N, head size] of the joint sequence, text first and at position 0 (as in FLUX).

    `axes` are the channels given to frame, row and column; every one is even and they add up to the head size.
    """
    where = torch.cat([torch.zeros(text, 3, dtype=torch.long, device=device), grid.positions(device)])
    return rotary_at(where, axes, theta)


def rotary_at(places: Tensor, axes: tuple[int, int, int], theta: float) -> Rotary:
    """Return cosines and sines [..., N, head size] of tokens at frames, rows and columns `places` [..., N, 3]; `axes` as above."""
    device = places.device
    kind = torch.float32 if device.type == "mps" else torch.float64
    angles = [
        places[..., axis : axis + 1].to(kind) * theta ** (-torch.arange(0, size, 2, dtype=kind, device=device) / max(size, 1))
        for axis, size in enumerate(axes)
    ]
    full = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)
    return full.cos().float(), full.sin().float()


def rotate(x: Tensor, table: Rotary) -> Tensor:
    """Turn neighbouring pairs of channels of x [B, N, K, head size] by the angles of `table` [N, head size] (or one a sample)."""
    cos, sin = (part.unsqueeze(-2) for part in table)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)


class TimeEmbedding(nn.Module):
    """Diffusion time -> conditioning vector: sinusoid of 256 channels (cosines first), then a two-layer SiLU perceptron."""

    def __init__(self, width: int, channels: int = 256) -> None:
        super().__init__()
        self.time_proj = Timesteps(channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(channels, width)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """[B] or [B, N] -> [B, D] or [B, N, D]."""
        waves = self.time_proj(timestep.flatten()).to(dtype)
        emb: Tensor = self.timestep_embedder(waves)
        return emb.unflatten(0, timestep.shape) if timestep.dim() > 1 else emb


class LabelEmbedding(nn.Module):
    """Class index -> vector, with one more row, the null class, that stands for "no label" in guidance."""

    def __init__(self, classes: int, width: int, *, null: bool = True) -> None:
        super().__init__()
        self.classes = classes
        self.embedding_table = nn.Embedding(classes + int(null), width)

    def forward(self, labels: Tensor) -> Tensor:
        """[B] -> [B, D]."""
        emb: Tensor = self.embedding_table(labels)
        return emb


class PooledProjection(nn.Module):
    """Pooled prompt vector -> conditioning vector: linear, SiLU, linear."""

    def __init__(self, pooled: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(pooled, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, pooled] -> [B, D]."""
        emb: Tensor = self.linear_2(nn.functional.silu(self.linear_1(pooled)))
        return emb
