"""XAttention: weigh the tiles of the attention by strided antidiagonals, anew in every call, and keep the heaviest.

Paper: XAttention: Block Sparse Attention with Antidiagonal Scoring; Xu, Xiao, Huang, Guo, Han; 2025; arXiv:2503.16428.
Differs: text is always kept and keys that may not be heard never count; the true recall is measured on 64 queries.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acceleration._attending import FULL, Layer, Sight, Thinning, effect, refuses, untouched
from acceleration._sparse import sampled_recall, tiles, ungrouped
from acceleration.base import Accelerator, Run
from dit.spec import knob, spec


@spec("xattention", paper="XAttention, arXiv:2503.16428")
class XAttention(Accelerator):
    """Compute the fewest tiles of attention whose estimated weight reaches a threshold, row by row."""

    seam: ClassVar[str] = "which keys a query hears"

    threshold: float = knob(default=0.9, label="Estimated weight to keep", low=0.05, high=1.0, step=0.01)
    stride: int = knob(default=8, label="Distance of the antidiagonals", choices=(2, 4, 8, 16), unit="tokens")
    warmup: float = knob(
        default=0.2, label="Dense part of the steps, at the start", low=0.0, high=1.0, step=0.05
    )
    rows: int = knob(default=128, label="Queries of a tile", choices=(16, 32, 64, 128, 256), unit="tokens")
    block: int = knob(default=128, label="Keys of a tile", choices=(16, 32, 64, 128), unit="tokens")
    dense_layers: int = knob(default=1, label="First layers that stay dense", low=0, high=999)
    min_tokens: int = knob(default=8192, label="Shortest sequence that is thinned out", low=2, unit="tokens")
    measure: bool = knob(default=True, label="Time it once, and stay dense where sparse is slower")

    @property
    def neutral(self) -> bool:
        """Whether all tiles are computed."""
        return self.threshold == 1.0 or self.warmup == 1.0

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
        call = sight.call
        q, k = call.q, ungrouped(call.k, call.q)
        mass = antidiagonal_mass(q, k, self.rows, self.block, self.stride, keys=sight.keys, scale=call.scale)
        kept = heaviest(mass, self.threshold, *sight.forced(self.rows, self.block))
        layer.density, layer.dense = float(kept.float().mean()), None
        if layer.step < 0:  # the truth costs as much as 64 dense queries: once for each layer and branch
            sight.row.weigh(
                sampled_recall(q, k, kept, self.rows, self.block, keys=sight.keys, scale=call.scale)
            )
        layer.step = sight.step
        if layer.density >= FULL:
            layer.dense = sight.full(self.rows, self.block) or "its recall needs nearly all tiles"
            return None
        return kept


def antidiagonal_mass(
    q: Tensor,
    k: Tensor,
    rows: int,
    block: int,
    stride: int,
    *,
    keys: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Estimate the softmax weight in every tile [B, K, P, Q] from one antidiagonal in `stride`.

    Each `stride` neighbouring keys are laid side by side, and so are queries in reverse: one product of a row and a
    column of the folded [N / stride, stride * head size] sums an antidiagonal of scores.
    """
    B, K, N, D = q.shape
    P, Q = tiles(N, rows), tiles(k.shape[2], block)
    factor = (D**-0.5 if scale is None else scale) / stride
    heard = torch.ones(B, k.shape[2], dtype=torch.bool, device=q.device) if keys is None else keys
    heard = F.pad(heard, (0, Q * block - k.shape[2])).unflatten(1, (-1, stride)).any(-1)
    silent = F.pad(k, (0, 0, 0, Q * block - k.shape[2]))
    if keys is not None:
        silent = silent * F.pad(keys, (0, Q * block - k.shape[2]))[:, None, :, None]
    folded_k = silent.unflatten(2, (-1, stride)).flatten(3).float()
    folded_q = F.pad(q, (0, 0, 0, P * rows - N)).unflatten(2, (-1, stride)).flip(3).flatten(3).float()
    asks = torch.arange(P * rows // stride, device=q.device) * stride < N
    mass = torch.empty(B, K, P, Q, device=q.device)
    for b in range(B):
        for h in range(K):
            scores = (folded_q[b, h] * factor) @ folded_k[b, h].t()
            weights = torch.softmax(scores.masked_fill_(~heard[b], -torch.inf), dim=-1) * asks[:, None]
            mass[b, h] = weights.view(P, rows // stride, Q, block // stride).sum((1, 3))
    return mass


def heaviest(mass: Tensor, threshold: float, queries: Tensor, columns: Tensor) -> Tensor:
    """Keep in every row [Q] of the mass the fewest tiles that hold `threshold` of it, beside `queries` and `columns`."""
    share = mass / mass.sum(-1, keepdim=True).clamp_min(1e-20)
    found = share.masked_fill(columns, torch.inf).sort(dim=-1, descending=True, stable=True)
    ordered = share.gather(-1, found.indices)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, found.indices, before < threshold)
    kept |= columns
    kept[:, :, queries] = True
    return kept
