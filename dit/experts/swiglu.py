"""The gated perceptron without biases: two thirds of the inner channels, each multiplied by a gate of its own.

Paper: GLU Variants Improve Transformer, Shazeer 2020, arXiv:2002.05202; sizes as in LLaMA, Touvron et al. 2023, arXiv:2302.13971.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from dit.experts.dense import Experts
from dit.spec import knob, spec

if TYPE_CHECKING:
    from dit.model import Context


@spec("swiglu", paper="GLU Variants Improve Transformer, arXiv:2002.05202")
class SwiGLU(Experts):
    """One gated perceptron of about the parameters of the plain one."""

    multiple: int = knob(default=256, label="Inner channels are rounded up to a multiple of this", low=1)

    @property
    def alone(self) -> bool:
        return True

    def build(self, width: int, hidden: int) -> nn.Module:
        inner = hidden * 2 // 3
        return GatedPerceptron(width, inner + -inner % self.multiple)


class GatedPerceptron(nn.Module):
    """The network of `SwiGLU`: one map to gates and values, silu(gate) * value, one map back."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, 2 * inner, bias=False)
        self.proj_out = nn.Linear(inner, width, bias=False)
        for one in (self.proj_in, self.proj_out):
            nn.init.xavier_uniform_(one.weight)

    def forward(self, hidden_states: Tensor, context: Context | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        gate, value = self.proj_in(hidden_states).chunk(2, dim=-1)
        out: Tensor = self.proj_out(F.silu(gate) * value)
        return out
