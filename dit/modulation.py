"""How time and prompt enter a block: shift, scale and gate made from the conditioning vector.

Paper: Scalable Diffusion Models with Transformers, Peebles and Xie 2023, arXiv:2212.09748 (adaLN-zero); PixArt-alpha, Chen et
al. 2023, arXiv:2310.00426 (adaLN-single); E-MMDiT, Shen et al. 2025, arXiv:2510.27135 (adaLN-affine).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dit.spec import Spec, knob, spec


class Modulation(Spec):
    """Family of the modulation slot of a block."""

    __slots__ = ()

    def build(self, width: int, vectors: int) -> nn.Module:
        """Return a module: conditioning [B, D] or [B, N, D] -> tuple of `vectors` tensors, [B, 1, D] or [B, N, D].

        Where `shared` gives a module, what that returns takes the place of the conditioning.
        """
        raise NotImplementedError

    def shared(self, width: int) -> nn.Module | None:
        """Return what a network applies to the conditioning once, for all its blocks: [B, D] -> [B, S], [B, N, D] -> [B, N, S].

        None where every block takes the conditioning itself.
        """
        return None


@spec("adaln-zero", paper="Scalable Diffusion Models with Transformers, arXiv:2212.09748")
class AdaLNZero(Modulation):
    """SiLU and one linear map to all vectors of a block, zero at the start so that every block begins as the identity."""

    bias: bool = knob(True, "Linear map with bias")

    def build(self, width: int, vectors: int) -> nn.Module:
        return ZeroModulation(width, vectors, bias=self.bias)


class ZeroModulation(nn.Module):
    """The network of `AdaLNZero`; `inputs` where the conditioning has other channels than the tokens."""

    def __init__(self, width: int, vectors: int, *, bias: bool = True, inputs: int | None = None) -> None:
        super().__init__()
        self.vectors = vectors
        self.linear = nn.Linear(inputs or width, vectors * width, bias=bias)
        nn.init.zeros_(self.linear.weight)
        if bias:
            nn.init.zeros_(self.linear.bias)

    def forward(self, emb: Tensor) -> tuple[Tensor, ...]:
        params: Tensor = self.linear(nn.functional.silu(emb))
        if params.dim() == 2:
            params = params.unsqueeze(1)
        return params.chunk(self.vectors, dim=-1)


@spec("adaln-single", paper="PixArt-alpha, arXiv:2310.00426")
class AdaLNSingle(Modulation):
    """Six vectors made once for all blocks; a block adds a table of its own, `vectors` D weights in place of `vectors` D^2."""

    def build(self, width: int, vectors: int) -> nn.Module:
        return TableModulation(width, vectors)

    def shared(self, width: int) -> nn.Module:
        return SharedVectors(width)


@spec("adaln-affine", paper="E-MMDiT, arXiv:2510.27135")
class AdaLNAffine(Modulation):
    """Six vectors made once for all blocks; a block scales them and adds to them: 12 D weights for six vectors."""

    def build(self, width: int, vectors: int) -> nn.Module:
        return TableModulation(width, vectors, affine=True)

    def shared(self, width: int) -> nn.Module:
        return SharedVectors(width)


SHARED = 6
"""Vectors that adaLN-single and adaLN-affine make once for all blocks: shift, scale, gate of attention, then of the perceptron."""


class SharedVectors(nn.Module):
    """SiLU and one linear map to the six vectors of all blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, SHARED * width)

    def forward(self, emb: Tensor) -> Tensor:
        """[B, D] -> [B, 6 D], or [B, N, D] -> [B, N, 6 D]."""
        vectors: Tensor = self.linear(nn.functional.silu(emb))
        return vectors


class TableModulation(nn.Module):
    """The network of `AdaLNSingle` and `AdaLNAffine`: the first of the shared vectors e become bias + e (1 + scale).

    The tables start as small random numbers, so that every block begins close to the identity.
    """

    def __init__(self, width: int, vectors: int, *, affine: bool = False) -> None:
        super().__init__()
        if vectors > SHARED:
            raise ValueError(
                f"adaLN-single and adaLN-affine share {SHARED} vectors, got a block that asks for {vectors}"
            )
        self.vectors = vectors
        self.bias = nn.Parameter(torch.randn(vectors, width) / width**0.5)
        self.scale = nn.Parameter(torch.randn(vectors, width) / width**0.5) if affine else None

    def forward(self, shared: Tensor) -> tuple[Tensor, ...]:
        """[B, 6 D] or [B, N, 6 D] -> tuple of [B, 1, D] or [B, N, D]."""
        if shared.dim() == 2:
            shared = shared.unsqueeze(1)
        vectors = shared.unflatten(-1, (SHARED, -1))[..., : self.vectors, :]  # [B, 1 or N, V, D]
        bias = self.bias.to(vectors.dtype)
        if self.scale is not None:
            vectors = vectors * (1 + self.scale.to(vectors.dtype))
        return (vectors + bias).unbind(-2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, for x [B, N, D] and vectors [B, 1, D] (one a sample) or [B, N, D] (one a token)."""
    return x * (1 + scale) + shift
