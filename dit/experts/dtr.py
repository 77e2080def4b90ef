"""Denoising task routing: a fixed mask a noise level lets only some channels of a token go through each block.

Paper: Denoising Task Routing for Diffusion Models, Park et al. 2024, arXiv:2310.07138.
Differs: continuous time is cut into bins; in a dual-stream block the picture is routed and the prompt is not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dit.experts.dense import Experts
from dit.experts.switch import plain_perceptron, prior_table
from dit.model import Context
from dit.spec import knob, spec

Streams = dict[str, Tensor]


@spec("dtr", paper="Denoising Task Routing, arXiv:2310.07138")
class TaskRouting(Experts):
    """A plain perceptron; around each block a band of `share` of the channels, moving with the noise level."""

    share: float = knob(0.8, "Share of the channels that go through a block", low=0.01, high=1.0)
    alpha: float = knob(4.0, "Power of the noise level that moves the band", low=0.1, high=20.0)
    bins: int = knob(1000, "Noise levels told apart", low=2, high=10000)
    counted: bool = knob(False, "Time is a count of steps (DDPM), not a level on 0..1000")

    def build(self, width: int, hidden: int) -> nn.Module:
        return plain_perceptron(width, hidden)

    def router(self, width: int, heads: int, hidden: int) -> nn.Module:
        return TaskRouter(width, self.share, self.alpha, self.bins, counted=self.counted)


class TaskRouter(nn.Module):
    """The block sees x m for a 0/1 mask m of the time; x (1 - m) goes past it."""

    table: Tensor

    def __init__(self, width: int, share: float, alpha: float, bins: int, *, counted: bool) -> None:
        super().__init__()
        self.bins, self.scale = bins, 1.0 if counted else bins / 1000
        with torch.device("cpu"):  # no weight: made anew wherever the network is, under the meta device too
            table = prior_table(width, bins, share, alpha)
        self.register_buffer("table", table, persistent=False)

    def forward(
        self, body: Callable[[Streams, Context], Streams], streams: Streams, context: Context
    ) -> Streams:
        """Run the block `body` on the routed channels of the picture's stream."""
        if context.timestep is None:
            raise ValueError(
                "task routing reads the time: this network does not put it into the context of its blocks"
            )
        x = streams["hidden_states"]
        level = context.timestep.to(x.device)
        if level.dim() == 2:
            level = level.float().mean(dim=1)
        mask = self.table.to(x.device, x.dtype)[
            (level.float() * self.scale).floor().long().clamp(0, self.bins - 1)
        ]
        mask = mask.unsqueeze(1)  # [B, 1, D]
        made = body(streams | {"hidden_states": x * mask}, context)
        return made | {"hidden_states": made["hidden_states"] + (1 - mask) * x}

    def macs(self, rows: int, text: int = 0) -> int:
        """Return 0: a mask costs no multiply-accumulates of a matrix."""
        return 0
