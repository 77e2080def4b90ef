"""Softmax attention in small boxes of frames, rows and columns, which are shifted by half a box in every second block.

Paper: LinGen: Towards High-Resolution Minute-Length Text-to-Video Generation with Linear Computational Complexity, Wang et al.
2024, arXiv:2412.09856 (temporal Swin attention); Swin Transformer, Liu et al. 2021, arXiv:2103.14030 (shifted windows).
Differs: the size of LinGen's boxes is not told, 4 x 4 x 4 tokens is our choice; grids need not divide by the box (empty places
are masked); an axis that one box covers is not shifted, so that a picture is a clip of one frame.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dit.attention import Attention
from dit.embeddings import Rotary
from dit.grid import Grid
from dit.mixers.full import FullMixer, Mixer, grid_alone, keys_of, within
from dit.model import Context
from dit.partition import Window, heard
from dit.spec import knob, spec


@spec("window", paper="LinGen, arXiv:2412.09856")
class Windows(Mixer):
    """Attention in boxes of neighbours, O(N): the size of a box is the same for every grid."""

    frames: int = knob(4, "Frames of a window", low=1, unit="tokens")
    height: int = knob(4, "Rows of a window", low=1, unit="tokens")
    width: int = knob(4, "Columns of a window", low=1, unit="tokens")
    shift: str = knob(
        "alternate", "Blocks whose windows are shifted", choices=("alternate", "always", "never")
    )
    qk_norm: bool = knob(False, "RMS-normalise queries and keys per head")

    @property
    def needs_grid(self) -> bool:
        return True

    def at(self, block: int) -> Windows:
        if self.shift != "alternate":
            return self
        return self.replace(shift="always" if block % 2 else "never")

    def build(self, width: int, heads: int, *, qk_norm: bool = False, pre_only: bool = False) -> nn.Module:
        return WindowMixer(self, width, heads, qk_norm=self.qk_norm or qk_norm, pre_only=pre_only)


class WindowMixer(FullMixer):
    """The network of `Windows`; its weights are those of full attention."""

    def __init__(
        self, settings: Windows, width: int, heads: int, *, qk_norm: bool = False, pre_only: bool = False
    ) -> None:
        super().__init__(width, heads, qk_norm=qk_norm, pre_only=pre_only)
        self.sides = (settings.frames, settings.height, settings.width)
        self.shifted = settings.at(0).shift == "always"

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        context: Context | None = None,
        **kwargs: Any,
    ) -> Any:
        """[B, N, D] -> [B, N, D]. Raises: ValueError without a grid, or where text tokens stand in the sequence."""
        grid = grid_alone("window", context)
        assert context is not None
        window = self.window(grid)
        changes: dict[str, Any] = {
            "grid": Grid(*window.window),
            "mask": _heard(context.mask, hidden_states, window),
        }
        if context.rotary is not None:
            batch = len(hidden_states)
            changes["rotary"] = tuple(
                window.split(one.expand(batch, *one.shape[-2:])) for one in context.rotary
            )
        inner = within(context, hidden_states, window.spread, **changes)
        return window.join(super().forward(window.split(hidden_states), context=inner, **kwargs))

    def window(self, grid: Grid) -> Window:
        """Return how a grid is cut: boxes are no longer than an axis, and shifted along axes with more than one of them."""
        axes = (grid.frames, grid.height, grid.width)
        f, h, w = (min(side, axis) for side, axis in zip(self.sides, axes, strict=True))
        along = tuple(self.shifted and side < axis for side, axis in zip((f, h, w), axes, strict=True))
        return Window(grid, (f, h, w), shifted=(along[0], along[1], along[2]))

    def macs_on(self, grid: Grid, _text: int = 0) -> int:
        """Return the multiply-accumulates for one sample of `grid`."""
        window = self.window(grid)
        return window.groups * super().macs(window.length)

    def macs(self, rows: int, text: int = 0) -> int:
        """Return the multiply-accumulates where only a count of tokens is known: of whole windows in a row."""
        frames, height, width = self.sides
        return self.macs_on(Grid(frames, height, width * -(-rows // math.prod(self.sides))), text)


def window_attention_reference(
    attn: WindowMixer, x: Tensor, grid: Grid, mask: Tensor | None = None, rotary: Rotary | None = None
) -> Tensor:
    """The same by full attention in which tokens of other windows are masked: what `WindowMixer` is compared to, O(N^2)."""
    near = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool, device=x.device)
    axes = (grid.frames, grid.height, grid.width)
    for place, axis, side in zip(grid.positions(x.device).unbind(1), axes, attn.sides, strict=True):
        start = side // 2 if attn.shifted and side < axis else 0
        box = torch.div(place - start, side, rounding_mode="floor")
        near &= box[:, None] == box
    return Attention.forward(attn, x, None, near if mask is None else near & mask, rotary)


def _heard(mask: Tensor | None, x: Tensor, window: Window) -> Tensor | None:
    """Return who hears whom in the windows, [B * G, 1, 1 or M, M], or None for all."""
    keys, near = keys_of("window", mask, *x.shape[:2]), window.mask(x.device)
    if keys is None:
        return heard(near, len(x))
    both = window.split(keys).unsqueeze(1)  # [B * G, 1, M]
    return heard(both if near is None else both & near.repeat(len(x), 1, 1), 1)
