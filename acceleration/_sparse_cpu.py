"""Block-sparse attention by gathered keys: dense products on small copies, which stay in a core's cache.

Differs: no kernel of its own. Copying the kept keys costs little beside the products of tall tiles, and plain matrix
products are as fast as a CPU gets; it works on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from acceleration._sparse import tiles

_SCORES = (
    1 << 19
)  # scores that fit into a core's own cache, beside the keys; beyond, torch's streaming attention is faster


def gathered_attention(
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
    """Softmax attention over the kept tiles [B, K, P, Q] -> [B, K, N, head size]."""
    B, K, N, D = q.shape
    M, E, Q = k.shape[2], v.shape[3], tiles(k.shape[2], block)
    factor = D**-0.5 if scale is None else scale
    out = q.new_empty(B, K, N, E)
    own_keys, own_values = k.new_zeros(Q, block * D), v.new_zeros(Q, block * E)
    bias = _bias(keys, Q * block, q.dtype)
    for b in range(B):
        heard = None if bias is None else bias[b]
        for h in range(K):
            own_keys.view(-1, D)[:M], own_values.view(-1, E)[:M] = k[b, h], v[b, h]
            head = _Head(q[b, h], own_keys, own_values, heard, M, rows, block, factor)
            head.attend(kept[b, h], out[b, h])
    return out


def _bias(keys: Tensor | None, width: int, dtype: torch.dtype) -> Tensor | None:
    """Return what is added to scores [B, width]: 0, or minus infinity for keys that may not be heard."""
    if keys is None or bool(keys.all()):
        return None
    bias = torch.zeros(keys.shape[0], width, dtype=dtype, device=keys.device)
    bias[:, : keys.shape[1]].masked_fill_(~keys, -torch.inf)
    return bias


class _Head:
    """One head of one sample: its queries [N, D], and its keys and values by tile, the last filled up with zeros."""

    def __init__(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None,
        count: int,
        rows: int,
        block: int,
        factor: float,
    ) -> None:
        self.q, self.keys, self.values, self.bias = q, keys, values, bias
        self.count, self.rows, self.block, self.factor = count, rows, block, factor
        self.spare = keys.shape[0] * block - count  # zeros at the end of the last tile

    def attend(self, kept: Tensor, out: Tensor) -> None:
        """Fill `out` [N, E] for the kept tiles [P, Q]."""
        numbers = kept.sum(-1).tolist()
        lists = kept.nonzero()[:, 1].split(numbers)
        whole = kept.shape[-1]
        place = 0
        while place < len(numbers):
            following = place + 1
            if numbers[place] == whole:  # neighbours that hear everything go together, and nothing is copied
                while following < len(numbers) and numbers[following] == whole:
                    following += 1
                span = slice(place * self.rows, following * self.rows)
                out[span] = self._all(self.q[span])
            else:
                span = slice(place * self.rows, following * self.rows)
                self._some(self.q[span], lists[place], out[span])
            place = following

    def _all(self, q: Tensor) -> Tensor:
        count = self.count
        keys, values = (
            self.keys.view(-1, q.shape[-1])[:count],
            self.values.view(count + self.spare, -1)[:count],
        )
        return self._stream(q, keys, values, None if self.bias is None else self.bias[:count])

    def _some(self, q: Tensor, places: Tensor, out: Tensor) -> None:
        if not len(places):
            out.zero_()
            return
        length = len(places) * self.block
        if int(places[-1]) == self.keys.shape[0] - 1:
            length -= self.spare
        keys = self.keys.index_select(0, places).view(-1, q.shape[-1])[:length]
        values = self.values.index_select(0, places).view(len(places) * self.block, -1)[:length]
        bias = None if self.bias is None else self.bias.view(-1, self.block)[places].flatten()[:length]
        if q.dtype != torch.float32 or bias is not None or q.shape[0] * length > _SCORES:
            out.copy_(self._stream(q, keys, values, bias))
            return
        scores = (q * self.factor) @ keys.t()
        torch.softmax(scores, -1, out=scores)
        torch.mm(scores, values, out=out)

    def _stream(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        mask = None if bias is None else bias.expand(1, 1, q.shape[0], -1)
        found = F.scaled_dot_product_attention(
            q[None, None], keys[None, None], values[None, None], mask, scale=self.factor
        )
        return found[0, 0]
