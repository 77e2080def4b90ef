"""Attention of one sequence whose tokens lie with several processes: tokens traded for heads, or keys that go round.

Paper: DeepSpeed Ulysses, Jacobs et al. 2023, arXiv:2309.14509; Ring Attention with Blockwise Transformers, Liu et al. 2023,
arXiv:2310.01889; Online normalizer calculation for softmax, Milakov and Gimelshein 2018, arXiv:1805.02867 (the merge).
Differs: parts of any length, text before picture, and attention within scenes; the ring waits for each part before it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dit.segments import Segments

if TYPE_CHECKING:
    from dit.context_parallel import Share

Attends = Callable[..., Tensor]
Span = tuple[int, int]  # first and last + 1
ROWS = 1024  # queries at a time where scores are made one by one


class _Exchange(torch.autograd.Function):
    """All-to-all of a flat tensor; its backward is the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: Sequence[int], received: Sequence[int], group: Any) -> Tensor:
        ctx.way = sent, received, group
        out = x.new_empty(sum(received))
        dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received, group = ctx.way
        return exchange(grads[0], received, sent, group), None, None, None


def exchange(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Any = None) -> Tensor:
    """Send the first `sent[0]` elements of a flat tensor to rank 0, the next to rank 1, ...; return what came, by rank."""
    out: Tensor = _Exchange.apply(x, sent, received, group)  # type: ignore[no-untyped-call]
    return out


def ulysses(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, share: Share, inner: Attends, processor: Any = None
) -> Tensor:  # fmt: skip
    """Attention of this rank's q [B, n, K, head size] over all ranks' k, v: tokens are traded for heads and back.

    `inner` sees the whole sequence in its own order, with a share of the heads, so it may be any attention. `mask` is that of
    the whole sequence. Raises: ValueError where there are fewer heads than ranks.
    """
    heads = share.ranks.split(q.shape[2], 'heads (take "ring" for fewer)')
    asked, rank = share.asks(q), share.ranks.rank
    if mask is not None and mask.shape[1] == q.shape[2] > 1:
        mask = mask.split(heads, dim=1)[rank]
    q = _for_heads(q, asked, heads, share)
    k, v = _for_heads(k, share.text, heads, share), _for_heads(v, share.text, heads, share)
    return _for_tokens(inner(q, k, v, mask, processor=processor), asked, heads, share)


def ring(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, share: Share, segments: Segments | None = None,
    processor: Any = None,
) -> Tensor:  # fmt: skip
    """The same, any count of heads: keys and values go round from rank to rank, and the answers to each part are merged.

    With `segments` each caption and scene asks only what it hears; the backend of a processor is not asked, because few say
    the log-sum-exp of their scores.
    """
    if mask is not None and mask.shape[2] != 1:
        raise ValueError(
            f"context parallelism: a ring takes a mask of keys [B, 1 or K, 1, M], got {tuple(mask.shape)}"
        )
    mine = share.places(share.ranks.rank, text=any(share.asks(q)))
    wholes = heard_spans(segments, share.length + share.tokens)
    asking = [(span, keys) for asked, keys in wholes if (span := _own(asked, mine)) is not None]
    found: list[tuple[Tensor, Tensor] | None] = [None] * len(asking)
    for owner, keys, values in _round(k, v, share):
        there = share.places(owner)
        for i, (span, heard) in enumerate(asking):
            places = [piece for one in heard for piece in _pieces(one, there)]
            if not places:
                continue
            some = None if mask is None else torch.cat([mask[..., a:b] for _, (a, b) in places], dim=-1)
            part = [torch.cat([one[:, a:b] for (a, b), _ in places], dim=1) for one in (keys, values)]
            answer = attend_with_sums(q[:, span[0] : span[1]], part[0], part[1], some)
            known = found[i]
            found[i] = answer if known is None else merged(known, answer)
    order = sorted(zip(asking, found, strict=True), key=lambda one: one[0][0])
    return torch.cat([one[0] for _, one in order if one is not None], dim=1).to(q.dtype)


def heard_spans(segments: Segments | None, total: int) -> list[tuple[Span, list[Span]]]:
    """Return who hears whom in a sequence of `total` tokens: spans of it that ask, and the spans that each hears."""
    if segments is None:
        return [((0, total), [(0, total)])]
    spans: list[tuple[Span, list[Span]]] = []
    for text, video in segments.bounds:
        spans += [(text, [text, video]), (video, [text, (segments.length, total)])]
    return spans


