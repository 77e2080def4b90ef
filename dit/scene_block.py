"""The block of Mask2DiT: text and video as one sequence of one set of weights, each with a modulation of its own.

Paper: CogVideoX, Yang et al. 2024, arXiv:2408.06072; Mask^2DiT, Qi et al. 2025, arXiv:2503.19881 (a time for each scene).
Differs: times are kept one a scene until the tokens meet them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit.experts.dense import Experts, routed
from dit.mixers.full import Mixer
from dit.model import Context, register_block
from dit.modulation import ZeroModulation, modulate
from dit.segments import spread


class HeadLayerNorm(nn.LayerNorm):
    """Layer norm of queries or keys, eps 1e-6, computed in its weights' dtype: casting by layers leaves norms in theirs."""

    def __init__(self, size: int) -> None:
        super().__init__(size, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """[..., head size] -> the same, in the dtype that came in."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class ScaledNorm(nn.LayerNorm):
    """Layer norm with or without weights, in the dtype of what comes in: casting by layers leaves norms in theirs."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class SceneBlock(nn.Module):
    """Text and video as one sequence through one attention and one perceptron, shifted, scaled and gated apart."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        hidden: int,
        time_dim: int,
        bias: bool,
        norm_affine: bool,
        norm_eps: float,
        mixer: Mixer,
        experts: Experts,
    ) -> None:
        super().__init__()
        self.norm1 = ScaledNorm(width, norm_eps, norm_affine)
        self.norm2 = ScaledNorm(width, norm_eps, norm_affine)
        self.modulation1 = ZeroModulation(width, 6, inputs=time_dim)
        self.modulation2 = ZeroModulation(width, 6, inputs=time_dim)
        attn: Any = mixer.build(width, heads)
        attn.norm_q, attn.norm_k = HeadLayerNorm(width // heads), HeadLayerNorm(width // heads)
        if not bias:
            attn.use_bias = False
            for one in (attn.to_q, attn.to_k, attn.to_v):
                one.register_parameter("bias", None)
        self.attn = attn
        self.ff = experts.build(width, hidden)
        self.router = experts.router(width, heads, hidden)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, context: Context
    ) -> tuple[Tensor, Tensor]:
        """Video [B, N, D], text [B, L, D], time [B, T] or, one a scene, [B, S, T] -> (text, video)."""
        if temb is not context.emb:
            context = dataclasses.replace(context, emb=temb)
        streams = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
        streams = routed(self.router, self._body, streams, context)
        encoder_hidden_states, hidden_states = streams["encoder_hidden_states"], streams["hidden_states"]
        return encoder_hidden_states, hidden_states

    def _body(self, streams: dict[str, Tensor], context: Context) -> dict[str, Tensor]:
        words, video = streams["encoder_hidden_states"], streams["hidden_states"]
        context = dataclasses.replace(context, length=words.shape[1])
        sizes = (words.shape[1], video.shape[1])
        moving, still = _vectors(self.modulation1(context.emb), context)  # shift, scale, gate [B, 1 or N, D]
        inner = self._modulated(self.norm1, words, still, video, moving)
        attended = self.attn(hidden_states=inner, context=context).split(sizes, dim=1)
        words, video = words + still[2] * attended[0], video + moving[2] * attended[1]
        moving, still = _vectors(self.modulation2(context.emb), context)
        inner = self._modulated(self.norm2, words, still, video, moving)
        context = dataclasses.replace(context, residual=torch.cat([words, video], dim=1))
        added = self.ff(inner, context).split(sizes, dim=1)
        words, video = words + still[2] * added[0], video + moving[2] * added[1]
        return {"hidden_states": video, "encoder_hidden_states": words}

    @staticmethod
    def _modulated(
        norm: nn.Module, words: Tensor, still: Sequence[Tensor], video: Tensor, moving: Sequence[Tensor]
    ) -> Tensor:
        """Text [B, L, D] and video [B, N, D], each with its shift and scale -> [B, L + N, D]."""
        parts = [
            modulate(norm(x), shift, scale) for x, (shift, scale, _) in ((words, still), (video, moving))
        ]
        return torch.cat(parts, dim=1)


def _vectors(found: tuple[Tensor, ...], context: Context) -> tuple[list[Tensor], list[Tensor]]:
    """Deal the vectors of all scenes, three for the video and three for the text, out to the tokens of each."""
    assert context.segments is not None
    video, text = context.segments.video, context.segments.text
    if context.share is not None:
        video, text = context.share.counts(video), context.share.counts(text, text=True)
    return [spread(one, video) for one in found[:3]], [spread(one, text) for one in found[3:]]


register_block(SceneBlock, hidden_states=1, encoder_hidden_states=0)
