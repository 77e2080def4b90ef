"""Attach training-free accelerators to a transformer for the length of a with-block, and report what they did.

The state of a run lives in `Run`, keyed by guidance branch, and dies with the block. Methods get at a transformer by
`dit.seams` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from threading import get_ident
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from acceleration._adapters import Adapters
from acceleration._calls import Call, Control, Reached
from acceleration._outputs import Outputs
from acceleration._report import RunReport
from acceleration._watching import Watching, bytes_of, uncopied
from dit import seams
from dit.seams import Block, Blocks, Clock, Moment
from dit.spec import Spec

__all__ = [
    "Accelerator", "Call", "Control", "Reached", "Refused", "Run", "RunReport", "Untouched", "accelerated", "refusal",
]  # fmt: skip

T = TypeVar("T")


class Refused(ValueError):
    """A transformer or a combination of methods that cannot work, in words."""


class Untouched(RuntimeError):
    """A method that should have saved something and did not, in words."""


class Accelerator(Spec):
    """The family of methods that spend less without weights of their own.

    `seam` names what a method decides about; two methods that decide about the same thing are refused together.
    """

    __slots__ = ()
    seam: ClassVar[str] = ""
    depth: ClassVar[int] = 0  # methods of a greater depth are attached first, nearer to the weights

    @property
    def neutral(self) -> bool:
        """Whether these settings change nothing."""
        return False

    def refuses(self, transformer: nn.Module) -> str | None:
        """Return in words why this method cannot serve the transformer, or None if it can."""
        return None

    def attached(self, transformer: nn.Module, run: Run) -> AbstractContextManager[None]:
        """Take hold of the transformer until the end of the context."""
        raise NotImplementedError(f"{type(self).__name__}.attached")

    def predicted_speedup(self, steps: int, blocks: int) -> float | None:
        """Estimate the speed-up of the denoising loop from the settings alone; None where that cannot be done honestly."""
        return None

    def effect(self, run: Run) -> str:
        """Say in words what took effect in a run."""
        return f"{self.name}: attached"

    def untouched(self, run: Run) -> str | None:
        """Return in words why this method had no effect although it should have had one, or None."""
        return None

    def hopeless(self, run: Run) -> str | None:
        """Return in words why this method will have no effect, as far as the first step shows it, or None."""
        return None


class Run:
    """One with-block: its clock, its tally, and the state of its methods for each guidance branch."""

    def __init__(
        self,
        transformer: nn.Module,
        methods: tuple[Accelerator, ...],
        steps: int | None,
        calls_per_step: int | None,
    ) -> None:
        self.transformer, self.methods = transformer, methods
        self.blocks: Blocks = seams.blocks_of(transformer)
        self.clock = Clock(steps, calls_per_step)
        self.call: Call | None = None
        self._thread = 0  # which the call on its way belongs to
        self.tally = dict.fromkeys("CRFSM", 0)
        self.cells: list[dict[str, Any]] = []
        self.wanted: dict[str, int] = {}  # calls in which a method's schedule asked it to save something
        self.unknown = 0  # calls whose step could not be told
        self.notes: list[str] = []
        self.attention: dict[str, Any] = {}  # by layer, what a sparse method did: objects with to_dict()
        self.most_bytes = self.predicted_bytes = 0
        self._control: Control | None = None
        self._first: tuple[int, int] | None = None  # the step by which the methods are judged
        self.judged = False  # whether that is over
        self._outputs = Outputs()
        self._generation = 0
        self._looked: tuple[int, int] | None = None  # the step at which the adapters were looked at
        self._adapters, self._adapted = Adapters(transformer), ()  # type: Adapters, tuple[Any, ...]
        self._steps_seen = 0
        self._reached: tuple[int, int, int] | None = None  # run, steps of it so far, steps that were told
        self._kept: dict[tuple[int, str, int], tuple[Any, Any]] = {}

    def begin(self, steps: int | None = None) -> None:
        """Start a new run of `steps` denoising steps: nothing of an earlier one is used again."""
        self.clock.begin(steps)

    def note(self, words: str) -> None:
        """Put a remark into the report, once however often it is made."""
        if words not in self.notes:
            self.notes.append(words)

    @property
    def control(self) -> Control | None:
        """What decides which blocks are computed, if anything does."""
        return self._control

    @property
    def saw_blocks(self) -> bool:
        """Whether any call has reached a block."""
        return any(cell["states"] for cell in self.cells)

    def shortened(self, letter: str) -> list[dict[str, Any]]:
        """Return the cells of calls in which blocks have this letter, without those that reached no block at all."""
        return [cell for cell in self.cells if letter in cell["states"] and not cell.get("answered")]

    @contextmanager
    def controlled_by(self, control: Control) -> Iterator[None]:
        """Let `control` decide about the blocks of every call inside."""
        if self._control is not None:
            raise Refused("two methods would decide which blocks are computed; choose one of them")
        self._control = control
        try:
            with seams.around_blocks(self.blocks, self._visit):
                yield
        finally:
            self._control = None

    def weigh(self) -> None:
        """Measure what all methods together store for reuse now."""
        states = [state for _, state in self._kept.values()]
        self.most_bytes = max(self.most_bytes, sum(map(bytes_of, states)))
        expected = sum(getattr(state, "expected", 0) or bytes_of(state) for state in states)
        self.predicted_bytes = max(self.predicted_bytes, expected)

    def report(self) -> RunReport:
        """Return what was requested and what took effect so far."""
        longest = max((len(cell["states"]) for cell in self.cells), default=len(self.blocks))
        return RunReport(
            requested=[method.to_dict() for method in self.methods],
            effective=[method.effect(self) for method in self.methods],
            steps=self._steps_seen,
            calls=len(self.cells),
            blocks=longest,
            computed=self.tally["C"] + self.tally["S"] + self.tally["M"],
            reused=self.tally["R"],
            forecast=self.tally["F"],
            bytes=self.most_bytes,
            notes=list(self.notes),
            cells=[dict(cell) for cell in self.cells],
            sparse=self.tally["S"],
            merged=self.tally["M"],
            predicted_bytes=self.predicted_bytes,
            predicted_speedup=self._promised(longest),
            attention=[row.to_dict() for row in self.attention.values()],
            failures=self._outputs.look(),
        )

    def _end(self) -> None:
        """Let go of all tensors, also after an exception."""
        self._count()
        self._outputs.look()
        self._kept.clear()

    def _promised(self, blocks: int) -> float | None:
        found = [one.predicted_speedup(self._steps_seen, blocks) for one in self.methods if self._steps_seen]
        told = [one for one in found if one is not None]
        return math.prod(told) if self._steps_seen and len(told) == len(found) else None

    def _enter(self, given: dict[str, Any]) -> None:
        if self.call is not None and self._thread != get_ident():
            who = type(self.transformer).__name__
            raise RuntimeError(
                f"two threads call {who} at the same time, and what it keeps belongs to one run: take turns, or accelerate a "
                "copy for each"
            )
        self._thread = get_ident()
        moment = self.clock.tick(seams.timestep_of(given), seams.prompt_of(given))
        self._count(moment)
        self._judge(moment, given)
        if moment.run != self._generation:
            self._kept.clear()
            self._generation = moment.run
        if (moment.run, moment.step) != self._looked:
            self._look(moment)
        if not moment.known:
            self.unknown += 1
            self.note(
                "calls whose step could not be told were computed in full; give steps= and calls_per_step="
            )
        if self.clock.steps is not None and moment.step == self.clock.steps:
            self.note(
                f"the run has more timesteps than the {self.clock.steps} steps that were told, and what came after them was "
                "computed; give steps= as many as the scheduler has timesteps"
            )
        self.call = Call(self, moment, given)
        self._outputs.begin(moment)

    def _count(self, moment: Moment | None = None) -> None:
        """Remark when a run is over that had fewer timesteps than steps were told: its last steps were not taken for last ones."""
        reached, told = self._reached, self.clock.steps
        if reached is not None and (moment is None or moment.run != reached[0]) and reached[1] < reached[2]:
            self.note(
                f"the run had {reached[1]} timesteps, fewer than the {reached[2]} steps that were told, so what is kept for the "
                "last steps came too late; give steps= as many as the scheduler has timesteps"
            )
        known = moment is not None and moment.known and told is not None
        self._reached = (moment.run, moment.step + 1, told) if known and moment and told else None

    def _judge(self, moment: Moment, given: Mapping[str, Any]) -> None:
        """Raise when the first step is over, if it has shown that a method will have no effect: no other step is spent."""
        if self.judged or seams.writes_cache(given):
            return
        now = (moment.run, moment.step)
        self.judged = self._first not in (None, now)
        self._first = now
        # Where the step of some calls could not be told, the others may yet show an effect.
        if self.judged and self.unknown in (0, len(self.cells)):
            self.complain(lambda one: one.hopeless(self))

    def complain(self, about: Callable[[Accelerator], str | None]) -> None:
        """Raise for the first method about which there are words. Raises: Untouched."""
        told = [(method.name, about(method)) for method in self.methods if self.cells]
        for name, words in told:
            if words is not None:
                raise Untouched(f"{name} had no effect on {type(self.transformer).__name__}: {words}")

    def _look(self, moment: Moment) -> None:
        """Drop what is stored if the adapters have changed since the last step."""
        found, before, self._looked = self._adapters.now(), self._adapted, (moment.run, moment.step)
        self._adapted = found
        if self._kept and found != before:
            self._kept.clear()
            self.note("the adapters changed during a run; nothing of the steps before was used after that")

    def _starts(self, call: Call) -> bool:
        """Let the control decide about a call when its first block is reached: a call may be answered without any."""
        recomputed = torch.is_grad_enabled() and getattr(self.transformer, "gradient_checkpointing", False)
        writing = seams.writes_cache(call.given)
        if writing:
            self.note("calls that write a K/V cache were computed in full")
        if self._control is None or not call.moment.known or recomputed or writing:
            return False
        return self._control.started(call)

    @contextmanager
    def part(self, whole: Call, branch: str, given: Mapping[str, Any]) -> Iterator[Call]:
        """Count what runs inside as a call of its own, of another branch at the moment of `whole`, which it replaces."""
        self.call = call = Call(self, replace(whole.moment, branch=branch), given)
        try:
            yield call
        except BaseException:
            self._leave(failed=True)
            raise
        self._leave(failed=False)

    def _leave(self, failed: bool) -> None:
        if self.call is not None and self._thread != get_ident():
            return  # this one was refused; the other thread is still on its way
        call, self.call = self.call, None
        if call is None:
            return
        if call.active and self._control is not None:
            self._control.finished(call, failed)
        for state in call.states:
            self.tally[state] += 1
        moment = call.moment
        earlier = [(cell["run"], cell["step"]) for cell in self.cells[-1:]]
        self._steps_seen += (moment.run, moment.step) not in earlier
        self.cells.append({
            "run": moment.run, "branch": moment.branch, "step": moment.step, "evaluation": moment.evaluation,
            "states": "".join(call.states), **call.remarks,
        })  # fmt: skip

    def _visit(
        self, block: Block, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call = self.call
        if call is None:  # the block is used by itself, or recomputed in a backward pass
            return inner(*args, **kwargs)
        reached = Reached(len(call.states), block, inner, args, kwargs)
        if call.active is None:
            call.active = self._starts(call)
        if not call.active or self._control is None:
            return call.compute(reached)
        return self._control.visited(call, reached)

    def _state(self, call: Call, owner: object, make: Callable[[], T]) -> T:
        key = (id(owner), call.moment.branch, call.moment.evaluation)
        kept = self._kept.get(key)
        if kept is None or kept[0] != call.fingerprint:
            kept = self._kept[key] = (call.fingerprint, make())
        return kept[1]


@contextmanager
def accelerated(
    transformer: nn.Module, *methods: Accelerator, steps: int | None = None, calls_per_step: int | None = None
) -> Iterator[Run]:
    """Accelerate every forward of a diffusers-like transformer inside the block.

    Args:
        steps: denoising steps of a run, where the pipeline does not announce them (`dit.seams.announce`).
        calls_per_step: forwards for each timestep; only needed where guidance branches cannot be told apart.

    Raises:
        Refused: at entry, if a method cannot serve this transformer or the methods do not go together.
        Untouched: after the first step where that shows that a method will save nothing, or at the end if it did not.
    """
    for name, value in (("steps", steps), ("calls_per_step", calls_per_step)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise Refused(f"{name} must be a whole number of at least 1, got {value!r}")
    reason = refusal(transformer, *methods)
    if reason is not None:
        raise Refused(reason)
    run = Run(transformer, methods, steps, calls_per_step)
    with ExitStack() as stack:
        stack.enter_context(seams.patched(transformer, seams.RUN, run))
        stack.enter_context(uncopied(transformer))
        stack.enter_context(seams.named_contexts(transformer, run.clock))
        stack.callback(run._end)
        stack.enter_context(run._adapters.followed())
        stack.enter_context(seams.around_calls(transformer, run._enter, run._leave))
        stack.callback(transformer.register_forward_hook(run._outputs.returned).remove)
        for method in sorted(methods, key=lambda one: -one.depth):
            stack.enter_context(method.attached(transformer, run))
        if run._control is None:
            stack.enter_context(run.controlled_by(Watching()))
        yield run
    run.complain(lambda one: one.untouched(run))


def refusal(transformer: Any, *methods: Any) -> str | None:
    """Return in words why `accelerated(transformer, *methods)` would refuse, or None if it would not."""
    who = type(transformer).__name__
    if not isinstance(transformer, nn.Module):
        inside = (
            "; give it the pipeline's own, as in pipeline.transformer"
            if hasattr(transformer, "transformer")
            else ""
        )
        return f"accelerated() takes a transformer (torch.nn.Module), got {who}{inside}"
    if any(not isinstance(method, Accelerator) for method in methods):
        strange = next(method for method in methods if not isinstance(method, Accelerator))
        shown = f"the class {strange.__name__}" if isinstance(strange, type) else type(strange).__name__
        more = " of them: give one after the other" if isinstance(strange, list | tuple) else ""
        return f"accelerated() takes accelerators such as DeltaCache(), got {shown}{more}"
    if transformer.__dict__.get(seams.RUN) is not None:
        return f"{who} is already accelerated: end that with-block first, or give all methods to one accelerated()"
    if transformer._compiled_call_impl is not None or hasattr(transformer, "_orig_mod"):
        return (
            f"{who} is compiled as a whole, so no block can be left out; use compile_repeated_blocks() instead, or compile() "
            "of each block"
        )
    seen: dict[str, str] = {}
    for method in methods:
        if method.seam and method.seam in seen:
            return (
                f"{seen[method.seam]} and {method.name} both decide about {method.seam}; choose one of them"
            )
        seen[method.seam] = method.name
        words = method.refuses(transformer)
        if words is not None:
            return f"{method.name}: {words}"
    return None
