"""The plain feed-forward layer: one two-layer perceptron for every token.

Paper: Attention Is All You Need, Vaswani et al. 2017, arXiv:1706.03762.
"""

from __future__ import annotations

from diffusers.models.attention import FeedForward
from torch import nn

from dit.spec import Spec, knob, spec


class Experts(Spec):
    """Family of the slot that decides what a token does alone."""

    __slots__ = ()

    def build(self, width: int, hidden: int) -> nn.Module:
        """Return a module [B, N, D] -> [B, N, D] with about `hidden` inner channels."""
        raise NotImplementedError


@spec("dense", paper="Attention Is All You Need, arXiv:1706.03762")
class Dense(Experts):
    """One perceptron, always on."""

    activation: str = knob(
        "gelu-approximate", "Activation", choices=("gelu-approximate", "gelu", "geglu", "swiglu", "linear-silu")
    )

    def build(self, width: int, hidden: int) -> nn.Module:
        return FeedForward(width, inner_dim=hidden, activation_fn=self.activation)
