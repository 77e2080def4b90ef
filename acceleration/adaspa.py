"""AdaSpa: find out which tiles of the attention carry its weight, and compute only those for many steps.

Paper: Training-free and Adaptive Sparse Attention for Efficient Long Video Generation; Xia, Ling, Fu, Wang, Li,
    Xiao, Cui; 2025; arXiv:2502.21079.
Differs: tiles may be taller than wide; where the kept tiles hold too little of the weight, the layer gets more of them
    or stays dense; the first layer stays dense; masks are kept for each guidance branch, as bits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from acceleration._attending import FULL, Layer, Sight, Thinning, effect, refuses, untouched
from acceleration._sparse import Bits, block_mass
from acceleration.base import Accelerator, Run
from dit.spec import knob, spec


@spec("adaspa", paper="AdaSpa, arXiv:2502.21079")
class AdaSpa(Accelerator):
    """Compute only the tiles of attention that carried most of the weight when it was last looked at."""

    seam: ClassVar[str] = "which keys a query hears"

    density: float = knob(
        default=0.2, label="Part of the tiles that is computed", low=0.01, high=1.0, step=0.01
    )
    warmup: float = knob(
        default=0.2, label="Dense part of the steps, at the start", low=0.0, high=1.0, step=0.05
    )
    search_again: float | None = knob(
        default=0.6,
        label="When the tiles are looked for once more (part of the steps)",
        low=0.0,
        high=1.0,
        step=0.05,
    )
    adaptive: bool = knob(default=True, label="Give more tiles to heads that hold less of the weight")
    head_recall: float = knob(
        default=0.8, label="Recall above which a head may give tiles away", low=0.0, high=1.0, step=0.05
    )
    guard: float = knob(
        default=0.7, label="Recall below which a layer gets more tiles", low=0.0, high=1.0, step=0.05
    )
    guard_goal: float = knob(
        default=0.9, label="Recall that such a layer is given", low=0.0, high=1.0, step=0.05
    )
    rows: int = knob(
        default=128, label="Queries of a tile", choices=(4, 8, 16, 32, 64, 128, 256), unit="tokens"
    )
    block: int = knob(default=64, label="Keys of a tile", choices=(4, 8, 16, 32, 64, 128), unit="tokens")
    dense_layers: int = knob(default=1, label="First layers that stay dense", low=0, high=999)
    min_tokens: int = knob(default=8192, label="Shortest sequence that is thinned out", low=2, unit="tokens")
    measure: bool = knob(default=True, label="Time it once, and stay dense where sparse is slower")

    def check(self) -> None:
        """Raises: ValueError if the recall that is aimed at lies below the one that calls for it."""
        if self.guard_goal < self.guard:
            raise ValueError(
                f"{self.name}: guard_goal must be at least guard ({self.guard}), got {self.guard_goal}"
            )

    @property
    def neutral(self) -> bool:
        """Whether all tiles are computed."""
        return self.density == 1.0 or self.warmup == 1.0

    def refuses(self, transformer: nn.Module) -> str | None:
        return refuses(transformer)

    def attached(self, transformer: nn.Module, run: Run) -> AbstractContextManager[None]:
        return Thinning(self, run, self._choose).attached(transformer)

    def effect(self, run: Run) -> str:
        return effect(self.name, run)

    def untouched(self, run: Run) -> str | None:
        return untouched(self, run)

    def hopeless(self, run: Run) -> str | None:
        return self.untouched(run)

    def _choose(self, sight: Sight, layer: Layer) -> Tensor | None:
        again = None if self.search_again is None else round(self.search_again * sight.steps)
        if layer.step < 0 or (again is not None and layer.step < again <= sight.step):
            self._search(sight, layer)
        return None if layer.mask is None else layer.mask.tiles()

    def _search(self, sight: Sight, layer: Layer) -> None:
        call = sight.call
        mass, layer.lse = block_mass(
            call.q, call.k, self.rows, self.block, keys=sight.keys, scale=call.scale, lse=layer.lse
        )
        found = self.chosen(mass, *sight.forced(self.rows, self.block))
        layer.step, layer.dense = sight.step, None
        sight.row.weigh(found.recall)
        if found.density >= FULL:
            low = "its recall is too low at any density worth it"
            layer.mask, layer.density = None, 1.0
            layer.dense = sight.full(self.rows, self.block) or low
        else:
            layer.mask, layer.density = Bits.of(found.kept), found.density

    def chosen(self, mass: Tensor, queries: Tensor, columns: Tensor) -> Chosen:
        """Choose the tiles with the most mass [B, K, P, Q]: equally many in every row of a head.

        `queries` [P] and `columns` [Q] are kept in any case.
        """
        B, K, _, Q = mass.shape
        curves = torch.stack(
            [torch.stack([_curve(mass[b, h], queries, columns) for h in range(K)]) for b in range(B)]
        )  # [B, K, Q]: the recall with 1, 2, ... tiles in a row
        least = min(Q, int(columns.sum()) + 1)
        counts = torch.full((B, K), max(least, round(self.density * Q)))
        if self.adaptive:
            counts = self._shifted(curves, counts, least)
        recall = curves.gather(2, counts.to(curves.device)[..., None] - 1)[..., 0]
        for b in range(B):
            if float(recall[b].mean()) < self.guard:
                enough = (curves[b].mean(0) >= self.guard_goal).nonzero()
                number = int(enough[0]) + 1 if len(enough) else Q
                counts[b] = counts[b].clamp_min(number)
        recall = curves.gather(2, counts.to(curves.device)[..., None] - 1)[..., 0]
        kept = torch.stack(
            [
                torch.stack([_best(mass[b, h], queries, columns, int(counts[b, h])) for h in range(K)])
                for b in range(B)
            ]
        )
        return Chosen(kept, recall, float(kept.float().mean()))

    def _shifted(self, curves: Tensor, counts: Tensor, least: int) -> Tensor:
        """Move tiles from the heads that hold most of the weight to as many of those that hold least."""
        B, K, Q = curves.shape
        shift = min(self.density / 2, 1 - self.density)
        fewer, more = (max(least, min(Q, round((self.density + sign * shift) * Q))) for sign in (-1, 1))
        for b in range(B):
            recall = curves[b].gather(1, counts[b].to(curves.device)[:, None] - 1)[:, 0]
            rich = min(K // 2, int((recall > self.head_recall).sum()))
            order = recall.argsort(descending=True, stable=True).tolist()
            for head in order[:rich]:
                counts[b, head] = fewer
            for head in order[K - rich :]:
                counts[b, head] = more
        return counts


@dataclass(frozen=True, slots=True)
class Chosen:
    """Kept tiles [B, K, P, Q], the part of the softmax weight they hold [B, K], and how many of all they are."""

    kept: Tensor
    recall: Tensor
    density: float


def _ranked(mass: Tensor, columns: Tensor) -> Tensor:
    return mass.masked_fill(columns, torch.inf).argsort(dim=-1, descending=True, stable=True)


def _curve(mass: Tensor, queries: Tensor, columns: Tensor) -> Tensor:
    """Return the recall of one head [Q] with 1, 2, ... tiles in each row."""
    held = mass.gather(-1, _ranked(mass, columns)).cumsum(-1)
    held[queries] = mass.sum(-1, keepdim=True)[queries]
    return held.sum(0) / mass.sum().clamp_min(1e-20)


def _best(mass: Tensor, queries: Tensor, columns: Tensor, count: int) -> Tensor:
    kept = torch.zeros_like(mass, dtype=torch.bool)
    kept.scatter_(-1, _ranked(mass, columns)[:, :count], True)
    kept[queries] = True
    return kept
