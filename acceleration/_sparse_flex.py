"""Block-sparse attention by PyTorch's FlexAttention: the portable kernel for devices without Triton kernels of our own.

Paper: Flex Attention: A Programming Model for Generating Optimized Attention Kernels; Dong et al.; 2024; arXiv:2412.05496.
Differs: index tensors have one fixed width whatever the density, so another mask never compiles anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from acceleration._sparse import index_lists


def flex_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    rows: int,
    block: int,
    *,
    keys: Tensor | None = None,
    scale: float | None = None,
    compiled: bool = True,
) -> Tensor:
    """Softmax attention over the kept tiles [B, K, P, Q] -> [B, K, N, head size].

    Uncompiled it computes all scores; that is for tests.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    counts, lists = index_lists(kept)
    lengths, hears = (q.shape[2], k.shape[2]), _hears(kept, keys, rows, block)
    make: Any = BlockMask.from_kv_blocks
    parts: tuple[Tensor | None, ...]
    if keys is None:  # whole tiles, whose scores need no look at a mask
        parts = (torch.zeros_like(counts), torch.zeros_like(lists), counts, lists)
    else:
        parts = (counts, lists, None, None)
    mask = make(*parts, BLOCK_SIZE=(rows, block), mask_mod=hears, seq_lengths=lengths)
    options: dict[str, Any] = {"BLOCK_M": min(rows, 128), "BLOCK_N": min(block, 64)} if q.is_cuda else {}
    call: Any = _compiled() if compiled else flex_attention
    return call(q, k, v, block_mask=mask, scale=scale, kernel_options=options or None)


def _hears(kept: Tensor, keys: Tensor | None, rows: int, block: int) -> Callable[..., Tensor]:
    """Return the rule for single tokens, which an uncompiled call goes by."""

    def tile(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return kept[b, head, query // rows, key // block]

    if keys is None:
        return tile

    def tile_and_key(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return kept[b, head, query // rows, key // block] & keys[b, key]

    return tile_and_key


@functools.cache
def _compiled() -> Any:
    """Return the compiled call, one for all shapes of a process; torch keeps a graph for each shape."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
