"""The plain feed-forward layer: one two-layer perceptron for every token.

Paper: Attention Is All You Need, Vaswani et al. 2017, arXiv:1706.03762.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from dit.spec import Spec, knob, spec

if TYPE_CHECKING:
    from dit.model import Context

Streams = dict[str, Tensor]
Body = Callable[[Streams, "Context"], Streams]


class Experts(Spec):
    """Family of the slot that decides what a token does alone."""

    __slots__ = ()

    @property
    def needs_grid(self) -> bool:
        """Whether it looks at the places of tokens, so that it cannot serve a sequence that is no grid."""
        return False

    @property
    def alone(self) -> bool:
        """Whether what becomes of a token depends on no other, so that ranks may share a sequence."""
        return False

    def build(self, width: int, hidden: int) -> nn.Module:
        """Return a module (x [B, N, D], Context | None) -> [B, N, D] with about `hidden` inner channels."""
        raise NotImplementedError

    def router(self, width: int, heads: int, hidden: int) -> nn.Module | None:
        """Return what decides about a whole block, or None where nothing does.

        It is called in the block's place as (body, streams, Context) -> streams, streams being a dictionary of tensors
        [B, N, D] by name (`hidden_states`, in dual-stream blocks `encoder_hidden_states` too); `body(streams, Context)` is the
        block itself. What attention and perceptron must know goes into the context as `route`.
        """
        return None

    def losses(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the named losses that concern all blocks of `model` together, after a training pass."""
        return {}


def routed(router: nn.Module | None, body: Body, streams: Streams, context: Context) -> Streams:
    """Run the body of a block: by itself, or as its router (see `Experts.router`) decides."""
    return body(streams, context) if router is None else router(body, streams, context)


@spec("dense", paper="Attention Is All You Need, arXiv:1706.03762")
class Dense(Experts):
    """One perceptron, always on."""

    activation: str = knob(
        "gelu-approximate",
        "Activation",
        choices=("gelu-approximate", "gelu", "geglu", "swiglu", "linear-silu"),
    )

    @property
    def alone(self) -> bool:
        return True

    def build(self, width: int, hidden: int) -> nn.Module:
        return Perceptron(width, inner_dim=hidden, activation_fn=self.activation)


class Perceptron(FeedForward):
    """diffusers' feed-forward layer in the slot of a block; it asks for nothing beside its tokens."""

    def forward(self, hidden_states: Tensor, context: Context | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        out: Tensor = super().forward(hidden_states)
        return out
