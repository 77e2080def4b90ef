"""Step forecast: in most steps the network is not called at all; its output is made from its last computed outputs.

Paper: From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers; Liu, Zou, Lyu, Chen, Zhang; 2025;
    arXiv:2503.06923 (forecast along the trajectory).
Differs: the output of the whole network is forecast, not that of its blocks, so a skipped step costs next to nothing; with
    `mask` and `weights` fitted to exact runs of a checkpoint (`acceleration.fitting`), each run of skipped steps returns what
    makes the sum of its moves come out best.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from acceleration._guidance import leaves, mapped
from acceleration._newton import Ladder, precise
from acceleration.base import Accelerator, Call, Run
from dit.seams import blocks_of, patched, timestep_of, writes_cache
from dit.spec import knob, spec

VARIABLES = ("sigma", "logit", "index")
_EDGE = 1e-3  # the logit is held this far from 0 and 1
_SIGMAS = 1.5  # a first timestep above this counts to 1000
MOST_WEIGHTS = 3
"""Computed outputs that a fitted forecast may combine."""


@spec("step-forecast", paper="TaylorSeer, arXiv:2503.06923; Adams-Bashforth")
class StepForecast(Accelerator):
    """Call the network only in some steps; in between, forecast its output from the last ones."""

    seam: ClassVar[str] = "which blocks are computed"

    interval: int = knob(default=2, label="Call the network every n-th step", low=1, high=20, unit="steps")
    warmup: int = knob(default=2, label="Full steps at the start", low=1, high=100, unit="steps")
    final_full: int = knob(default=1, label="Full steps at the end", low=0, high=100, unit="steps")
    order: int = knob(default=1, label="Order of the forecast, without weights", low=0, high=2)
    variable: str = knob(
        default="sigma",
        label="What the forecast goes by: the noise level, its logit, or the step",
        choices=VARIABLES,
    )
    mask: str | None = knob(
        default=None, label="Steps one by one: 1 full, 0 forecast, as in 110100 (in place of the interval)"
    )
    weights: str | None = knob(
        default=None, label="Fitted: older/newer of each run of forecast steps, as in -0.4/1.4_-0.9/1.9"
    )

    def check(self) -> None:
        """Raises: ValueError for a mask or weights that cannot be read, or do not go together."""
        if self.mask is not None and (set(self.mask) - {"0", "1"} or not self.mask.startswith("1")):
            raise ValueError(f"{self.name}: mask is a row of 1 and 0 that begins with 1, got {self.mask!r}")
        if self.weights is None:
            return
        if self.mask is None:
            raise ValueError(f"{self.name}: weights belong to the steps of a mask, and none is given")
        gaps = _gaps(self.mask)
        found = _read(self.name, self.weights)
        if len(found) != len(gaps):
            raise ValueError(
                f"{self.name}: the mask has {len(gaps)} runs of forecast steps, weights are given for {len(found)}"
            )
        for (first, _), row in zip(gaps, found, strict=True):
            if len(row) > self.mask[:first].count("1"):
                raise ValueError(
                    f"{self.name}: {len(row)} weights for step {first}, but fewer full steps come before it"
                )

    @property
    def neutral(self) -> bool:
        """Whether every step is full."""
        return "0" not in self.mask if self.mask is not None else self.interval == 1

    def refuses(self, transformer: nn.Module) -> str | None:
        return blocks_of(transformer).reason

    def attached(self, transformer: nn.Module, run: Run) -> AbstractContextManager[None]:
        return _attached(self, transformer, run)

    def skips(self, step: int, steps: int | None) -> bool:
        """Whether the output of a step (from 0) of a run of `steps`, if known, is forecast."""
        if self.mask is not None:
            return step < len(self.mask) and self.mask[step] == "0"
        if step < self.warmup or (steps is not None and step >= steps - self.final_full):
            return False
        return (step - self.warmup) % self.interval != self.interval - 1

    def predicted_speedup(self, steps: int, blocks: int) -> float:
        """Estimate the speed-up of the denoising loop: all steps over full ones."""
        return steps / max(1, sum(not self.skips(step, steps) for step in range(steps)))

    def rows(self) -> dict[int, tuple[float, ...]]:
        """Return for each forecast step the weights of its run of steps, older output first; nothing where none are given."""
        if self.weights is None or self.mask is None:
            return {}
        found = zip(_gaps(self.mask), _read(self.name, self.weights), strict=True)
        return {step: row for (first, last), row in found for step in range(first, last)}

    def effect(self, run: Run) -> str:
        short = sum(cell.get("step forecast", False) for cell in run.cells)
        return f"{self.name}: {short} of {len(run.cells)} calls of the network were forecast"

    def untouched(self, run: Run) -> str | None:
        if self.neutral or any(cell.get("step forecast") for cell in run.cells):
            return None
        if run.wanted.get(self.name) or run.unknown:
            return "; ".join(run.notes)
        return None  # too few steps for the schedule to leave one out

    def hopeless(self, run: Run) -> str | None:
        steps = run.clock.steps
        misfit = self.mask is not None and steps is not None and steps != len(self.mask)
        return self.untouched(run) if misfit or run.unknown else None


@dataclass(slots=True)
class _Known:
    """The last computed outputs of one branch, part by part, and what was last made of them."""

    order: int
    outputs: list[Any] = field(default_factory=list)  # newest last
    ladders: list[Ladder] = field(default_factory=list)
    blocks: int = 0
    made: Any = None  # what the present run of forecast steps returns, where it is the same for all of them
    first: float | None = None  # the first timestep

    @property
    def bytes(self) -> int:
        """Size of what is stored."""
        kept = sum(one.numel() * one.element_size() for output in self.outputs for one in leaves(output))
        return kept + sum(one.bytes for one in self.ladders)


class _Forecasting:
    """Answer the calls of one run."""

    def __init__(self, plan: StepForecast, run: Run) -> None:
        self.plan, self.run, self._rows = plan, run, plan.rows()
        self._reach = max(map(len, self._rows.values()), default=1)
        self._made_up: dict[
            tuple[str, int], tuple[int, int]
        ] = {}  # by branch and evaluation, run and step of the last one

    def answer(self, call: Call, compute: Any) -> Any:
        """Return the output of a call, computed or forecast."""
        plan, step, steps = self.plan, call.moment.step, self.run.clock.steps
        known = call.state(self, lambda: _Known(plan.order))
        if plan.mask is not None and steps is not None and steps != len(plan.mask):
            self._object(f"its mask is of {len(plan.mask)} steps, the run has {steps}")
        elif plan.skips(step, steps):
            row = self._rows.get(step)
            if self._corrects_made_up(call):
                self.run.note(f"{plan.name}: corrections of forecast evaluations were computed")
            elif not known.outputs or (row is not None and len(known.outputs) < len(row)):
                self._object("too few full steps of this size and branch came before")
            else:
                return self._made(call, known, row)
        output = compute()
        self._keep(call, known, output)
        return output

    def _corrects_made_up(self, call: Call) -> bool:
        """Whether this call completes an evaluation that was itself forecast (schedulers that evaluate twice)."""
        moment = call.moment
        if moment.corrects is None:
            return False
        step, evaluation = moment.corrects
        return self._made_up.get((moment.branch, evaluation)) == (moment.run, step)

    def _object(self, reason: str) -> None:
        self.run.wanted[self.plan.name] = self.run.wanted.get(self.plan.name, 0) + 1
        self.run.note(f"{self.plan.name} computed a step that it meant to forecast: {reason}")

    def _keep(self, call: Call, known: _Known, output: Any) -> None:
        known.blocks, known.made = len(call.states), None
        if self.plan.weights is not None:
            known.outputs = [*known.outputs, mapped(output, Tensor.detach)][-self._reach :]
        else:
            parts = leaves(output)
            if len(parts) != len(known.ladders):
                known.ladders = [Ladder(self.plan.order) for _ in parts]
            for ladder, part in zip(known.ladders, parts, strict=True):
                ladder.push(part.detach(), self._where(call, known))
            known.outputs = [mapped(output, Tensor.detach)]
        self.run.weigh()

    def _made(self, call: Call, known: _Known, row: tuple[float, ...] | None) -> Any:
        call.remarks.update({"step forecast": True, "answered": True})
        self._made_up[call.moment.branch, call.moment.evaluation] = (call.moment.run, call.moment.step)
        call.states.extend("F" * (known.blocks or len(self.run.blocks)))
        if row is None:
            ladders, where = iter(known.ladders), self._where(call, known)
            return mapped(
                known.outputs[-1], lambda x: next(ladders).at(where) if x.is_floating_point() else x.clone()
            )
        if known.made is None:  # the same for the whole run of steps
            known.made = _combined(known.outputs[-len(row) :], row)
        return mapped(known.made, Tensor.clone)

    def _where(self, call: Call, known: _Known) -> float:
        """What the forecast goes by: falling or rising from step to step, never twice the same."""
        timestep = timestep_of(call.given)() if self.plan.variable != "index" else None
        if timestep is None:
            return float(call.moment.step)
        known.first = timestep if known.first is None else known.first
        level = timestep / (1000.0 if known.first > _SIGMAS or timestep > _SIGMAS else 1.0)
        if self.plan.variable == "sigma":
            return level
        held = min(max(level, _EDGE), 1 - _EDGE)
        return math.log(held / (1 - held)) + _EDGE * level  # the last term keeps held levels apart


@contextmanager
def _attached(plan: StepForecast, transformer: nn.Module, run: Run) -> Iterator[None]:
    if plan.neutral:
        yield
        return
    inner, forecasting = transformer.forward, _Forecasting(plan, run)

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = run.call
        recomputed = torch.is_grad_enabled() and getattr(transformer, "gradient_checkpointing", False)
        if call is None or not call.moment.known or recomputed or writes_cache(call.given):
            return inner(*args, **kwargs)
        return forecasting.answer(call, lambda: inner(*args, **kwargs))

    forward.__wrapped__ = inner  # type: ignore[attr-defined]  # inspect.signature sees the model's own arguments
    with patched(transformer, "forward", forward):
        yield


def _combined(outputs: list[Any], row: tuple[float, ...]) -> Any:
    """The weighted sum of outputs, part by part."""
    parts = [iter(leaves(output)) for output in outputs]

    def part(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x.clone()
        total = sum(
            (weight * precise(next(one)) for weight, one in zip(row, parts, strict=True)), torch.zeros(())
        )
        return total.to(x.dtype)

    return mapped(outputs[-1], part)


def _gaps(mask: str) -> list[tuple[int, int]]:
    """The runs of forecast steps, from and to."""
    found, start = [], None
    for step, mark in enumerate(mask + "1"):
        if mark == "0" and start is None:
            start = step
        elif mark == "1" and start is not None:
            found.append((start, step))
            start = None
    return found


def _read(name: str, weights: str) -> list[tuple[float, ...]]:
    try:
        rows = [tuple(float(one) for one in row.split("/")) for row in weights.split("_")]
    except ValueError:
        raise ValueError(
            f"{name}: weights are numbers a/b or a/b/c, rows joined by _, got {weights!r}"
        ) from None
    if any(len(row) > MOST_WEIGHTS or not all(map(math.isfinite, row)) for row in rows):
        raise ValueError(
            f"{name}: one to {MOST_WEIGHTS} finite weights for each run of forecast steps, got {weights!r}"
        )
    return rows
