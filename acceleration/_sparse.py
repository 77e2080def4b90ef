"""Block-sparse attention: which tiles of the score matrix are computed, the plain reference, and the choice of a kernel.

A *tile* is `rows` queries by `block` keys. `kept` [B, K, P, Q] says which of the P x Q tiles are computed. Everything
here takes q [B, K, N, head size], k and v [B, K, M, head size], and `keys` [B, M], True where a key may be heard.

Paper: AdaSpa, Xia et al. 2025, arXiv:2502.21079 (block mass, log-sum-exp kept from an earlier step).
Differs: queries and keys may have tiles of different size: taller tiles let a CPU work nearly as fast as on all keys.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

KERNELS = ("reference", "gathered", "flex", "triton")


def tiles(length: int, size: int) -> int:
    """Return the number of tiles that cover a length; the last may be partly filled."""
    return -(-length // size)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    rows: int,
    block: int,
    *,
    keys: Tensor | None = None,
    scale: float | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Softmax attention over the kept tiles alone -> [B, K, N, head size].

    Raises:
        ValueError: `kept` does not cover the sequence, or the kernel is unknown.
    """
    expected = (*q.shape[:2], tiles(q.shape[2], rows), tiles(k.shape[2], block))
    if tuple(kept.shape) != expected:
        raise ValueError(f"kept must be {expected} for tiles of {rows} x {block}, got {tuple(kept.shape)}")
    k, v = ungrouped(k, q), ungrouped(v, q)
    name = kernel_for(q, rows, block) if kernel == "auto" else kernel
    if name == "reference":
        return sparse_attention_reference(q, k, v, kept, rows, block, keys=keys, scale=scale)
    if name == "gathered":
        from acceleration._sparse_cpu import gathered_attention

        return gathered_attention(q, k, v, kept, rows, block, keys=keys, scale=scale)
    if name == "flex":
        from acceleration._sparse_flex import flex_sparse_attention

        return flex_sparse_attention(q, k, v, kept, rows, block, keys=keys, scale=scale)
    if name == "triton":
        from acceleration._sparse_triton import triton_attention

        return triton_attention(q, k, v, kept, rows, block, keys=keys, scale=scale)[0]
    raise ValueError(f"kernel must be auto or one of {', '.join(KERNELS)}, got {kernel!r}")