def attend_with_sums(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention [B, N, K, head size] in float32, and the log of the sum of its exponentials [B, N, K, 1].

    A query that hears no key here answers with a sum so small that it has no weight in a merge.
    """
    q, k, v = (one.transpose(1, 2) for one in (q, k, v))  # [B, K, N, head size]
    low = torch.finfo(q.dtype).min / 2
    bias = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, low)
    if q.device.type == "cpu" and not (
        torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    ):
        fast = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, sums = fast(q, k, v, 0.0, False, attn_mask=bias)[:2]
    else:
        pieces = []
        for start in range(0, q.shape[2], ROWS):
            rows = slice(start, start + ROWS)
            some = bias if bias is None or bias.shape[2] == 1 else bias[:, :, rows]
            pieces.append(_by_scores(q[:, :, rows], k, v, some))
        out, sums = (torch.cat(one, dim=2) for one in zip(*pieces, strict=True))
    return out.transpose(1, 2).float(), sums.float().transpose(1, 2).unsqueeze(-1)


def merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Join attention over some keys with attention over others, both with their sums, to attention over all of them."""
    total = torch.logaddexp(one[1], other[1])
    return one[0] * (one[1] - total).exp() + other[0] * (other[1] - total).exp(), total


def _for_heads(x: Tensor, text: Sequence[int], heads: Sequence[int], share: Share) -> Tensor:
    """Own tokens with all heads [B, n, K, head size] -> all tokens, text first, with own heads [B, L + N, k, head size]."""
    batch, _, _, size = x.shape
    mine = heads[share.ranks.rank]
    parts = [part.reshape(-1) for part in x.split(list(heads), dim=2)]
    rows = [words + picture for words, picture in zip(text, share.picture, strict=True)]
    counts = [batch * count * mine * size for count in rows]
    got = exchange(torch.cat(parts), [part.numel() for part in parts], counts, share.ranks.group)
    found = [part.view(batch, -1, mine, size) for part in got.split(counts)]
    words = [part[:, :count] for part, count in zip(found, text, strict=True)]
    pictures = [part[:, count:] for part, count in zip(found, text, strict=True)]
    return torch.cat(words + pictures, dim=1)


def _for_tokens(x: Tensor, text: Sequence[int], heads: Sequence[int], share: Share) -> Tensor:
    """The inverse of `_for_heads`."""
    batch, _, _, size = x.shape
    rank = share.ranks.rank
    words, pictures = x.split([sum(text), share.tokens], dim=1)
    pairs = zip(words.split(list(text), dim=1), pictures.split(list(share.picture), dim=1), strict=True)
    parts = [torch.cat(pair, dim=1).reshape(-1) for pair in pairs]
    mine = text[rank] + share.picture[rank]
    counts = [batch * mine * count * size for count in heads]
    got = exchange(torch.cat(parts), [part.numel() for part in parts], counts, share.ranks.group)
    found = zip(got.split(counts), heads, strict=True)
    return torch.cat([part.view(batch, mine, count, size) for part, count in found], dim=2)


def _round(k: Tensor, v: Tensor, share: Share) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each rank in turn, this one first, and its keys and values [B, m, K, head size]."""
    ranks, (batch, _, heads, size) = share.ranks, k.shape
    rows = [words + picture for words, picture in zip(share.text, share.picture, strict=True)]
    both, rank = torch.stack([k, v]).reshape(-1), ranks.rank
    for turn in range(ranks.size):
        owner = (rank - turn) % ranks.size
        keys, values = both.view(2, batch, rows[owner], heads, size)
        yield owner, keys, values
        if turn < ranks.size - 1:
            sent, received = [0] * ranks.size, [0] * ranks.size
            sent[(rank + 1) % ranks.size] = both.numel()
            received[(rank - 1) % ranks.size] = 2 * batch * rows[(owner - 1) % ranks.size] * heads * size
            both = exchange(both, sent, received, ranks.group)


def _pieces(span: Span, places: Sequence[tuple[Span, int]]) -> list[tuple[Span, Span]]:
    """Return the parts of a span of the whole sequence that a rank has: where they stand there, and in the whole."""
    found = []
    for (start, end), first in places:
        a, b = max(start, span[0]), min(end, span[1])
        if a < b:
            found.append(((a - start + first, b - start + first), (a, b)))
    return found


def _own(span: Span, places: Sequence[tuple[Span, int]]) -> Span | None:
    """Return where the part of a span that a rank has stands there, or None: its text and picture are neighbours."""
    found = [here for here, _ in _pieces(span, places)]
    return (found[0][0], found[-1][1]) if found else None


def _by_scores(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention written out, [B, K, N, head size], with sums [B, K, N]."""
    scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    return scores.softmax(dim=-1) @ v.float(), scores.logsumexp(dim=-1)
