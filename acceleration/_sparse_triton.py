"""Block-sparse attention on CUDA: a forward over index lists with log-sum-exp, and the pass that weighs the tiles.

One program serves one tile of queries of one head and walks along its list of key tiles, with the running maximum of
FlashAttention. The search pass goes through the keys once and writes one number a tile, never the scores.

Paper: FlashAttention-2, Dao 2023, arXiv:2307.08691 (the walk); AdaSpa, Xia et al. 2025, arXiv:2502.21079 (the search).
Differs: any head size up to 256, by filling up to a power of two; keys that may not be heard; exp2 in place of exp.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from acceleration._sparse import index_lists, tiles

_LOG2E = 1.4426950408889634


@triton.jit
def _forward(  # type: ignore[no-untyped-def]  # the arguments are pointers and numbers of a GPU
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, count_ptr, list_ptr, keys_ptr,
    q_b, q_h, q_n, k_b, k_h, k_m, v_b, v_h, v_m, o_b, o_h, o_n, keys_b,
    heads, queries, length, width, factor,
    D: tl.constexpr, E: tl.constexpr, D_FULL: tl.constexpr, E_FULL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALL: tl.constexpr, HAS_KEYS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    n = tile * ROWS + tl.arange(0, ROWS)
    d, e, m = tl.arange(0, D_FULL), tl.arange(0, E_FULL), tl.arange(0, BLOCK)
    rows = n[:, None].to(tl.int64)
    inside = n[:, None] < queries
    q = tl.load(
        q_ptr + b * q_b + h * q_h + rows * q_n + d[None, :], mask=inside & (d[None, :] < D), other=0.0
    )
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, E_FULL), tl.float32)
    row = pair * tl.num_programs(0) + tile
    if ALL:
        count = width
    else:
        count = tl.load(count_ptr + row)
    for place in range(count):
        if ALL:
            number = place
        else:
            number = tl.load(list_ptr + row * width + place)
        key = number * BLOCK + m
        heard = key < length
        columns = key.to(tl.int64)
        k = tl.load(
            k_ptr + b * k_b + h * k_h + columns[None, :] * k_m + d[:, None],
            mask=heard[None, :] & (d[:, None] < D), other=0.0,
        )  # fmt: skip
        v = tl.load(
            v_ptr + b * v_b + h * v_h + columns[:, None] * v_m + e[None, :],
            mask=heard[:, None] & (e[None, :] < E), other=0.0,
        )  # fmt: skip
        if HAS_KEYS:
            heard = heard & (tl.load(keys_ptr + b * keys_b + columns, mask=heard, other=0) != 0)
        if EXACT:
            scores = tl.dot(q, k, input_precision="ieee") * factor
        else:
            scores = tl.dot(q, k) * factor
        scores = tl.where(heard[None, :], scores, float("-inf"))
        above = tl.maximum(top, tl.max(scores, 1))
        held = tl.where(above == float("-inf"), 0.0, above)  # a row that has heard nothing yet
        weights = tl.math.exp2(scores - held[:, None])
        shrink = tl.math.exp2(top - held)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None]
        if EXACT:
            out += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        else:
            out += tl.dot(weights.to(v.dtype), v)
        top = above
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        out_ptr + b * o_b + h * o_h + rows * o_n + e[None, :],
        out.to(out_ptr.dtype.element_ty), mask=inside & (e[None, :] < E),
    )  # fmt: skip
    lse = (top + tl.math.log2(tl.where(total == 0.0, 1.0, total))) * 0.6931471805599453
    tl.store(lse_ptr + pair * queries + n, lse, mask=n < queries)


@triton.jit
def _weigh(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, lse_ptr, mass_ptr, keys_ptr,
    q_b, q_h, q_n, k_b, k_h, k_m, keys_b,
    heads, queries, length, width, factor,
    D: tl.constexpr, D_FULL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_KEYS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // heads, pair % heads
    n = tile * ROWS + tl.arange(0, ROWS)
    d, m = tl.arange(0, D_FULL), tl.arange(0, BLOCK)
    rows = n[:, None].to(tl.int64)
    inside = n[:, None] < queries
    q = tl.load(
        q_ptr + b * q_b + h * q_h + rows * q_n + d[None, :], mask=inside & (d[None, :] < D), other=0.0
    )
    lse = tl.load(lse_ptr + pair * queries + n, mask=n < queries, other=float("inf")) * 1.4426950408889634
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # a query without keys weighs nothing
    for number in range(width):
        key = number * BLOCK + m
        heard = key < length
        columns = key.to(tl.int64)
        k = tl.load(
            k_ptr + b * k_b + h * k_h + columns[None, :] * k_m + d[:, None],
            mask=heard[None, :] & (d[:, None] < D), other=0.0,
        )  # fmt: skip
        if HAS_KEYS:
            heard = heard & (tl.load(keys_ptr + b * keys_b + columns, mask=heard, other=0) != 0)
        if EXACT:
            scores = tl.dot(q, k, input_precision="ieee") * factor
        else:
            scores = tl.dot(q, k) * factor
        weights = tl.where(heard[None, :], tl.math.exp2(scores - lse[:, None]), 0.0)
        mass = tl.sum(tl.sum(weights, 1), 0)
        tl.store(mass_ptr + (pair * tl.num_programs(0) + tile) * width + number, mass)


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor | None,
    rows: int,
    block: int,
    *,
    keys: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the kept tiles [B, K, P, Q], or all of them, and the log-sum-exp [B, K, N] of the queries."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    B, K, N, D = q.shape
    M, E = k.shape[2], v.shape[3]
    P, Q = tiles(N, rows), tiles(M, block)
    counts, lists = (q, q) if kept is None else index_lists(kept)
    # Laid out as [B, N, K, E], which is how transformers go on with it.
    out = torch.empty(B, N, K, E, dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty(B, K, N, dtype=torch.float32, device=q.device)
    heard = q if keys is None else keys.to(torch.uint8).contiguous()
    factor = (D**-0.5 if scale is None else scale) * _LOG2E
    _forward[(P, B * K)](
        q, k, v, out, lse, counts, lists, heard,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], 0 if keys is None else heard.stride(0),
        K, N, M, Q, factor,
        D=D, E=E, D_FULL=_full(D), E_FULL=_full(E), ROWS=rows, BLOCK=block, ALL=kept is None,
        HAS_KEYS=keys is not None, EXACT=q.dtype == torch.float32, **_launch(max(D, E), rows),
    )  # fmt: skip
    return out, lse


def triton_block_mass(
    q: Tensor,
    k: Tensor,
    rows: int,
    block: int,
    *,
    keys: Tensor | None = None,
    scale: float | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the softmax weight of every tile [B, K, P, Q] and the log-sum-exp [B, K, N] it was taken with."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    B, K, N, D = q.shape
    M = k.shape[2]
    P, Q = tiles(N, rows), tiles(M, block)
    if lse is None:
        lse = triton_attention(q, k, k[..., :16], None, rows, block, keys=keys, scale=scale)[1]
    mass = torch.empty(B, K, P, Q, dtype=torch.float32, device=q.device)
    heard = q if keys is None else keys.to(torch.uint8).contiguous()
    factor = (D**-0.5 if scale is None else scale) * _LOG2E
    _weigh[(P, B * K)](
        q, k, lse.contiguous(), mass, heard,
        *q.stride()[:3], *k.stride()[:3], 0 if keys is None else heard.stride(0),
        K, N, M, Q, factor,
        D=D, D_FULL=_full(D), ROWS=rows, BLOCK=block, HAS_KEYS=keys is not None, EXACT=q.dtype == torch.float32,
        **_launch(D, rows),
    )  # fmt: skip
    return mass, lse


def _full(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _launch(size: int, rows: int) -> dict[str, Any]:
    """Return warps and stages that leave room in shared memory for a head of this size."""
    return {"num_warps": 8 if rows >= 128 else 4, "num_stages": 2 if size > 128 else 3}
