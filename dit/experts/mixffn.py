"""Mix-FFN: a gated perceptron with a 3 x 3 depthwise convolution inside, so that a token also sees its neighbours.

Paper: SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers, Xie et al. 2024, arXiv:2410.10629;
SegFormer, Xie et al. 2021, arXiv:2105.15203 (the convolution inside the perceptron).
Differs: serves prompts too. A text token is a picture of one token: it meets the middle of the convolution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit.experts.dense import Experts
from dit.grid import Grid
from dit.mixers.linear import convolved
from dit.spec import knob, spec

if TYPE_CHECKING:
    from dit.model import Context


@spec("mix-ffn", paper="SANA, arXiv:2410.10629")
class MixFFN(Experts):
    """Up, 3 x 3 convolution, gate, down; what linear attention lacks in sharpness, its neighbourhood gives back."""

    share: float = knob(
        default=0.625, label="Inner channels, as part of the plain perceptron's", low=0.01, high=4.0
    )
    kernel: int = knob(default=3, label="Side of the convolution", low=1, high=31, unit="tokens")

    def check(self) -> None:
        """Raises: ValueError for a convolution without a middle."""
        if self.kernel % 2 == 0:
            raise ValueError(f"{self.name}: kernel must be odd, got {self.kernel}")

    @property
    def needs_grid(self) -> bool:
        return True

    def build(self, width: int, hidden: int) -> nn.Module:
        return MixPerceptron(width, max(1, int(hidden * self.share)), self.kernel)


class MixPerceptron(nn.Module):
    """The network of `MixFFN`, in SANA's order: linear, SiLU, convolution, value * silu(gate), linear without bias."""

    def __init__(self, width: int, inner: int, kernel: int = 3) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, 2 * inner)
        self.conv = nn.Conv2d(2 * inner, 2 * inner, kernel, padding=kernel // 2, groups=2 * inner)
        self.proj_out = nn.Linear(inner, width, bias=False)

    def forward(self, hidden_states: Tensor, context: Context | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; the first `context.length` tokens are text, all of them where there is no grid.

        Raises: ValueError where the tokens are not those of the grid.
        """
        x = F.silu(self.proj_in(hidden_states))
        grid = None if context is None else context.grid
        text = x.shape[1] if grid is None or context is None else context.length
        parts = [convolved(self.conv, x[:, :text], Grid(text, 1, 1))] if text else []
        if grid is not None:
            parts.append(convolved(self.conv, x[:, text:], grid))
        value, gate = (torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]).chunk(2, dim=-1)
        out: Tensor = self.proj_out(value * F.silu(gate))
        return out
