"""Full softmax self-attention: every token hears every other.

Paper: Attention Is All You Need, Vaswani et al. 2017, arXiv:1706.03762.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dit.attention import Attention
from dit.embeddings import Rotary
from dit.model import Context
from dit.routing import RouteDecision
from dit.spec import Spec, knob, spec


class Mixer(Spec):
    """Family of the slot that decides how tokens hear each other."""

    __slots__ = ()

    @property
    def needs_grid(self) -> bool:
        """Whether it looks at the places of tokens, so that it cannot serve a sequence that is no grid."""
        return False

    def at(self, block: int) -> Mixer:
        """Return the mixer of the block with this index, counted from 0 through the whole network, for those that alternate."""
        return self

    def build(self, width: int, heads: int, *, qk_norm: bool = False, pre_only: bool = False) -> nn.Module:
        """Return a module, called (hidden_states= [B, N, D], context=) -> [B, N, D].

        Where `context.length` is not 0, that many text tokens stand first in x. `pre_only` leaves out the map at the end, for
        blocks that have one of their own.
        """
        raise NotImplementedError

    def build_joint(
        self, width: int, heads: int, *, qk_norm: bool = False, context_pre_only: bool = False
    ) -> nn.Module:
        """Return a module, called (hidden_states= [B, N, D], encoder_hidden_states= [B, L, D], context=) -> (image, text).

        A pre-only text stream is heard but not answered: the module returns the image alone.

        Raises: ValueError where this mixer cannot join two streams.
        """
        raise ValueError(
            f"{self.name}: does not join an image and a text stream; use it in a one-stream network such as DiT"
        )


@spec("full", paper="Attention Is All You Need, arXiv:1706.03762")
class Full(Mixer):
    """Softmax attention over the whole grid, O(N^2)."""

    qk_norm: bool = knob(False, "RMS-normalise queries and keys per head")

    def build(self, width: int, heads: int, *, qk_norm: bool = False, pre_only: bool = False) -> nn.Module:
        return FullMixer(width, heads, qk_norm=self.qk_norm or qk_norm, pre_only=pre_only)

    def build_joint(
        self, width: int, heads: int, *, qk_norm: bool = False, context_pre_only: bool = False
    ) -> nn.Module:
        return FullMixer(
            width, heads, qk_norm=self.qk_norm or qk_norm, joint=True, context_pre_only=context_pre_only
        )


class FullMixer(Attention):
    """The network of `Full`: an `Attention` that reads positions and masks from the context."""

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
        if context is not None:
            attention_mask, image_rotary_emb = context.mask, context.rotary
            kwargs = context.attention_kwargs | kwargs
            if context.route is not None and context.route.heads is not None:
                kwargs = kwargs | {"heads": self._route(context.route, hidden_states.dtype)}
        return super().forward(
            hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs
        )

    def _route(self, route: RouteDecision, dtype: torch.dtype) -> Tensor:
        """The heads to compute [K'] where all samples agree and the maps can be cut, else gates [B, K]."""
        heads = route.heads
        assert heads is not None
        on = heads.bool()
        if not route.compact or torch.compiler.is_compiling() or heads.is_meta or not self.can_leave_out_heads(dtype):
            return heads
        return on[0].nonzero().squeeze(1) if bool((on == on[:1]).all()) else heads
