"""Full softmax self-attention: every token hears every other.

Paper: Attention Is All You Need, Vaswani et al. 2017, arXiv:1706.03762.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dit.attention import Attention, attend
from dit.embeddings import Rotary
from dit.grid import Grid
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

    @property
    def cut_between(self) -> str:
        """Where ranks may cut a sequence that they share: between any "tokens", between "frames", or nowhere, ""."""
        return ""

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

    @property
    def cut_between(self) -> str:
        return "tokens"

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
            kwargs = (
                context.attention_kwargs | self.told(context, hidden_states, encoder_hidden_states) | kwargs
            )
        return super().forward(
            hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs
        )

    def told(self, context: Context, hidden_states: Tensor, text: Tensor | None) -> dict[str, Any]:
        """Return what the processor is told of a context beside positions and mask: which heads to compute, who shares it."""
        told: dict[str, Any] = {} if context.share is None else {"attention": context.share.attention(attend)}
        if context.route is None or context.route.heads is None:
            return told
        return told | {"heads": self._route(context.route, hidden_states.dtype)}

    def _route(self, route: RouteDecision, dtype: torch.dtype) -> Tensor:
        """The heads to compute [K'] where all samples agree and the maps can be cut, else gates [B, K]."""
        heads = route.heads
        assert heads is not None
        on = heads.bool()
        if (
            not route.compact
            or torch.compiler.is_compiling()
            or heads.is_meta
            or not self.can_leave_out_heads(dtype)
        ):
            return heads
        return on[0].nonzero().squeeze(1) if bool((on == on[:1]).all()) else heads


def heads_of(context: Context) -> dict[str, Tensor]:
    """Return which heads of the network a router left on, gates [B, K] as an argument, or nothing."""
    if context.route is None or context.route.heads is None:
        return {}
    return {"heads": context.route.heads}


def grid_alone(name: str, context: Context | None) -> Grid:
    """Return the places of the tokens, for mixers that see nothing else. Raises: ValueError naming the mixer `name`."""
    if context is None or context.grid is None or context.length:
        length = 0 if context is None else context.length
        raise ValueError(
            f"{name}: needs context.grid, the places of the tokens, and has no place for {length or 'a stream of'} text tokens"
        )
    return context.grid


def within(context: Context, x: Tensor, spread: Callable[[Tensor], Tensor], **changes: Any) -> Context:
    """Return the context of groups of tokens: with `changes`, and each group's routed heads those of its sample.

    `spread` takes a value for each sample of x to one for each group, [B, ...] -> [B * G, ...].
    """
    route = context.route
    if route is not None and route.heads is not None:
        changes["route"] = dataclasses.replace(route, heads=spread(route.heads.expand(len(x), -1)))
    return dataclasses.replace(context, **changes)


def keys_of(name: str, mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """Return which tokens may be heard, [B, N], from a mask of keys [1 or B, 1, 1, N]. Raises: ValueError for other forms."""
    if mask is None:
        return None
    if mask.dim() != 4 or mask.shape[1:] != (1, 1, tokens):
        raise ValueError(
            f"{name}: takes a mask of keys [B, 1, 1, {tokens}], got one of shape {tuple(mask.shape)}"
        )
    return mask.bool().reshape(-1, tokens).expand(batch, -1)


def same_for_all(mask: Tensor, why: str) -> Tensor:
    """Return a mask of keys [B, 1, 1, M] as [B, M]. Raises: ValueError, with `why`, where it tells queries or heads apart."""
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != 1:
        raise ValueError(f"{why}, so the mask must be [B, 1, 1, M], got {tuple(mask.shape)}")
    return mask[:, 0, 0].bool()
