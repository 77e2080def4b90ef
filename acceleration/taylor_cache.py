"""Taylor cache: forecast what blocks, or their attention and feed-forward parts, would add, from their last full steps.

Paper: From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers; Liu, Zou, Lyu, Chen, Zhang; 2025;
    arXiv:2503.06923. Confidence-gated Taylor (last block, gates); 2025; arXiv:2508.02240.
Differs: divided differences (exact for unequal gaps); by default one forecast of all blocks together, which stores a
    hundredth of what one a module does; the first blocks are computed, so the current latent is seen; what a model adds
    between blocks (ControlNet) counts once; the last step is full; a gate may decide instead of the interval.
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import nn

from acceleration._modules import ModuleReuse, parts_of
from acceleration._reuse import Manner, Reuse, hopeless, places, predicted_speedup, prefetches, untouched
from acceleration.base import Accelerator, Run
from acceleration.gates import GATES, Gate, gate_for
from dit.seams import blocks_of
from dit.spec import knob, spec


@spec("taylor-cache", paper="TaylorSeer, arXiv:2503.06923; CG-Taylor, arXiv:2508.02240")
class TaylorCache(Accelerator):
    """Compute the blocks only in some steps; in between, forecast what they would add."""

    seam: ClassVar[str] = "which blocks are computed"

    interval: int = knob(default=3, label="Compute all blocks every n-th step", low=1, high=20, unit="steps")
    order: int = knob(default=0, label="Order of the forecast", low=0, high=3)
    variable: str = knob(
        default="index",
        label="What the forecast goes by: the step's number or the timestep",
        choices=("index", "sigma"),
    )
    level: str = knob(
        default="last-block",
        label="What is forecast: all blocks together, or each attention and feed-forward module",
        choices=("last-block", "modules"),
    )
    fresh: int = knob(
        default=1, label="Blocks at the front that are always computed (last-block)", low=0, high=99
    )
    warmup: int = knob(default=3, label="Full steps at the start", low=1, high=100, unit="steps")
    final_full: int = knob(default=1, label="Full steps at the end", low=0, high=100, unit="steps")
    offload: bool = knob(default=False, label="Keep what is stored in main memory")
    gate: str = knob(default="interval", label="What decides which steps are shortened", choices=GATES)
    threshold: float | None = knob(
        default=None,
        label="Signal below which a gate shortens (none: the gate's own)",
        low=0.0,
        high=10.0,
        step=0.005,
    )
    limit: int = knob(
        default=5, label="Most shortened steps in a row where a gate measures", low=0, high=50, unit="steps"
    )
    budget: float = knob(
        default=3.0, label="Most error that adds up, in thresholds (first-block gates)", low=0.1, high=100.0
    )
    measure: str = knob(
        default="residual", label="What the confidence gate compares", choices=("residual", "output")
    )
    mask: str | None = knob(default=None, label="Steps for the gate mask: 1 full, 0 shortened, as in 111010")

    def check(self) -> None:
        """Raises: ValueError if the gate refuses its settings."""
        self.gating()

    @property
    def neutral(self) -> bool:
        """Whether every step is full."""
        return self.gating().neutral

    def gating(self) -> Gate:
        """Return the gate that decides."""
        return gate_for(self, offset=self.warmup - 1)

    def refuses(self, transformer: nn.Module) -> str | None:
        blocks = blocks_of(transformer)
        if blocks.reason is not None:
            return blocks.reason
        if any(prefetches(block.module) for block in blocks):
            return "group offloading with streams loads each block during the one before it; use use_stream=False"
        if self.level == "modules":
            if any(block.module._compiled_call_impl is not None for block in blocks):
                return "compiled blocks hide their modules; use level=last-block"
            if not parts_of(transformer):
                return f"no attention or feed-forward module was found in the blocks of {type(transformer).__name__}"
        elif self._front >= len(blocks):
            return f"{self._front} of {len(blocks)} blocks are always computed, so none is left to forecast"
        return None

    def attached(self, transformer: nn.Module, run: Run) -> AbstractContextManager[None]:
        unknown = "no final step is full" if self.final_full else ""
        manner = Manner(letter="F", order=self.order, variable=self.variable, offload=self.offload)
        if self.level == "modules":
            return ModuleReuse(self, run, manner, unknown).attached(transformer)
        return run.controlled_by(Reuse(self, run, manner, unknown))

    def allows(self, step: int, steps: int | None) -> bool:
        """Whether a step (from 0) of a run of `steps`, if known, is neither warm-up nor final."""
        return step >= self.warmup and (steps is None or step < steps - self.final_full)

    def records(self, step: int, steps: int | None) -> bool:
        """Whether a full step is an anchor of a later one."""
        return steps is None or step + 1 < steps - self.final_full

    def span(self, step: int, steps: int | None, blocks: int) -> range:
        """Return the places of the blocks that are left out in a shortened step."""
        return range(self._front, blocks)

    def predicted_speedup(self, steps: int, blocks: int) -> float | None:
        """Estimate the speed-up of the denoising loop, taking all blocks as equally long.

        Where a gate measures it is the most that its limit of steps in a row allows. None at the level of modules: what
        norms and modulations around them take is not known from the settings.
        """
        return None if self.level == "modules" else predicted_speedup(self, steps, blocks)

    def predicted_bytes(
        self,
        transformer: nn.Module,
        tokens: int,
        *,
        text_tokens: int = 0,
        images: int = 1,
        branches: int = 1,
        dtype: torch.dtype | None = None,
    ) -> int:
        """Estimate what will be stored, in bytes, for pictures of N `tokens` and prompts of L `text_tokens`.

        `images` is the batch of a call, `branches` how many guidance branches are called one after the other.
        """
        blocks = list(blocks_of(transformer))
        widths = Counter(one.in_features for one in blocks[0].module.modules() if isinstance(one, nn.Linear))
        width = widths.most_common(1)[0][0] if widths else 0
        kind = dtype or next(transformer.parameters()).dtype
        whole = self.level == "last-block"
        stored = tokens + text_tokens if whole else parts_of(transformer).stored(tokens, text_tokens)
        values = (self.order + 1) * stored
        if self.gate in ("confidence", "first-block"):
            values += (self.order + 1 if self.gate == "confidence" else 1) * tokens
        return values * width * images * branches * kind.itemsize

    def effect(self, run: Run) -> str:
        short = run.shortened("F")
        if not short:
            return f"{self.name}: every block of every call was computed"
        if self.level == "modules":
            return f"{self.name}: {len(short)} of {len(run.cells)} calls forecast attention and feed-forward modules"
        ranges = list(dict.fromkeys(places(cell["states"], "F") for cell in short))
        parts = ", ".join(ranges[:4]) + (", ..." if len(ranges) > 4 else "")
        return f"{self.name}: {len(short)} of {len(run.cells)} calls forecast blocks {parts}"

    def untouched(self, run: Run) -> str | None:
        return untouched(self, run, "F")

    def hopeless(self, run: Run) -> str | None:
        return hopeless(self, run)

    @property
    def _front(self) -> int:
        return max(self.fresh, int(self.gating().needs == "first block"))
