"""The block of VDT, and what it must know of clean tokens.

Paper: VDT: General-purpose Video Diffusion Transformers via Mask Modeling, Lu et al. 2023, arXiv:2305.13311.
Differs: text may be heard between frame and perceptron, by cross-attention without a gate, as in PixArt-alpha.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from dit.cross_attention import CrossAttention
from dit.experts.dense import Experts, routed
from dit.grid import Grid
from dit.layers import PlainNorm
from dit.mixers.full import Mixer
from dit.mixers.spacetime import SpaceTime
from dit.model import Context, register_block
from dit.modulation import Modulation, modulate


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """Which tokens are clean [B, N], and the conditioning that is theirs, [B, D] or shared vectors [B, S]."""

    tokens: Tensor
    temb: Tensor

    def choose(self, modulation: nn.Module, noisy: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the vectors of a modulation for every token, [B, N, D]: two a sample are made, not one a token."""
        clean = modulation(self.temb)
        where = self.tokens.unsqueeze(-1)
        return tuple(torch.where(where, a, b) for a, b in zip(clean, noisy, strict=True))


class VDTBlock(nn.Module):
    """Time, the frame, the text, the perceptron; the frame and the perceptron are shifted, scaled and gated.

    Where the mixer is not `SpaceTime`, it hears the whole clip at once, and nothing comes before it.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        hidden: int,
        text: bool,
        mixer: Mixer,
        experts: Experts,
        modulation: Modulation,
    ) -> None:
        super().__init__()
        self.temporal: nn.Module | None = None
        self.attn: nn.Module
        if isinstance(mixer, SpaceTime):
            self.temporal, self.attn = mixer.build_temporal(width, heads), mixer.build_spatial(width, heads)
        else:
            self.attn = mixer.build(width, heads)
        self.norm1, self.norm2 = PlainNorm(width), PlainNorm(width)
        self.modulation = modulation.build(width, 6)
        self.norm_text = PlainNorm(width) if text else None
        self.text_attn = CrossAttention(width, heads) if text else None
        self.ff = experts.build(width, hidden)
        self.router = experts.router(width, heads, hidden)

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        context: Context,
        given: Given | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Tokens [B, N, D], conditioning of noisy tokens [B, D] or [B, N, D], that of clean ones -> [B, N, D].

        The text is `context.text` [B, L, D], `text_mask` [B, 1, 1, L]; `context.mask` [B, 1, 1, N] says which tokens are heard.
        """
        if given is None and temb is not context.emb:
            context = dataclasses.replace(context, emb=temb)

        def body(streams: dict[str, Tensor], inner: Context) -> dict[str, Tensor]:
            return {"hidden_states": self._body(streams["hidden_states"], temb, inner, given, text_mask)}

        streams = {"hidden_states": hidden_states}
        streams = routed(self.router, body, streams, context)
        hidden_states = streams["hidden_states"]
        return hidden_states  # noqa: RET504 - by this name the seams know which stream it is

    def _body(
        self, x: Tensor, temb: Tensor, context: Context, given: Given | None, text_mask: Tensor | None
    ) -> Tensor:
        vectors = self.modulation(temb)
        if given is not None:
            vectors = given.choose(self.modulation, vectors)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = vectors  # each [B, 1 or N, D]
        if self.temporal is not None:
            x = x + self.temporal(x, context)
        x = x + gate * self.attn(hidden_states=modulate(self.norm1(x), shift, scale), context=context)
        if self.text_attn is not None and self.norm_text is not None:
            x = x + self.text_attn(self.norm_text(x), context.text, text_mask, **context.attention_kwargs)
        inner = modulate(self.norm2(x), shift_ff, scale_ff)
        return x + gate_ff * self.ff(inner, dataclasses.replace(context, residual=x))


def token_times(timestep: Tensor, grid: Grid) -> Tensor:
    """Return times [B], or one a token of the clip [B, N]: [B, F] is spread over frames.

    Raises: ValueError for a count of times that is neither frames nor tokens.
    """
    if timestep.dim() == 1:
        return timestep
    sites, count = grid.height * grid.width, timestep.shape[1]
    if count == grid.frames:
        return timestep.repeat_interleave(sites, dim=1)
    if count != grid.tokens:
        raise ValueError(
            f"timestep: one a clip, a frame or a token ({grid.frames} frames, {grid.tokens} tokens), got {count}"
        )
    return timestep


def each(tokens: Tensor, clean: Tensor, noisy: Tensor) -> Tensor:
    """Choose for every token [B, N] between what is one a clip [B, ...] and what is one a clip or token: [B, N, ...]."""
    where = tokens.reshape(*tokens.shape, *[1] * (clean.dim() - 1))
    return torch.where(where, clean.unsqueeze(1), noisy if noisy.dim() > clean.dim() else noisy.unsqueeze(1))


register_block(VDTBlock, hidden_states=0)
