"""GuidanceSkip: compute the unconditional branch of guidance only in some steps, and make it from the conditional one in between.

Paper: FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality; Lv, Si, Song, Yang, Qiao, Liu,
    Wong; 2024; arXiv:2410.19355. Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models; Castillo,
    Kohler, Perez, Perez, Pumarola, Ghanem, Arbelaez, Thabet; 2023; arXiv:2312.12487. Applying Guidance in a Limited
    Interval Improves Sample and Distribution Quality in Diffusion Models; Kynkaanniemi, Aittala, Karras, Laine, Aila,
    Lehtinen; 2024; arXiv:2404.07724.
Differs: what is kept is the difference of the branches at the output of the network, reused or forecast, with no weights
    by frequency; the interval of guidance is told as a part of the steps; a batch that holds both branches is computed as
    two, so that caches around blocks keep a state for each.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import ClassVar

from torch import nn

from acceleration._guidance import Guiding
from acceleration.base import Accelerator, Run
from dit.seams import blocks_of
from dit.spec import knob, spec


@spec("guidance-skip", paper="FasterCache, arXiv:2410.19355; guidance interval, arXiv:2404.07724")
class GuidanceSkip(Accelerator):
    """Leave out the unconditional forward in most steps; works where guidance takes two forwards or a doubled batch."""

    seam: ClassVar[str] = "which guidance branches are computed"
    depth: ClassVar[int] = -1  # around whole forwards, so outside of all that is done in them

    interval: int = knob(
        default=2, label="Compute the unconditional branch every n-th step", low=1, high=20, unit="steps"
    )
    mode: str = knob(
        default="reuse",
        label="In between: reuse or forecast its distance from the conditional one, or none (no guidance)",
        choices=("reuse", "forecast", "cond"),
    )
    order: int = knob(default=1, label="Order of the forecast", low=1, high=3)
    warmup: int = knob(default=2, label="Full steps at the start", low=1, high=100, unit="steps")
    final_full: int = knob(default=1, label="Full steps at the end", low=0, high=100, unit="steps")
    guide_from: float = knob(
        default=0.0, label="Where guidance begins (part of the steps)", low=0.0, high=1.0, step=0.05
    )
    guide_to: float = knob(
        default=1.0, label="Where guidance ends (part of the steps)", low=0.0, high=1.0, step=0.05
    )
    unconditional: str = knob(
        default="auto",
        label="Which half of a doubled batch is unconditional, where the pipeline does not say",
        choices=("auto", "first", "second"),
    )

    def check(self) -> None:
        """Raises: ValueError if guidance ends before it begins."""
        if self.guide_to <= self.guide_from:
            raise ValueError(
                f"{self.name}: guide_to must be more than guide_from ({self.guide_from}), got {self.guide_to}"
            )

    @property
    def neutral(self) -> bool:
        """Whether both branches are computed in every step."""
        return self.interval == 1 and self.guide_from == 0 and self.guide_to == 1

    def refuses(self, transformer: nn.Module) -> str | None:
        return blocks_of(transformer).reason

    def attached(self, transformer: nn.Module, run: Run) -> AbstractContextManager[None]:
        return Guiding(self, run).attached(transformer)

    def omits(self, step: int, steps: int | None) -> bool:
        """Whether a step (from 0) of a run of `steps` lies outside of the interval of guidance; never if `steps` is unknown."""
        return steps is not None and not self.guide_from * steps <= step < self.guide_to * steps

    def skips(self, step: int, steps: int | None) -> bool:
        """Whether the unconditional branch of a step is made from the conditional one."""
        if step < self.warmup or (steps is not None and step >= steps - self.final_full):
            return False
        return (step - self.warmup) % self.interval != 0

    def predicted_speedup(self, steps: int, blocks: int) -> float:
        """Estimate the speed-up of the denoising loop from the schedule alone, where guidance is on in every step."""
        spared = sum(self.omits(step, steps) or self.skips(step, steps) for step in range(steps))
        return 2 * steps / max(1, 2 * steps - spared)

    def effect(self, run: Run) -> str:
        told = {
            decision: sum(cell.get("unconditional") == decision for cell in run.cells)
            for decision in ("reused", "forecast", "left out")
        }
        parts = ", ".join(f"{count} {decision}" for decision, count in told.items() if count)
        computed = sum(cell.get("unconditional") == "computed" for cell in run.cells)
        return f"{self.name}: of the unconditional forwards {parts or 'none was spared'}, {computed} computed"

    def untouched(self, run: Run) -> str | None:
        spared = {cell["unconditional"] for cell in run.cells if "unconditional" in cell} - {"computed"}
        if self.neutral or spared:
            return None
        if run.wanted.get(self.name):
            return "; ".join(run.notes)
        if any("unconditional" in cell for cell in run.cells):
            return None  # too few steps for the schedule to spare one
        if run.unknown:
            return "; ".join(run.notes)
        return (
            "no unconditional branch was seen: guidance is off, is a number given to the network, or its forwards "
            "cannot be told apart"
        )

    def hopeless(self, run: Run) -> str | None:
        later = any(cell["branch"] == "pred_cond" for cell in run.cells)  # a guider may turn guidance on at any step
        return None if later or run.wanted.get(self.name) else self.untouched(run)
