"""`Toy`: a transformer of a few blocks that can do to its streams all that real ones do between and inside blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.inplace = False

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        change = torch.tanh(self.linear(hidden_states) * (1 + temb))
        if self.inplace:
            hidden_states += change
        else:
            hidden_states = hidden_states + change
        return hidden_states


class Toy(nn.Module):
    """[B, N, D] -> [B, N, D]; `residuals` are added after each block, in place or not."""

    def __init__(self, depth: int = 6, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.order = list(range(depth))
        self.tokens: int | None = None  # drop the others inside, which no argument shows
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        residuals: list[Tensor] | None = None,
        inplace: bool = False,
    ) -> Tensor:
        temb = torch.as_tensor(timestep).to(hidden_states.dtype).reshape(-1, 1, 1)
        x = hidden_states[:, : self.tokens] * 1.0
        for place, index in enumerate(self.order):
            x = self.blocks[index](x, temb=temb)
            if residuals is not None and inplace:
                x += residuals[place]
            elif residuals is not None:
                x = x + residuals[place]
        return x


class Sampler:
    """A toy and the calls of a run on it."""

    def __init__(self, **shape: int) -> None:
        torch.manual_seed(0)
        self.model = Toy(**shape).eval()
        self.x = torch.randn(1, 5, self.model.blocks[0].linear.in_features)

    @torch.no_grad()
    def run(self, steps: int = 10, **given: Any) -> list[Tensor]:
        """Call the toy at falling times on changing latents."""
        return [self.model(self.x * (1 + step / 9), 1 - step / steps, **given) for step in range(steps)]


@pytest.fixture
def toy() -> Sampler:
    return Sampler()


@pytest.fixture
def toys() -> type[Sampler]:
    return Sampler
