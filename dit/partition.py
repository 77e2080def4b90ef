"""Tokens in groups: permute, attend within each group, permute back. One frame for interleaved groups, windows and bricks.

Paper: E-MMDiT, Shen et al. 2025, arXiv:2510.27135 (interleaved groups, "alternating subregion attention"); Swin
Transformer, Liu et al. 2021, arXiv:2103.14030 (shifted windows), as used by Qihoo-T2X, Wang et al. 2024, arXiv:2409.04005.
Differs: any count of tokens is taken, padded at the end and masked; the released codes need whole groups.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dit.grid import Grid


class Partition(ABC):
    """A way to cut N tokens into G groups of M places each, and its exact inverse.

    Groups stand beside each other in the batch, those of one sample together: index `sample * G + group`. Places that hold no
    token are zero and masked. A partition holds whole numbers only, so it can be made anew in every call.
    """

    tokens: int
    """N."""
    groups: int
    """G."""
    length: int
    """M, places of a group."""

    @abstractmethod
    def split(self, x: Tensor) -> Tensor:
        """[B, N, ...] -> [B * G, M, ...]."""

    @abstractmethod
    def join(self, x: Tensor) -> Tensor:
        """[B * G, M, ...] -> [B, N, ...], the exact inverse of `split`; what stands in empty places is dropped."""

    @abstractmethod
    def mask(self, device: torch.device | str = "cpu") -> Tensor | None:
        """Return which places may be heard, [G, 1, M], or by which, [G, M, M]; None where every place hears every other."""

    def spread(self, x: Tensor) -> Tensor:
        """Give every group what belongs to its sample (a time, a prompt): [B, ...] -> [B * G, ...]."""
        return x.repeat_interleave(self.groups, dim=0)


@dataclass(frozen=True, slots=True)
class Interleave(Partition):
    """Chunks of `chunk` neighbouring tokens are dealt out to the groups in turn, like cards.

    Token i goes to group (i // chunk) % groups. One group is the identity.
    """

    tokens: int
    groups: int
    chunk: int = 1

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.groups < 1 or self.chunk < 1:
            raise ValueError(
                f"interleave: tokens, groups and chunk are at least 1, got {self.tokens}, {self.groups}, {self.chunk}"
            )

    @property
    def length(self) -> int:  # type: ignore[override]
        """M: whole rounds of dealing, times the chunk."""
        rounds = -(-self.tokens // (self.groups * self.chunk))
        return self.tokens if self.groups == 1 else rounds * self.chunk

    def split(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return x
        missing = self.groups * self.length - self.tokens
        if missing:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
        x = x.unflatten(1, (-1, self.groups, self.chunk))  # [B, rounds, G, chunk, ...]
        return x.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def join(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return x
        x = x.unflatten(1, (-1, self.chunk)).unflatten(0, (-1, self.groups))  # [B, G, rounds, chunk, ...]
        return x.transpose(1, 2).flatten(1, 3)[:, : self.tokens]

    def mask(self, device: torch.device | str = "cpu") -> Tensor | None:
        if self.groups * self.length == self.tokens:
            return None
        there = torch.ones(1, self.tokens, dtype=torch.bool, device=device)
        return self.split(there).unsqueeze(1)


@dataclass(frozen=True, slots=True)
class Window(Partition):
    """Boxes of neighbouring tokens, `window` (frames, rows, columns) of them each; the last boxes may reach beyond the grid.

    `shifted` moves all boxes on by half a box, along every axis or the axes it says. What they leave over at the start of an
    axis stands, in the same group, beside what they leave over at its end (a cyclic shift), and the mask keeps the two apart.
    """

    grid: Grid
    window: tuple[int, int, int]
    shifted: bool | tuple[bool, bool, bool] = False

    def __post_init__(self) -> None:
        if len(self.window) != 3 or min(self.window) < 1 or self.grid.tokens < 1:
            raise ValueError(
                f"window: three sides of at least 1 (frames, rows, columns), got {self.window} on {self.grid}"
            )

    @property
    def tokens(self) -> int:  # type: ignore[override]
        """N."""
        return self.grid.tokens

    @property
    def boxes(self) -> tuple[int, int, int]:
        """Counts of boxes along frames, rows and columns."""
        sides = (self.grid.frames, self.grid.height, self.grid.width)
        f, h, w = (-(-side // one) for side, one in zip(sides, self.window, strict=True))
        return f, h, w

    @property
    def groups(self) -> int:  # type: ignore[override]
        """G."""
        return math.prod(self.boxes)

    @property
    def length(self) -> int:  # type: ignore[override]
        """M."""
        return math.prod(self.window)

    @property
    def padded(self) -> bool:
        """Whether some boxes reach beyond the grid."""
        return self.groups * self.length != self.tokens

    def lattice(self, x: Tensor) -> Tensor:
        """[B, N, ...] -> [B, boxes, places, boxes, places, boxes, places, ...] by frames, rows, columns; a view if it can be."""
        return self._cut(self._roll(self._fill(x)))

    def split(self, x: Tensor) -> Tensor:
        if any(self._steps()):  # one gather: rolling copies once for every axis, boxing once more
            boxed = _rows(self._fill(x).flatten(1, 3), self._order(x.device))
        else:
            boxed = self._beside(self.lattice(x))
        return boxed.reshape(len(x) * self.groups, self.length, *x.shape[2:])

    def join(self, x: Tensor) -> Tensor:
        rest = x.shape[2:]
        if any(self._steps()):
            order = self._order(x.device)
            back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
            x = _rows(x.reshape(-1, len(order), *rest), back)
        else:
            axes = (0, 1, 4, 2, 5, 3, 6, *range(7, x.dim() + 5))
            x = x.reshape(-1, *self.boxes, *self.window, *rest).permute(axes)
        x = x.reshape(-1, *self._sides(), *rest)
        if self.padded:
            x = x[:, : self.grid.frames, : self.grid.height, : self.grid.width]
        return x.flatten(1, 3)

    def mask(self, device: torch.device | str = "cpu") -> Tensor | None:
        there = self.split(torch.ones(1, self.tokens, dtype=torch.bool, device=device)) if self.padded else None
        if not any(self._steps()):
            return None if there is None else there.unsqueeze(1)
        around = [
            torch.arange(side, device=device) >= side - step
            for side, step in zip(self._sides(), self._steps(), strict=True)
        ]
        part = 4 * around[0][:, None, None] + 2 * around[1][:, None] + around[2]  # [F, H, W] of the shifted grid
        part = self._beside(self._cut(part.unsqueeze(0))).reshape(self.groups, self.length)
        near = part.unsqueeze(1) == part.unsqueeze(2)  # [G, M, M]
        return near if there is None else near & there.unsqueeze(1)

    def _steps(self) -> tuple[int, int, int]:
        moved = self.shifted if isinstance(self.shifted, tuple) else (self.shifted,) * 3
        f, h, w = (side // 2 if along else 0 for side, along in zip(self.window, moved, strict=True))
        return f, h, w

    def _sides(self) -> tuple[int, int, int]:
        """Sides of the grid once it is filled up to whole boxes."""
        f, h, w = (count * side for count, side in zip(self.boxes, self.window, strict=True))
        return f, h, w

    def _fill(self, x: Tensor) -> Tensor:
        """[B, N, ...] -> [B, F, H, W, ...], whole boxes, zero where no token stands."""
        x = x.unflatten(1, (self.grid.frames, self.grid.height, self.grid.width))
        if not self.padded:
            return x
        short = [side - have for side, have in zip(self._sides(), x.shape[1:4], strict=True)]
        return F.pad(x, (0, 0) * (x.dim() - 4) + (0, short[2], 0, short[1], 0, short[0]))

    def _roll(self, x: Tensor) -> Tensor:
        return x.roll([-step for step in self._steps()], (1, 2, 3)) if any(self._steps()) else x

    def _order(self, device: torch.device) -> Tensor:
        """Return where in the filled grid the place stands that is next in the boxes, [G * M]."""
        places = torch.arange(self.groups * self.length, device=device).reshape(1, *self._sides())
        return self._beside(self._cut(self._roll(places))).flatten()

    def _cut(self, x: Tensor) -> Tensor:
        for axis in range(3):
            x = x.unflatten(1 + 2 * axis, (self.boxes[axis], self.window[axis]))
        return x

    @staticmethod
    def _beside(lattice: Tensor) -> Tensor:
        """[B, boxes, places, boxes, places, boxes, places, ...] -> [B, boxes x 3, places x 3, ...], a view."""
        return lattice.permute(0, 1, 3, 5, 2, 4, 6, *range(7, lattice.dim()))


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """[B, P, ...] -> the same with the rows of each sample in this order [P]."""
    if len(x) > 1:
        order = (order + len(order) * torch.arange(len(x), device=x.device)[:, None]).flatten()
    return x.flatten(0, 1).index_select(0, order).reshape(x.shape)


def heard(mask: Tensor | None, batch: int) -> Tensor | None:
    """Turn the mask of a partition, [G, 1 or M, M], into one for `attend`, [B * G, 1, 1 or M, M].

    A place that may hear nobody (all of its group is empty) hears everybody: its answer is dropped, and must not be NaN.
    """
    if mask is None:
        return None
    mask = mask | ~mask.any(dim=-1, keepdim=True)
    return mask.repeat(batch, 1, 1).unsqueeze(1)


def window_mask(
    window: Window, batch: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor | None:
    """Return who hears whom in the windows, [B * G, 1, 1 or M, M], or None for all.

    True where a key is heard; but on a CPU, whose attention would turn the mask of shifted windows into numbers in every
    call, the numbers of this `dtype` to add to the scores. The last such mask is kept, unless it is over 64 MB.
    """
    global _kept
    if device.type != "cpu" or not window.shifted or torch.compiler.is_compiling():
        return heard(window.mask(device), batch)
    key = (window, batch, dtype)
    kept = _kept  # read once: other threads may put another in its place
    if kept is not None and kept[0] == key:
        return kept[1]
    with torch.inference_mode(False):  # what inference made could not be used in training
        near = heard(window.mask(device), batch)
        if near is None or near.shape[2] == 1:
            return near
        added = torch.zeros(near.shape, dtype=dtype, device=device).masked_fill_(~near, -torch.inf)
    if added.nbytes <= _KEPT_BYTES and type(added) is Tensor:  # not a stand-in of a tracer
        _kept = (key, added)
    return added


_KEPT_BYTES = 2**26
_kept: tuple[tuple[Window, int, torch.dtype], Tensor] | None = None
