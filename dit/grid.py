"""The lattice of tokens: how a picture or clip becomes a row of patches and back.

Shape letters used in the whole project: `B` batch, `C` channels, `F` frames, `H W` rows and columns, `N` image tokens,
`L` text tokens, `D` width, `K` heads, `E` experts, `P` values in a patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Grid:
    """Counts of tokens along the three axes. A picture has one frame."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Number of tokens `N`."""
        return self.frames * self.height * self.width

    @classmethod
    def of(cls, x: Tensor, patch: tuple[int, int, int]) -> Self:
        """Return the grid of a picture [B, C, H, W] or clip [B, C, F, H, W] cut into patches (frames, rows, columns).

        Raises: ValueError where a side does not divide.
        """
        frames = x.shape[2] if x.dim() == 5 else 1
        sides = (frames, x.shape[-2], x.shape[-1])
        if x.dim() not in (4, 5) or any(side % cut for side, cut in zip(sides, patch, strict=True)):
            raise ValueError(f"input of shape {tuple(x.shape)} cannot be cut into patches of {patch} (frames, rows, columns)")
        return cls(*(side // cut for side, cut in zip(sides, patch, strict=True)))

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the (frame, row, column) of every token, [N, 3], in token order."""
        axes = [torch.arange(count, device=device) for count in (self.frames, self.height, self.width)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def patchify(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B, C, H, W] or [B, C, F, H, W] -> [B, N, P], with the values of a patch ordered (frame, row, column, channel)."""
    if x.dim() == 4:
        x = x.unsqueeze(2)
    batch, channels = x.shape[:2]
    grid = Grid.of(x, patch)
    pf, ph, pw = patch
    x = x.reshape(batch, channels, grid.frames, pf, grid.height, ph, grid.width, pw)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(batch, grid.tokens, pf * ph * pw * channels)


def unpatchify(tokens: Tensor, grid: Grid, patch: tuple[int, int, int], *, frames: bool = False) -> Tensor:
    """[B, N, P] -> [B, C, H, W], or [B, C, F, H, W] when `frames`: the exact inverse of `patchify`."""
    pf, ph, pw = patch
    batch, _, values = tokens.shape
    channels = values // (pf * ph * pw)
    x = tokens.reshape(batch, grid.frames, grid.height, grid.width, pf, ph, pw, channels)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)
    x = x.reshape(batch, channels, grid.frames * pf, grid.height * ph, grid.width * pw)
    return x if frames else x.squeeze(2)
