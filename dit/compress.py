"""Many tokens into few and back: several paths, each making one token of a square of them.

Paper: E-MMDiT, Shen et al. 2025, arXiv:2510.27135 (multi-path compression).
Differs: grids need be neither square nor divisible by the ratios: the last row and column are repeated, and cut off at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit.grid import Grid


class TokenCompressor(nn.Module):
    """Every path joins squares of `ratio` x `ratio` tokens into one; the tokens of all paths stand one after the other."""

    def __init__(self, width: int, ratios: Sequence[int]) -> None:
        super().__init__()
        self.ratios = tuple(ratios)
        self.paths = nn.ModuleList(_perceptron(width * ratio**2, width) for ratio in ratios)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        """[B, N, D] on `grid` -> [B, `tokens(grid)`, D]."""
        whole = _whole(grid, self.ratios)
        x = tokens.transpose(1, 2).unflatten(2, (grid.height, grid.width))  # [B, D, H, W]
        if whole != grid:
            x = F.pad(x, (0, whole.width - grid.width, 0, whole.height - grid.height), mode="replicate")
        made = [
            path(F.pixel_unshuffle(x, ratio).flatten(2).transpose(1, 2))
            for ratio, path in zip(self.ratios, self.paths, strict=True)
        ]
        return torch.cat(made, dim=1)

    def tokens(self, grid: Grid) -> int:
        """Return how many tokens are left of a grid."""
        return sum(self.rows(grid).values())

    def rows(self, grid: Grid) -> dict[str, int]:
        """Return how many tokens each path makes."""
        return {f"paths.{i}": one.tokens for i, one in enumerate(_made(grid, self.ratios))}


class TokenReconstructor(nn.Module):
    """Spread the tokens of every path out again and merge them, channel by channel, with those from before compression."""

    def __init__(self, width: int, ratios: Sequence[int], *, skip: bool = True) -> None:
        super().__init__()
        self.ratios, self.skip = tuple(ratios), skip
        self.paths = nn.ModuleList(_perceptron(width // ratio**2, width) for ratio in ratios)
        self.merger = _perceptron(width * (len(self.ratios) + skip), width)

    def forward(self, tokens: Tensor, before: Tensor, grid: Grid) -> Tensor:
        """Compressed tokens and those before compression [B, N, D] -> [B, N, D] on `grid`."""
        made = _made(grid, self.ratios)
        pieces = tokens.split([one.tokens for one in made], dim=1)
        spread = []
        for piece, small, ratio, path in zip(pieces, made, self.ratios, self.paths, strict=True):
            x = F.pixel_shuffle(piece.transpose(1, 2).unflatten(2, (small.height, small.width)), ratio)
            x = x[..., : grid.height, : grid.width].flatten(2)  # [B, D / ratio^2, N]
            spread.append(path(x.transpose(1, 2)))
        merged: Tensor = self.merger(torch.cat([*spread, before] if self.skip else spread, dim=2))
        return merged

    def rows(self, grid: Grid) -> dict[str, int]:
        """Return how many tokens pass through each part."""
        return {f"paths.{i}": grid.tokens for i in range(len(self.paths))} | {"merger": grid.tokens}


def _perceptron(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(approximate="tanh"), nn.Linear(width, width))


def _whole(grid: Grid, ratios: Sequence[int]) -> Grid:
    """The next larger grid that divides by all ratios."""
    unit = math.lcm(*ratios)
    return Grid(1, -(-grid.height // unit) * unit, -(-grid.width // unit) * unit)


def _made(grid: Grid, ratios: Sequence[int]) -> list[Grid]:
    whole = _whole(grid, ratios)
    return [Grid(1, whole.height // ratio, whole.width // ratio) for ratio in ratios]