def ungrouped(x: Tensor, q: Tensor) -> Tensor:
    """Repeat the heads of keys or values that several heads of queries share -> [B, K, M, head size]."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def kernel_for(q: Tensor, rows: int, block: int) -> str:
    """Return the kernel that suits a device and a tile: Triton on CUDA where it is installed, gathered keys elsewhere."""
    if q.device.type != "cuda" or rows < 16 or block < 16:
        return "gathered"
    fits = q.shape[-1] <= 256 and q.dtype in (torch.float16, torch.bfloat16)
    return "triton" if fits and importlib.util.find_spec("triton") is not None else "flex"


def sparse_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    rows: int,
    block: int,
    *,
    keys: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Masked softmax over all scores, in float32: what every kernel is compared with."""
    heard = tokenwise(kept, rows, block, q.shape[2], k.shape[2])
    if keys is not None:
        heard = heard & keys[:, None, None, :]
    scores = (q.float() @ k.float().transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = torch.softmax(scores.masked_fill(~heard, -torch.inf), dim=-1).nan_to_num(0.0)
    return (weights @ v.float()).to(q.dtype)


def tokenwise(kept: Tensor, rows: int, block: int, queries: int, keys: int) -> Tensor:
    """[B, K, P, Q] tiles -> [B, K, N, M] tokens."""
    return kept.repeat_interleave(rows, dim=2)[:, :, :queries].repeat_interleave(block, dim=3)[..., :keys]


def block_mass(
    q: Tensor,
    k: Tensor,
    rows: int,
    block: int,
    *,
    keys: Tensor | None = None,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the softmax weight in every tile [B, K, P, Q] and the log-sum-exp of every query [B, K, N], in float32.

    With the `lse` of an earlier step, which hardly changes, the pass that finds it is left out.
    """
    k = ungrouped(k, q)
    if kernel_for(q, rows, block) == "triton":
        from acceleration._sparse_triton import triton_block_mass

        return triton_block_mass(q, k, rows, block, keys=keys, scale=scale, lse=lse)
    return _block_mass(q, k, rows, block, keys, q.shape[-1] ** -0.5 if scale is None else scale, lse)


def _block_mass(
    q: Tensor, k: Tensor, rows: int, block: int, keys: Tensor | None, scale: float, lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Go through the queries tile by tile, so that no more than `rows` x M scores exist at a time."""
    B, K, N, _ = q.shape
    M = k.shape[2]
    P, Q = tiles(N, rows), tiles(M, block)
    mass = torch.zeros(B, K, P, Q, device=q.device)
    sums = torch.empty(B, K, N, device=q.device) if lse is None else lse
    padded = torch.zeros(rows, Q * block, device=q.device)
    for b in range(B):
        silent = None if keys is None else ~keys[b]
        for h in range(K):
            columns = k[b, h].float().t()
            for p in range(P):
                span = slice(p * rows, min(N, (p + 1) * rows))
                scores = (q[b, h, span].float() * scale) @ columns
                if silent is not None:
                    scores.masked_fill_(silent, -torch.inf)
                if lse is None:
                    sums[b, h, span] = torch.logsumexp(scores, dim=-1)
                count = scores.shape[0]
                torch.exp(scores - sums[b, h, span, None], out=scores)
                padded[:count, :M] = scores.nan_to_num_(0.0)
                mass[b, h, p] = padded[:count].sum(0).view(Q, block).sum(1)
    return mass, sums


def sampled_recall(
    q: Tensor,
    k: Tensor,
    kept: Tensor,
    rows: int,
    block: int,
    *,
    keys: Tensor | None = None,
    scale: float | None = None,
    samples: int = 64,
) -> Tensor:
    """Return the part of the softmax weight that lies in kept tiles [B, K], over evenly spread queries."""
    N, M = q.shape[2], k.shape[2]
    k = ungrouped(k, q)
    chosen = torch.linspace(0, N - 1, min(samples, N), device=q.device).round().long()
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q[:, :, chosen].float() * factor) @ k.float().transpose(-1, -2)
    if keys is not None:
        scores = scores.masked_fill(~keys[:, None, None, :], -torch.inf)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    weights = F.pad(weights, (0, kept.shape[-1] * block - M)).unflatten(-1, (-1, block)).sum(-1)
    heard = torch.where(kept[:, :, chosen // rows], weights, 0.0).sum((-1, -2))
    return heard / weights.sum((-1, -2)).clamp_min(1e-20)


@dataclass(frozen=True, slots=True)
class Bits:
    """Kept tiles, eight to a byte."""

    data: Tensor
    width: int

    @classmethod
    def of(cls, kept: Tensor) -> Bits:
        """Pack [..., Q] booleans."""
        width = kept.shape[-1]
        eights = F.pad(kept.to(torch.uint8), (0, -width % 8)).unflatten(-1, (-1, 8))
        return cls((eights << _places(kept)).sum(-1, dtype=torch.uint8), width)

    def tiles(self) -> Tensor:
        """Return the booleans [..., Q]."""
        return ((self.data[..., None] >> _places(self.data)) & 1).bool().flatten(-2)[..., : self.width]

    @property
    def bytes(self) -> int:
        return self.data.numel()


def _places(near: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=near.device)


def index_lists(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of kept tiles [B, K, P] and their places [B, K, P, Q] in rising order (int32, fixed width)."""
    Q = kept.shape[-1]
    places = torch.where(kept, kept.cumsum(-1) - 1, Q)
    lists = torch.zeros(*kept.shape[:-1], Q + 1, dtype=torch.int32, device=kept.device)
    numbers = torch.arange(Q, dtype=torch.int32, device=kept.device).expand_as(kept)
    lists.scatter_(-1, places, numbers)
    return kept.sum(-1, dtype=torch.int32), lists[..., :Q].contiguous()
