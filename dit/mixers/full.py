"""Full softmax self-attention: every token hears every other.

Paper: Attention Is All You Need, Vaswani et al. 2017, arXiv:1706.03762.
"""

from __future__ import annotations

from torch import Tensor, nn

from dit.attention import Attention
from dit.model import Context
from dit.spec import Spec, knob, spec


class Mixer(Spec):
    """Family of the slot that decides how tokens hear each other."""

    __slots__ = ()

    def build(self, width: int, heads: int) -> nn.Module:
        """Return a module (x [B, N, D], Context) -> [B, N, D]."""
        raise NotImplementedError


@spec("full", paper="Attention Is All You Need, arXiv:1706.03762")
class Full(Mixer):
    """Softmax attention over the whole grid, O(N^2)."""

    qk_norm: bool = knob(False, "RMS-normalise queries and keys per head")

    def build(self, width: int, heads: int) -> nn.Module:
        return FullMixer(width, heads, qk_norm=self.qk_norm)


class FullMixer(Attention):
    """The network of `Full`: an `Attention` that reads its positions from the context."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__(width, heads, qk_norm=qk_norm)

    def forward(self, hidden_states: Tensor, context: Context | None = None, **kwargs: object) -> Tensor:  # type: ignore[override]
        """[B, N, D] -> [B, N, D]."""
        table = context.rotary if context is not None else None
        extra = context.attention_kwargs if context is not None else {}
        out: Tensor = self.processor(self, hidden_states, image_rotary_emb=table, **extra)
        return out
