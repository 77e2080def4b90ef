"""How time and prompt enter a block: shift, scale and gate made from the conditioning vector.

Paper: Scalable Diffusion Models with Transformers, Peebles and Xie 2023, arXiv:2212.09748 (adaLN-zero).
"""

from __future__ import annotations

from torch import Tensor, nn

from dit.spec import Spec, knob, spec


class Modulation(Spec):
    """Family of the modulation slot of a block."""

    __slots__ = ()

    def build(self, width: int, vectors: int) -> nn.Module:
        """Return a module: conditioning [B, D] or [B, N, D] -> tuple of `vectors` tensors, [B, 1, D] or [B, N, D]."""
        raise NotImplementedError


@spec("adaln-zero", paper="Scalable Diffusion Models with Transformers, arXiv:2212.09748")
class AdaLNZero(Modulation):
    """SiLU and one linear map to all vectors of a block, zero at the start so that every block begins as the identity."""

    bias: bool = knob(True, "Linear map with bias")

    def build(self, width: int, vectors: int) -> nn.Module:
        return ZeroModulation(width, vectors, bias=self.bias)


class ZeroModulation(nn.Module):
    """The network of `AdaLNZero`."""

    def __init__(self, width: int, vectors: int, *, bias: bool = True) -> None:
        super().__init__()
        self.vectors = vectors
        self.linear = nn.Linear(width, vectors * width, bias=bias)
        nn.init.zeros_(self.linear.weight)
        if bias:
            nn.init.zeros_(self.linear.bias)

    def forward(self, emb: Tensor) -> tuple[Tensor, ...]:
        params: Tensor = self.linear(nn.functional.silu(emb))
        if params.dim() == 2:
            params = params.unsqueeze(1)
        return params.chunk(self.vectors, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, for x [B, N, D] and vectors [B, 1, D] (one a sample) or [B, N, D] (one a token)."""
    return x * (1 + scale) + shift
