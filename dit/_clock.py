"""Where a run stands: the step, the guidance branch and the evaluation that one call of a transformer belongs to.

An announcement wins. Without one, a step is a change of the timestep, a run ends when the timestep turns back, and
a branch is known by diffusers' `cache_context` name, by the very tensor that carries its prompt, or by its place among
the calls of the step. No call is ever counted across steps, so a run cut short leaves nothing wrong behind.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_BRANCHES = 12  # more unnamed calls with one timestep than this are no guidance: such calls are left alone
_EVALUATIONS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One call of the transformer: which run, step (from 0), branch and evaluation within the step it is.

    `corrects` names the earlier (step, evaluation) that this one completes, in schedulers that evaluate twice.
    `known` is False where the step could not be told: such a call must be computed in full.
    """

    run: int
    step: int
    branch: str
    evaluation: int = 0
    timestep: float | None = None
    corrects: tuple[int, int] | None = None
    known: bool = True


Reading = Callable[[], float | None]


def _unread() -> float | None:
    return None


class Clock:
    """Tell the moments of a run from announcements or from the timestep argument alone."""

    def __init__(self, steps: int | None = None, calls_per_step: int | None = None) -> None:
        self.steps, self.calls_per_step = steps, calls_per_step
        self.run = 0
        self._given_steps = steps
        self._announced: tuple[int | None, str | None] | None = None
        self._context: tuple[str, int | None] | None = None
        self._read: Reading
        self._fresh()

    def begin(self, steps: int | None = None) -> None:
        """Start a new run of `steps` denoising steps."""
        self.run += self.step >= 0
        self.steps = self._given_steps if steps is None else steps
        self._announced = None
        self._fresh()

    def announce(self, step: int | None = None, branch: str | None = None) -> None:
        """Say which step (from 0) and which guidance branch the next call belongs to."""
        self._announced = (step, branch)

    @contextmanager
    def context(self, name: str, step: int | None = None, steps: int | None = None) -> Iterator[None]:
        """Name the branch of the calls inside, as diffusers' `cache_context` does."""
        before, self._context = self._context, (name, step)
        self.steps = self.steps if steps is None else steps
        try:
            yield
        finally:
            self._context = before

    def tick(self, read: Reading | float | None, condition: Any = None) -> Moment:
        """Return the moment of the call that begins now.

        `read` is its timestep or a function that fetches it (a device may have to be waited for); `condition` is
        the tensor that carries its prompt, used only to recognise the branch.
        """
        announced, self._announced = self._announced, None
        step, branch = announced or (None, None)
        if self._context is not None:
            branch = branch or self._context[0]
            step = self._context[1] if step is None else step
        reading = read if callable(read) else lambda: read
        known = self._turn_to(step) if step is not None else self._follow(reading)
        name = branch or self._recognise(condition)
        if step is not None and self._starts_over(name, reading):
            self.begin(self.steps)
            self._turn_to(step)
        self._read = self._reads[name] = reading
        evaluation = self._seen.get(name, 0)
        self._seen[name] = evaluation + 1
        self._ordinal += 1
        self._explicit = step is not None
        known = known and len(self._seen) <= _BRANCHES and evaluation < _EVALUATIONS
        return Moment(
            run=self.run, step=self.step, branch=name, evaluation=evaluation, timestep=self._timestep,
            corrects=self._corrected(name, evaluation), known=known,
        )  # fmt: skip

    def _fresh(self) -> None:
        self.step, self._direction, self._ordinal, self._explicit = -1, 0, 0, False
        self._timestep: float | None = None
        self._read = _unread
        self._seen: dict[str, int] = {}
        self._reads: dict[str, Reading] = {}  # of the last call of each branch in this step
        self._before: dict[str, int] = {}  # evaluations of each branch in the step before
        self._prompts: dict[str, weakref.ref[Any]] = {}

    def _starts_over(self, name: str, read: Reading) -> bool:
        """Whether a run was cut short in this very step and another begins: the same branch at the same timestep again.

        Only where the step is announced: schedulers that evaluate twice change the timestep within such a step.
        """
        if name not in self._seen:
            return False
        value = read()
        return value is not None and value == self._reads[name]()

    def _turn_to(self, step: int) -> bool:
        if step < self.step:
            self.begin(self.steps)
        if step != self.step:
            self._next(step)
        self._timestep = None
        return True

    def _follow(self, read: Reading) -> bool:
        """Advance by the timestep: equal stays, a change is a step, a change of direction is a new run."""
        value = read()
        if value is None:
            return self._count()
        last = self._read() if self._timestep is None else self._timestep
        if last is not None and value != last:
            direction = 1 if value > last else -1
            if self._direction not in (0, direction):
                self.begin(self.steps)
            else:
                self._direction = direction
        if self.step < 0 or value != last:
            self._next(self.step + 1)
        self._timestep = value
        return True

    def _count(self) -> bool:
        """Advance without any timestep: possible only if both numbers of the run were given."""
        if self.calls_per_step is None or self.steps is None:
            self._next(self.step + 1)
            return False
        if self.step < 0 or self._ordinal >= self.calls_per_step:
            if self.step + 1 >= self.steps:
                self.begin(self.steps)
            self._next(self.step + 1)
        return True

    def _next(self, step: int) -> None:
        self._before = self._seen if step == self.step + 1 else {}
        self.step, self._ordinal, self._seen, self._reads = step, 0, {}, {}

    def _recognise(self, condition: Any) -> str:
        """Name the branch by its prompt tensor if it was seen before, or else by the place of the call."""
        for name, known in self._prompts.items():
            if condition is not None and known() is condition:
                return name
        place = self._ordinal
        if self.calls_per_step is not None:
            return f"call {place % self.calls_per_step + 1}"
        while condition is not None:
            holder = self._prompts.get(f"call {place + 1}")
            if holder is None or holder() is None:
                self._prompts[f"call {place + 1}"] = weakref.ref(condition)
                break
            place += 1  # another prompt that is still alive owns this name
        return f"call {place + 1}"

    def _corrected(self, branch: str, evaluation: int) -> tuple[int, int] | None:
        if evaluation > 0 and self._explicit:
            return self.step, evaluation - 1
        if evaluation == 0 and not self._explicit and self._before.get(branch, 0) > 1:
            return self.step - 1, self._before[branch] - 1
        return None
