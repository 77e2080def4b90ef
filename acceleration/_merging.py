"""Merging tokens as a linear map: which tokens of a window stand for the others, and the way there and back.

Paper: ToMA: Token Merge with Attention for Diffusion Models; 2025; arXiv:2509.10918. Token Merging for Fast Stable
    Diffusion; Bolya, Hoffman; 2023; arXiv:2303.17604.
Differs: windows are squares of the picture wherever its sides can be told; tokens that fill no window stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dit.grid import Grid

_SHARPNESS = (
    100.0  # of the softmax over cosines: nearly the nearest destination alone, as blurring costs quality
)


@dataclass(frozen=True, slots=True)
class Windows:
    """N tokens cut into W windows of w neighbours: `order` [W * w], the `rest` [R], and the way back `inverse` [N]."""

    size: int
    order: Tensor
    rest: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, grid: Grid | None, tokens: int, size: int, device: torch.device) -> Windows:
        """Cut squares of `size` tokens out of each frame; without a grid, stretches of the sequence."""
        size = min(size, tokens)
        if grid is None or grid.tokens != tokens:
            path = torch.arange(tokens)
        else:
            side = max(1, round(size**0.5))
            frame, row, column = grid.positions().unbind(-1)
            across = -(-grid.width // side)
            tile = (frame * -(-grid.height // side) + row // side) * across + column // side
            path = tile.argsort(stable=True)
        whole = tokens // size * size
        return cls(size, *(one.to(device) for one in (path[:whole], path[whole:], path.argsort())))

    def cut(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, W, w, C], without the rest."""
        return x[:, self.order].unflatten(1, (-1, self.size))


