"""Delta cache: reuse what a range of blocks adds, not what it returns, so that the current latent still passes through.

Paper: Delta-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers; Chen, Shen, Ye, Cao, Tu,
    Bouganis, Zhao, Chen; 2024; arXiv:2406.01125.
Differs: what a model adds between blocks (ControlNet) is accounted for exactly; ranges are cut at stream joins, so
    models with two kinds of blocks work; warm-up and final steps are always full; state is kept for each guidance branch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from acceleration._ranges import Part, Recording, Replay
from acceleration.base import Accelerator, Call, Run
from dit.seams import Block, blocks_of
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

    def check(self) -> None:
        """Raises: ValueError if the explicit range ends before it begins."""
        if self.last_block is not None and self.last_block < (self.first_block or 0):
            raise ValueError(
                f"{self.name}: last_block must be at least first_block ({self.first_block or 0}), got {self.last_block}"
            )

    @property
    def neutral(self) -> bool:
        """Whether every step is full."""
        return self.interval == 1

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
        if any(_prefetches(block.module) for block in blocks):
            return "group offloading with streams loads each block during the one before it; use use_stream=False"
        return None

    def attached(self, transformer: nn.Module, run: Run) -> AbstractContextManager[None]:
        return run.controlled_by(_Control(self, run))

    def reuses(self, step: int, steps: int | None) -> bool:
        """Whether the schedule leaves blocks out in a step (from 0) of a run of `steps`, if known."""
        if step < self.warmup or (step - self.warmup) % self.interval == 0:
            return False
        return steps is None or (step < steps - self.final_full and step != self._switch(steps))

    def span(self, step: int, steps: int | None, blocks: int) -> range:
        """Return the places of the blocks that are left out in a step."""
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
        """Estimate the speed-up of the denoising loop from the schedule alone, taking all blocks as equally long."""
        spared = sum(len(self.span(step, steps, blocks)) for step in range(steps) if self.reuses(step, steps))
        return steps * blocks / max(1, steps * blocks - spared)

    def effect(self, run: Run) -> str:
        reused = [cell for cell in run.cells if "R" in cell["states"]]
        if not reused:
            return f"{self.name}: every block of every call was computed"
        ranges = dict.fromkeys(_ranges(cell["states"]) for cell in reused)
        parts = ", then ".join(list(ranges)[:4]) + (", ..." if len(ranges) > 4 else "")
        return f"{self.name}: {len(reused)} of {len(run.cells)} calls reused blocks {parts}"

    def untouched(self, run: Run) -> str | None:
        if run.tally["R"] or self.neutral:
            return None
        if not run.saw_blocks:
            return "none of its blocks was called"
        if run.wanted.get(self.name) or run.unknown:
            return "; ".join(run.notes)
        return None

    def _switch(self, steps: int) -> int | None:
        """Return the step at which the front takes over from the rear, if it does."""
        explicit = self.first_block is not None or self.last_block is not None
        return None if explicit or self.mode != "stage" else round(self.boundary * steps)


@dataclass(slots=True)
class _Branch:
    """What one branch knows: how its forward is built, and what the range added at its last full step."""

    blocks: int
    careful: bool = False
    parts: list[Part] = field(default_factory=list)
    span: range | None = None
    step: int = -1

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


class _Control:
    """Decide once for each call, in plain Python: record the range, replay it, or leave the call alone."""

    def __init__(self, settings: DeltaCache, run: Run) -> None:
        self.settings, self.run = settings, run
        self._branch: _Branch | None = None
        self._way: Recording | Replay | None = None
        self._approximated: dict[tuple[str, int], tuple[int, bool]] = {}

    def started(self, call: Call) -> bool:
        self._way = None
        settings, steps, step = self.settings, self.run.clock.steps, call.moment.step
        if settings.neutral:
            return False
        if steps is None and (settings.mode == "stage" or settings.final_full):
            self.run.note(
                "the number of steps is unknown, so the range never changes and no final step is full; give steps="
            )
        branch = self._branch = call.state(self, lambda: _Branch(len(self.run.blocks)))
        stale: str | None = "not wanted"
        if settings.reuses(step, steps):
            self.run.wanted[settings.name] = self.run.wanted.get(settings.name, 0) + 1
            stale = self._stale(call, branch)
            if stale is not None:
                self.run.note(f"{settings.name} computed a call in full that it meant to shorten: {stale}")
        if stale is None:
            self._way = Replay(branch.parts)
        elif settings.reuses(step + 1, steps):
            branch.parts = []  # freed before the new ones are made
            self._way = Recording(settings.span(step + 1, steps, branch.blocks), branch.careful)
        key = (call.moment.branch, call.moment.evaluation)
        self._approximated[key] = (step, isinstance(self._way, Replay))
        return True

    def visited(
        self,
        call: Call,
        place: int,
        block: Block,
        inner: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self._way is None:
            return call.compute(inner, args, kwargs)
        return self._way.visited(call, place, block, inner, args, kwargs)

    def finished(self, call: Call, failed: bool) -> None:
        way, branch = self._way, self._branch
        self._way = self._branch = None
        if branch is None:
            return
        if failed:
            branch.parts, branch.span = [], None
            return
        branch.blocks = len(call.states)
        if isinstance(way, Replay) and way.strayed:
            self.run.note(
                "the order of the blocks changed between two calls; the next call was computed in full"
            )
            branch.parts, branch.span = [], None
        if isinstance(way, Recording):
            self._keep(call, branch, way)

    def _keep(self, call: Call, branch: _Branch, way: Recording) -> None:
        """Keep what a full call recorded, if it is of the range that the next step will ask for."""
        parts, step, steps = way.finish(), call.moment.step, self.run.clock.steps
        for reason in way.reasons:
            self.run.note(reason)
        branch.careful = branch.careful or way.careful or way.overwritten
        if way.overwritten or way.span != self.settings.span(step + 1, steps, branch.blocks):
            branch.parts, branch.span = [], None
            return
        branch.parts, branch.span, branch.step = parts, way.span, step
        self.run.weigh(lambda state: state.bytes if isinstance(state, _Branch) else 0)

    def _stale(self, call: Call, branch: _Branch) -> str | None:
        """Say why what was recorded may not stand in for the blocks in this call; None if it may."""
        moment, steps = call.moment, self.run.clock.steps
        if not branch.parts:
            return "nothing was recorded yet for this branch, size and type"
        if branch.span != self.settings.span(moment.step, steps, branch.blocks):
            return "another range of blocks was recorded"
        if not 0 < moment.step - branch.step < self.settings.interval:
            return "what was recorded for this branch is too old"
        if moment.corrects is not None:
            step, evaluation = moment.corrects
            if self._approximated.get((moment.branch, evaluation)) == (step, True):
                return "it corrects an evaluation that was itself shortened"
        return None


def _ranges(states: str) -> str:
    """Write the places of the reused blocks of a call as `7-27` or `0-4 and 6-9`."""
    ranges: list[list[int]] = []
    for place, state in enumerate(states):
        if state == "R":
            if ranges and ranges[-1][1] == place - 1:
                ranges[-1][1] = place
            else:
                ranges.append([place, place])
    return " and ".join(f"{first}-{last}" if last > first else str(first) for first, last in ranges)


def _prefetches(module: nn.Module) -> bool:
    registry = module.__dict__.get("_diffusers_hook")
    hooks = getattr(registry, "hooks", {})
    return any("lazy_prefetch" in name for name in hooks)
