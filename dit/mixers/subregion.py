"""Alternating subregion attention: in turn, all tokens hear each other, or four interleaved groups hear themselves.

Paper: E-MMDiT, Shen et al. 2025, arXiv:2510.27135.
Differs: any count of tokens is taken (padded and masked; the released code needs multiples of 16); text masks and rotary
positions are split along with their tokens.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from dit.embeddings import Rotary
from dit.mixers.full import FullMixer, Mixer, keys_of, within
from dit.model import Context
from dit.partition import Interleave, Partition, heard
from dit.spec import knob, spec

_TURN = re.compile(r"([1-9]\d*)/([1-9]\d*)")


@spec("subregion", paper="E-MMDiT, arXiv:2510.27135")
class Subregion(Mixer):
    """Softmax attention within interleaved groups of image and text tokens; the pattern changes from block to block."""

    pattern: str = knob("1/1 4/1 4/4", "Groups / chunk of each block in turn")
    qk_norm: bool = knob(False, "RMS-normalise queries and keys per head")

    def check(self) -> None:
        turns = self.pattern.split()
        if not turns or not all(_TURN.fullmatch(one) for one in turns):
            raise ValueError(
                f"subregion: pattern is a list of groups/chunk, both at least 1, such as '1/1 4/1 4/4', got {self.pattern!r}"
            )

    def at(self, block: int) -> Subregion:
        turns = self.pattern.split()
        return self.replace(pattern=turns[block % len(turns)])

    def build(self, width: int, heads: int, *, qk_norm: bool = False, pre_only: bool = False) -> nn.Module:
        return SubregionMixer(width, heads, *self._turn(), qk_norm=self.qk_norm or qk_norm, pre_only=pre_only)

    def build_joint(
        self, width: int, heads: int, *, qk_norm: bool = False, context_pre_only: bool = False
    ) -> nn.Module:
        return SubregionMixer(
            width,
            heads,
            *self._turn(),
            qk_norm=self.qk_norm or qk_norm,
            joint=True,
            context_pre_only=context_pre_only,
        )

    def _turn(self) -> tuple[int, int]:
        groups, chunk = self.pattern.split()[0].split("/")
        return int(groups), int(chunk)


class SubregionMixer(FullMixer):
    """The network of `Subregion` in one block; its weights are those of full attention."""

    def __init__(self, width: int, heads: int, groups: int, chunk: int, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.groups, self.chunk = groups, chunk

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        context: Context | None = None,
        **kwargs: Any,
    ) -> Any:
        """[B, N, D] -> [B, N, D], or image and text -> (image, text)."""
        about = context
        if about is None:
            about = Context(None, hidden_states, rotary=image_rotary_emb, mask=attention_mask)
        if self.groups == 1:
            return super().forward(hidden_states, encoder_hidden_states, context=about, **kwargs)
        if encoder_hidden_states is not None:
            words, image = encoder_hidden_states, hidden_states
        else:
            words, image = hidden_states[:, : about.length], hidden_states[:, about.length :]
        cuts = [Interleave(one.shape[1], self.groups, self.chunk) for one in (words, image) if one.shape[1]]
        rotary = None if about.rotary is None else _spread_rotary(about.rotary, cuts, len(image))
        mask = _keys(about.mask, cuts, image)
        inner = within(about, image, cuts[-1].spread, rotary=rotary, mask=mask)
        if encoder_hidden_states is None:
            return _join(super().forward(_split(hidden_states, cuts), context=inner, **kwargs), cuts)
        out = super().forward(cuts[-1].split(image), cuts[0].split(words), context=inner, **kwargs)
        return cuts[-1].join(out) if self.context_pre_only else (cuts[-1].join(out[0]), cuts[0].join(out[1]))

    def macs(self, rows: int, text: int = 0) -> int:
        """Return the multiply-accumulates for `rows` tokens and, in joint attention, `text` text tokens."""
        places = [Interleave(one, self.groups, self.chunk).length if one else 0 for one in (rows, text)]
        return self.groups * super().macs(*places)


def _split(x: Tensor, cuts: list[Partition] | list[Interleave]) -> Tensor:
    """Cut a sequence of several kinds of tokens, each kind by its own partition: [B, T, ...] -> [B * G, M, ...]."""
    pieces = x.split([cut.tokens for cut in cuts], dim=1)
    return torch.cat([cut.split(piece) for cut, piece in zip(cuts, pieces, strict=True)], dim=1)


def _join(x: Tensor, cuts: list[Partition] | list[Interleave]) -> Tensor:
    """The inverse of `_split`."""
    pieces = x.split([cut.length for cut in cuts], dim=1)
    return torch.cat([cut.join(piece) for cut, piece in zip(cuts, pieces, strict=True)], dim=1)


def _keys(mask: Tensor | None, cuts: list[Interleave], x: Tensor) -> Tensor | None:
    """Split a mask of keys [1 or B, 1, 1, T], and mask places without a token: [B * G, 1, 1, M], or None if all are heard."""
    if mask is None and all(cut.groups * cut.length == cut.tokens for cut in cuts):
        return None
    total = sum(cut.tokens for cut in cuts)
    keys = keys_of("subregion", mask, len(x), total)
    if keys is None:
        keys = torch.ones(len(x), total, dtype=torch.bool, device=x.device)
    there = _split(keys, cuts)
    return heard(there.unsqueeze(1), 1)


def _spread_rotary(table: Rotary, cuts: list[Interleave], batch: int) -> Rotary:
    """Give every place of every group the angles of its token: [T, head size] -> [B * G, M, head size]."""
    cos, sin = (_split(one.unsqueeze(0), cuts).repeat(batch, 1, 1) for one in table)
    return cos, sin
