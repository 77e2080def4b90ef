"""Delta cache: reuse what a range of blocks adds, not what it returns, so that the current latent still passes through.

Paper: Delta-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers; Chen, Shen, Ye, Cao, Tu,
    Bouganis, Zhao, Chen; 2024; arXiv:2406.01125.
Differs: what a model adds between blocks (ControlNet) is accounted for exactly; ranges are cut at stream joins, so
    models with two kinds of blocks work; warm-up and final steps are always full; state is kept for each guidance branch;
    instead of the interval a gate may decide which steps are shortened.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import ClassVar

from torch import nn

from acceleration._reuse import Manner, Reuse, hopeless, places, predicted_speedup, prefetches, untouched
from acceleration.base import Accelerator, Run
from acceleration.gates import Gate, gate_for
from dit.seams import blocks_of
from dit.spec import knob, spec


@spec("delta-cache", paper="Delta-DiT, arXiv:2406.01125")
class DeltaCache(Accelerator):
    """Compute a range of blocks only every n-th step; in between, add what it added last."""

    seam: ClassVar[str] = "which blocks are computed"

    interval: int = knob(default=2, label="Compute all blocks every n-th step", low=1, high=20, unit="steps")
    cached_fraction: float = knob(
        default=0.75, label="Part of the blocks that is reused", low=0.05, high=1.0, step=0.05
    )
    boundary: float = knob(
        default=0.6,
        label="Where the rear blocks are computed again and the front ones reused",
        low=0.0,
        high=1.0,
        step=0.05,
    )
    warmup: int = knob(default=2, label="Full steps at the start", low=1, high=100, unit="steps")
    final_full: int = knob(default=1, label="Full steps at the end", low=0, high=100, unit="steps")
    mode: str = knob(
        default="stage", label="Which blocks are reused", choices=("stage", "rear", "front", "whole")
    )
    first_block: int | None = knob(
        default=None, label="First reused block (instead of the mode)", low=0, high=999
    )
    last_block: int | None = knob(
        default=None, label="Last reused block (instead of the mode)", low=0, high=999
    )
    gate: str = knob(
        default="interval",
        label="What decides which steps are shortened",
        choices=("interval", "first-block", "mask", "spectral"),
    )
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
    mask: str | None = knob(default=None, label="Steps for the gate mask: 1 full, 0 shortened, as in 111010")

    def check(self) -> None:
        """Raises: ValueError if the explicit range ends before it begins, or the gate refuses its settings."""
        self.gating()
        if self.last_block is not None and self.last_block < (self.first_block or 0):
            raise ValueError(
                f"{self.name}: last_block must be at least first_block ({self.first_block or 0}), got {self.last_block}"
            )

    @property
    def neutral(self) -> bool:
        """Whether every step is full."""
        return self.gating().neutral

    def gating(self) -> Gate:
        """Return the gate that decides."""
        return gate_for(self, offset=self.warmup)

    @classmethod
    def suited(cls, steps: int) -> DeltaCache:
        """Return settings that suit a number of steps: careful ones for models that need few (8 or less)."""
        return cls(mode="rear", cached_fraction=0.2, warmup=1) if steps <= 8 else cls()

    def refuses(self, transformer: nn.Module) -> str | None:
        blocks = blocks_of(transformer)
        if blocks.reason is not None:
            return blocks.reason
        highest = max(self.first_block or 0, self.last_block or 0)
        if highest >= len(blocks):
            return (
                f"there is no block {highest}: {type(transformer).__name__} has blocks 0 to {len(blocks) - 1}"
            )
        if any(prefetches(block.module) for block in blocks):
            return "group offloading with streams loads each block during the one before it; use use_stream=False"
        return None

    def attached(self, transformer: nn.Module, run: Run) -> AbstractContextManager[None]:
        timed = self.mode == "stage" or self.final_full
        unknown = "the range never changes and no final step is full" if timed else ""
        return run.controlled_by(Reuse(self, run, Manner(), unknown))

    def allows(self, step: int, steps: int | None) -> bool:
        """Whether a step (from 0) of a run of `steps`, if known, is neither warm-up nor final nor the switch of ranges."""
        if step < self.warmup:
            return False
        return steps is None or (step < steps - self.final_full and step != self._switch(steps))

    def reuses(self, step: int, steps: int | None) -> bool:
        """Whether the schedule leaves blocks out in a step; where a gate measures, whether it may."""
        return self.allows(step, steps) and self.gating().plans(step)

    def records(self, step: int, steps: int | None) -> bool:
        """Whether a full step is one that the next builds on."""
        return self.reuses(step + 1, steps)

    def span(self, step: int, steps: int | None, blocks: int) -> range:
        """Return the places of the blocks that are left out in a step; a gate that looks at the first block keeps it."""
        found = self._span(step, steps, blocks)
        return range(max(1, found.start), found.stop) if self.gating().needs == "first block" else found

    def _span(self, step: int, steps: int | None, blocks: int) -> range:
        if self.first_block is not None or self.last_block is not None:
            last = blocks - 1 if self.last_block is None else min(self.last_block, blocks - 1)
            return range(self.first_block or 0, last + 1)
        if self.mode == "whole":
            return range(blocks)
        count = min(blocks, max(1, round(self.cached_fraction * blocks)))
        switch = None if steps is None else self._switch(steps)
        rear = self.mode == "rear" or (self.mode == "stage" and (switch is None or step < switch))
        return range(blocks - count, blocks) if rear else range(count)

    def predicted_speedup(self, steps: int, blocks: int) -> float:
        """Estimate the speed-up of the denoising loop from the schedule alone, taking all blocks as equally long.

        Where a gate measures it is the most that its limit of steps in a row allows.
        """
        return predicted_speedup(self, steps, blocks)

    def effect(self, run: Run) -> str:
        reused = run.shortened("R")
        if not reused:
            return f"{self.name}: every block of every call was computed"
        ranges = dict.fromkeys(places(cell["states"], "R") for cell in reused)
        parts = ", then ".join(list(ranges)[:4]) + (", ..." if len(ranges) > 4 else "")
        return f"{self.name}: {len(reused)} of {len(run.cells)} calls reused blocks {parts}"

    def untouched(self, run: Run) -> str | None:
        return untouched(self, run, "R")

    def hopeless(self, run: Run) -> str | None:
        return hopeless(self, run)

    def _switch(self, steps: int) -> int | None:
        """Return the step at which the front takes over from the rear, if it does."""
        explicit = self.first_block is not None or self.last_block is not None
        return None if explicit or self.mode != "stage" else round(self.boundary * steps)
