"""Attention of a clip of several scenes: caption i and scene i hear each other, and all scenes hear all scenes.

Paper: Mask^2DiT: Dual Mask-based Diffusion Transformer for Multi-Scene Long Video Generation, Qi et al. 2025,
arXiv:2503.19881.
Differs: captions and scenes may each have a length of their own (the released code cuts both into equal parts), padding may
be masked, and no copy of all keys for all scenes at once is made: one scene after another attends.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn

from dit.attention import Attention, attend
from dit.grid import Grid
from dit.mixers.full import FullMixer, Mixer
from dit.model import Context
from dit.seams import asked_by_a_part
from dit.segments import Segments
from dit.spec import knob, spec


@spec("scenes", paper="Mask^2DiT, arXiv:2503.19881")
class Scenes(Mixer):
    """Softmax attention in which a caption is heard by its own scene alone; without captions that is full attention.

    Which tokens belong together a network says in its context; else every caption has `caption` tokens and the scenes are
    equally long.
    """

    caption: int = knob(
        default=0, label="Text tokens of a caption; 0: the whole text is one caption", low=0, unit="tokens"
    )
    qk_norm: bool = knob(default=False, label="RMS-normalise queries and keys per head")

    @property
    def cut_between(self) -> str:
        return "tokens"

    def build(self, width: int, heads: int, *, qk_norm: bool = False, pre_only: bool = False) -> nn.Module:
        return ScenesMixer(width, heads, self.caption, qk_norm=self.qk_norm or qk_norm, pre_only=pre_only)

    def build_joint(
        self, width: int, heads: int, *, qk_norm: bool = False, context_pre_only: bool = False
    ) -> nn.Module:
        options = {"joint": True, "context_pre_only": context_pre_only}
        return ScenesMixer(width, heads, self.caption, qk_norm=self.qk_norm or qk_norm, **options)


def attend_scenes(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, segments: Segments, processor: Any = None
) -> Tensor:
    """Attention within captions and scenes: q [B, L + N, K, head size] over k, v of the same shape -> the shape of q.

    Exact, by two calls a scene; nothing of the size of a mask of all pairs is made. Queries may lack the text (a pre-only
    stream). `mask` [1 or B, 1 or K, 1, L + N] says which keys may be heard at all.

    Raises: ValueError for tensors that are not those of `segments`, or a mask that differs from query to query.
    """
    length, total = segments.length, segments.length + segments.tokens
    asks = q.shape[1] == total
    if k.shape[1] != total or q.shape[1] not in (total, segments.tokens):
        raise ValueError(
            f"scenes: {q.shape[1]} queries and {k.shape[1]} keys are not captions of {segments.text} and scenes of "
            f"{segments.video} tokens"
        )
    if mask is not None and (mask.dim() != 4 or mask.shape[2:] != (1, total)):
        raise ValueError(
            f"scenes: takes a mask of keys [B, 1, 1, {total}], got one of shape {tuple(mask.shape)}"
        )

    def answered(asking: Tensor, *places: tuple[int, int]) -> Tensor:
        keys, values = (torch.cat([one[:, a:b] for a, b in places], dim=1) for one in (k, v))
        heard = None if mask is None else torch.cat([mask[..., a:b] for a, b in places], dim=-1)
        return attend(asking, keys, values, heard, processor=processor)

    before = 0 if asks else length  # tokens that stand among the keys before the first query
    texts, videos = [], []
    for text, video in segments.bounds:
        if asks and text[0] < text[1]:
            texts.append(answered(q[:, text[0] : text[1]], text, video))
        compiling = torch.compiler.is_compiling()  # a compiled graph hides its calls anyway
        with contextlib.nullcontext() if compiling else asked_by_a_part(text[1] - text[0]):
            videos.append(answered(q[:, video[0] - before : video[1] - before], text, (length, total)))
    return torch.cat(texts + videos, dim=1)


def attend_scenes_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, segments: Segments
) -> Tensor:
    """The same by one call with a mask of all pairs: what `attend_scenes` is compared to, O((L + N)^2) memory."""
    pairs = segments.mask(q.device)[k.shape[1] - q.shape[1] :]
    return attend(q, k, v, pairs[None, None] if mask is None else pairs & mask.bool())


class ScenesMixer(FullMixer):
    """The network of `Scenes`; its weights are those of full attention."""

    def __init__(self, width: int, heads: int, caption: int, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.caption = caption

    def told(self, context: Context, hidden_states: Tensor, text: Tensor | None) -> dict[str, Any]:
        """Return what the processor is told of a context: heads, and which captions and scenes there are, if several."""
        told = super().told(context, hidden_states, text)
        length = context.length if text is None else text.shape[1]
        segments = self.segments(context, length if context.share is None else context.share.length)
        if segments is None or segments.scenes == 1:
            return told
        within = functools.partial(attend_scenes, segments=segments)
        return told | {
            "attention": within if context.share is None else context.share.attention(within, segments)
        }

    def segments(self, context: Context, text: int) -> Segments | None:
        """Return which of `text` text tokens belong to which others, or None where all hear all."""
        if context.segments is not None or context.grid is None:
            return context.segments
        return Segments.of(context.grid, text, self.caption)

    def macs_on(self, grid: Grid, text: int = 0) -> int:
        """Return the multiply-accumulates for one sample of `grid` and `text` text tokens, by captions of equal length."""
        segments = Segments.of(grid, text, self.caption)
        tokens = segments.tokens
        whole = Attention.macs(self, tokens, text) if self.joint else Attention.macs(self, tokens + text)
        queries = tokens if self.joint and self.context_pre_only else tokens + text
        unheard = queries * (tokens + text) - segments.pairs
        if self.joint and self.context_pre_only:
            unheard += sum(t * (t + v) for t, v in zip(segments.text, segments.video, strict=True))
        return whole - 2 * unheard * self.inner_dim