@dataclass(frozen=True, slots=True)
class Plan:
    """Which tokens go on, `kept` [B, M] (destinations by window, then the rest), and what each takes of them.

    `share` [B, W, w, n] is the part of every token of a window that its n destinations answer for; its rows add up to 1.
    `step` is when it was made.
    """

    windows: Windows
    kept: Tensor
    share: Tensor
    step: int

    @property
    def bytes(self) -> int:
        """Size of what is stored."""
        return sum(one.numel() * one.element_size() for one in (self.kept, self.share))

    def pick(self, x: Tensor) -> Tensor:
        """[B, K, N, d] -> [B, K, M, d]: the kept tokens as they are, with their own rotary positions."""
        index = self.kept[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, index)

    def mean(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """[B, N, C] -> [B, M, C]: the mean of the tokens that a kept one stands for, those in `valid` [B, N] only."""
        share = self._valid_share(valid)
        share = share / share.sum(2, keepdim=True).clamp_min(1e-6)
        merged = (share.to(x.dtype).transpose(2, 3) @ self.windows.cut(x)).flatten(1, 2)
        return torch.cat([merged, x[:, self.windows.rest]], 1) if len(self.windows.rest) else merged

    def counts(self, valid: Tensor | None = None) -> Tensor:
        """Return how many tokens each kept one stands for [B, M]; parts of tokens count as such."""
        merged = self._valid_share(valid).float().sum(2).flatten(1)
        rest = torch.ones(len(merged), len(self.windows.rest), device=merged.device)
        if valid is not None:
            rest = valid[:, self.windows.rest].float()
        return torch.cat([merged, rest], 1)

    def spread(self, y: Tensor) -> Tensor:
        """[B, M, C] -> [B, N, C]: give every token its share of what the kept ones have become."""
        _, count, _, chosen = self.share.shape
        windows = y[:, : count * chosen].unflatten(1, (count, chosen))
        spread = (self.share.to(y.dtype) @ windows).flatten(1, 2)
        return torch.cat([spread, y[:, count * chosen :]], 1)[:, self.windows.inverse]

    def _valid_share(self, valid: Tensor | None) -> Tensor:
        return (
            self.share
            if valid is None
            else self.share * self.windows.cut(valid[..., None]).to(self.share.dtype)
        )


@torch.no_grad()
def plan(x: Tensor, windows: Windows, count: int, step: int = 0) -> Plan:
    """Choose `count` destinations in every window by the features x [B, N, C], and what they take of the others."""
    features = F.normalize(windows.cut(x).float(), dim=-1)
    similarity = features @ features.transpose(-1, -2)  # [B, W, w, w]
    chosen = destinations(similarity, count)  # [B, W, n]
    across = chosen[:, :, None, :].expand(-1, -1, windows.size, -1)
    share = torch.softmax(similarity.gather(3, across) * _SHARPNESS, dim=-1)
    own = (
        F.one_hot(torch.arange(count, device=x.device), count)
        .to(share.dtype)
        .expand(*chosen.shape[:2], -1, -1)
    )
    share.scatter_(
        2, chosen[..., None].expand(-1, -1, -1, count), own
    )  # a destination answers for itself alone
    starts = torch.arange(chosen.shape[1], device=x.device)[:, None] * windows.size
    kept = windows.order[(chosen + starts).flatten(1)]
    rest = windows.rest.expand(len(kept), -1)
    return Plan(windows, torch.cat([kept, rest], 1), share.to(x.dtype), step)


def destinations(similarity: Tensor, count: int) -> Tensor:
    """Choose `count` tokens [.., n], in rising order, such that every token [.., w, w] is near to one of them.

    Greedily: each choice adds most to the sum over all tokens of the similarity to their nearest chosen one.
    """
    best = torch.full(similarity.shape[:-1], -1.0, device=similarity.device)
    taken = torch.zeros_like(best, dtype=torch.bool)
    for _ in range(count):
        gain = (similarity - best[..., None, :]).clamp_min_(0).sum(-1).masked_fill_(taken, -1.0)
        found = gain.argmax(-1, keepdim=True)
        taken.scatter_(-1, found, True)
        row = similarity.gather(-2, found[..., None].expand(*found.shape, similarity.shape[-1]))[..., 0, :]
        best = torch.maximum(best, row)
    return taken.nonzero()[:, -1].view(*similarity.shape[:-2], count)


def destinations_reference(similarity: Tensor, count: int) -> list[int]:
    """Choose as `destinations` does for one window [w, w], candidate by candidate."""
    table, chosen = similarity.tolist(), list[int]()
    nearest = [-1.0] * len(table)
    for _ in range(count):
        gains = [
            -1.0 if one in chosen else sum(max(0.0, a - b) for a, b in zip(row, nearest, strict=True))
            for one, row in enumerate(table)
        ]
        chosen.append(gains.index(max(gains)))
        nearest = [max(a, b) for a, b in zip(table[chosen[-1]], nearest, strict=True)]
    return sorted(chosen)


def grid_of(given: Mapping[str, Any], tokens: int) -> Grid | None:
    """Tell how N `tokens` lie in rows and columns from the arguments of a call, or None."""
    return next((one for one in _guesses(given, tokens) if one.tokens == tokens), None)


def _guesses(given: Mapping[str, Any], tokens: int) -> Iterator[Grid]:
    sides = [given.get(name) for name in ("num_frames", "height", "width")]
    if all(isinstance(one, int) for one in sides[1:]):
        yield Grid(*(one if isinstance(one, int) else 1 for one in sides))
    shapes = given.get("img_shapes")
    while isinstance(shapes, list | tuple) and shapes and isinstance(shapes[0], list | tuple):
        shapes = shapes[0]
    if isinstance(shapes, list | tuple) and len(shapes) == 3:
        yield Grid(*shapes)
    ids = given.get("img_ids")
    if isinstance(ids, Tensor) and ids.shape[-1] >= 3:
        yield Grid(1, *(int(one) + 1 for one in ids.reshape(-1, ids.shape[-1])[:, 1:3].amax(0)))
    flat = [one for value in given.values() for one in (value if isinstance(value, list) else [value])]
    pictures = [
        one for one in flat if isinstance(one, Tensor) and one.ndim in (4, 5) and one.is_floating_point()
    ]
    for x in pictures[:1]:
        middle = x.shape[1:-2] if x.ndim == 5 else (1,)
        for cut in (1, 2, 4):  # frames, then rows and columns, of a patch
            for side in (1, 2, 4, 8):
                rows, columns = x.shape[-2] // side, x.shape[-1] // side
                frames = tokens // max(1, rows * columns)
                if any(frames == max(1, one // cut) for one in middle):
                    yield Grid(frames, rows, columns)
