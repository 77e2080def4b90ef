"""What methods around blocks share: a gate decides about each call, a full call is recorded, a shortened one replayed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn

from acceleration._newton import Ladder
from acceleration._ranges import Held, Part, Recording, Replay
from acceleration.base import Call, Reached, Run
from acceleration.gates import Gate, Judge, Sight
from dit.seams import match, timestep_of

_MAIN = ("hidden_states", "x", "visual_embed")
_LOG = logging.getLogger(__name__)
_TOLD = 2**20
"""Bytes from which on it is said beforehand what will be stored."""


class Plan(Protocol):
    """What a method lays down: when blocks may be left out, and which."""

    @property
    def name(self) -> str:
        """The registered name."""

    @property
    def neutral(self) -> bool:
        """Whether nothing is ever left out."""

    def gating(self) -> Gate:
        """Return the gate that decides."""

    def allows(self, step: int, steps: int | None) -> bool:
        """Whether a step may be shortened if the gate agrees."""

    def records(self, step: int, steps: int | None) -> bool:
        """Whether a full step has to be recorded."""

    def span(self, step: int, steps: int | None, blocks: int) -> range:
        """Return the places of the blocks that are left out in a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How the stored is made into what a shortened call adds, and the letter of that in the report."""

    letter: str = "R"
    order: int = 0
    variable: str = "index"
    offload: bool = False


class Way(Protocol):
    """What happens to the blocks of one call."""

    def visited(self, call: Call, reached: Reached) -> Any:
        """Answer for a block."""


@dataclass(slots=True)
class Branch:
    """What one branch knows: how its forward is built, and what was recorded at its last full steps."""

    blocks: int
    judge: Judge
    careful: bool = False
    parts: list[Part] = field(default_factory=list)
    ladders: list[dict[str, Ladder]] = field(default_factory=list)
    span: range | None = None
    step: int = -1
    expected: int = 0  # bytes that will be stored when there are as many anchors as the order asks for
    foretold: bool = False  # whether that was said, at the first block

    @property
    def bytes(self) -> int:
        """Size of what is stored."""
        stored = sum(one.bytes for ladders in self.ladders for one in ladders.values())
        return stored + self.judge.bytes

    @property
    def empty(self) -> bool:
        """Whether there is nothing to make a call from."""
        return not self.parts

    def clear(self) -> None:
        """Forget what was recorded."""
        self.parts, self.ladders, self.span = [], [], None

    def keep(self, parts: list[Part], at: float, manner: Manner) -> None:
        """Take what a full call recorded at `at`, as one more anchor where it is of the same form."""
        same = len(parts) == len(self.parts) and all(
            new.first == old.first and new.blocks == old.blocks and new.added.keys() == old.added.keys()
            for new, old in zip(parts, self.parts, strict=True)
        )
        if not same:
            self.ladders = [
                {name: Ladder(manner.order, manner.offload) for name in part.added} for part in parts
            ]
        for part, ladders in zip(parts, self.ladders, strict=True):
            for name, ladder in ladders.items():
                ladder.push(part.added[name], at)
                part.added[name] = ladder.factors[0]
        self.parts = parts
        orders = manner.order + 1, getattr(self.judge.gate, "order", 0) + 1
        stored = sum(part.bytes for part in parts) * orders[0]
        self.expected = max(self.expected, stored + (0 if self.expected else self.judge.bytes * orders[1]))

    def forecast(self, at: float) -> list[Part]:
        """Return the parts with what they are expected to add at `at`."""
        return [
            replace(part, added={name: ladder.at(at) for name, ladder in ladders.items()})
            for part, ladders in zip(self.parts, self.ladders, strict=True)
        ]


class Reuse:
    """Decide once for each call, in plain Python: record the range, replay it, or leave the call alone.

    `unknown` says what it means for the method if the number of steps is not known.
    """

    def __init__(self, plan: Plan, run: Run, manner: Manner, unknown: str = "") -> None:
        self.unknown = unknown
        self.plan, self.run, self.manner, self.gate = plan, run, manner, plan.gating()
        self._branch: Branch | None = None
        self._way: Way | None = None
        self._shortened = False
        self._waiting: tuple[Sight, str | None] | None = None  # for the first block
        self._approximated: dict[tuple[str, int], tuple[int, bool]] = {}
        self._forms: dict[int, str | None] = {}  # of the blocks of the first step, why each cannot be left out

    @property
    def unfit(self) -> str | None:
        """Why no block of the first step can ever be left out, in words, or None if one can."""
        reasons = [one for one in self._forms.values() if one is not None]
        return "; ".join(dict.fromkeys(reasons)) if reasons and len(reasons) == len(self._forms) else None

    def started(self, call: Call) -> bool:
        """Decide about a call, or leave it to the first block."""
        self._way = self._waiting = self._branch = None
        self._shortened = False
        if self.plan.neutral:
            return False
        if self.run.clock.steps is None and self.unknown:
            self.run.note(f"the number of steps is unknown, so {self.unknown}; give steps=")
        branch = self._branch = call.state(self, self._fresh)
        sight, forced = self._sight(call), self._forced(call, branch)
        if self.gate.needs == "first block":
            self._waiting = (sight, forced)
        else:
            self._decide(call, branch, sight, forced)
        return True

    def visited(self, call: Call, reached: Reached) -> Any:
        """Answer for a block as decided; where the decision waits for the first block, compute it and decide."""
        if self._waiting is not None and self._branch is not None:
            (sight, forced), self._waiting = self._waiting, None
            output, reason = watched(sight, self._branch, call, reached)
            self._decide(call, self._branch, sight, forced or reason)
        else:
            output = call.compute(reached) if self._way is None else self._way.visited(call, reached)
        if reached.place == 0 and self._branch is not None and not self._branch.foretold:
            self._foretell(self._branch, reached, output)
        if not self.run.judged:
            form = match(reached.block.module, reached.tensors(), output)
            self._forms[reached.place] = form if isinstance(form, str) else None
        return output

    def finished(self, call: Call, failed: bool) -> None:
        """Keep what a full call recorded."""
        way, branch = self._way, self._branch
        self._way = self._branch = self._waiting = None
        if branch is None:
            return
        if failed:
            branch.clear()
            branch.judge = Judge(self.gate)
            return
        branch.blocks = len(call.states)
        self._conclude(call, branch, way)

    def _fresh(self) -> Branch:
        return Branch(len(self.run.blocks), Judge(self.gate))

    def _sight(self, call: Call) -> Sight:
        timed = self.manner.variable == "sigma" or self.gate.needs == "latent"
        timestep = timestep_of(call.given)() if timed else None
        step = call.moment.step
        if self.manner.variable == "sigma" and timestep is None:
            self.run.note(
                f"{self.plan.name}: no timestep is given, so the forecast goes by the step's number"
            )
        by_time = self.manner.variable == "sigma" and timestep is not None
        return Sight(step, float(timestep or 0.0) if by_time else float(step), call.given, timestep)

    def _foretell(self, branch: Branch, reached: Reached, output: Any) -> None:
        """Say (in the report, and on standard error where nobody set up logging) what will be stored, before anything is."""
        branch.foretold = True
        inputs = reached.tensors()
        form = match(reached.block.module, inputs, output)
        if isinstance(form, str) or not form.names:
            return
        sizes = {name: inputs[name].numel() * inputs[name].element_size() for name in form.split(output)}
        main = sizes[main_stream({name: inputs[name] for name in sizes})]
        expected = self._expected(sizes, main) * (self.manner.order + 1)
        if self.gate.needs == "first block":
            expected += main * (getattr(self.gate, "order", 0) + 1)
        words = f"{self.plan.name} will store {expected / 2**20:.1f} MiB for each guidance branch of this size (an estimate)"
        if expected >= _TOLD and words not in self.run.notes:
            self.run.note(words)
            _LOG.warning(words)

    def _expected(self, sizes: dict[str, int], main: int) -> int:
        """Return the bytes of one anchor, from those of the streams; `main` is the picture's."""
        return sum(sizes.values())

    def _forced(self, call: Call, branch: Branch) -> str | None:
        """Say in words why a call has to be full before anything is measured; None if it need not."""
        plan, steps, step = self.plan, self.run.clock.steps, call.moment.step
        if not plan.allows(step, steps) or not self.gate.plans(step):
            return "full by plan"
        if self.gate.bounds() is not None and not branch.empty and step - branch.step > self.gate.reach:
            return "too many steps since the last full one"
        stale = self._stale(call, branch)
        if stale is not None:
            self._want()
            self.run.note(f"{plan.name} computed a call in full that it meant to shorten: {stale}")
        return stale

    def _decide(self, call: Call, branch: Branch, sight: Sight, forced: str | None) -> None:
        verdict, bounds = branch.judge.decide(sight, forced), self.gate.bounds()
        if bounds is not None:
            call.remarks.update(
                signal=verdict.signal,
                threshold=bounds[0],
                decision=("shortened: " if verdict.shorten else "full: ") + verdict.why,
            )
        self._shortened = verdict.shorten
        if verdict.shorten:
            self._want()
            self._way = self._replay(branch, sight.at)
        elif self.plan.records(sight.step, self.run.clock.steps):
            self._way = self._recording(branch, sight)
        key = (call.moment.branch, call.moment.evaluation)
        self._approximated[key] = (sight.step, verdict.shorten)

    def _want(self) -> None:
        self.run.wanted[self.plan.name] = self.run.wanted.get(self.plan.name, 0) + 1

    def _replay(self, branch: Branch, at: float) -> Way:
        return Replay(branch.forecast(at), self.manner.letter)

    def _recording(self, branch: Branch, sight: Sight) -> Way:
        if self.manner.order == 0:
            branch.parts, branch.ladders = [], []  # freed before the new ones are made
        branch_span = self.plan.span(sight.step + 1, self.run.clock.steps, branch.blocks)
        return _Marked(branch_span, branch.careful, at=sight.at)

    def _conclude(self, call: Call, branch: Branch, way: Way | None) -> None:
        if isinstance(way, Replay) and way.strayed:
            self.run.note(
                "the order of the blocks changed between two calls; the next call was computed in full"
            )
            branch.clear()
        if isinstance(way, _Marked):
            self._keep(call, branch, way)

    def _keep(self, call: Call, branch: Branch, way: _Marked) -> None:
        """Keep what a full call recorded, if it is of the range that the next step will ask for."""
        parts, step, steps = way.finish(), call.moment.step, self.run.clock.steps
        for reason in way.reasons:
            self.run.note(reason)
        branch.careful = branch.careful or way.careful or way.overwritten
        if way.overwritten or way.span != self.plan.span(step + 1, steps, branch.blocks):
            branch.clear()
            return
        branch.keep(parts, way.at, self.manner)
        branch.span, branch.step = way.span, step
        self.run.weigh()

    def _stale(self, call: Call, branch: Branch) -> str | None:
        """Say why what was recorded may not stand in for the blocks in this call; None if it may."""
        moment, steps = call.moment, self.run.clock.steps
        if branch.empty:
            return "nothing was recorded yet for this branch, size and type"
        if branch.span != self.plan.span(moment.step, steps, branch.blocks):
            return "another range of blocks was recorded"
        if not 0 < moment.step - branch.step <= self.gate.reach:
            return "what was recorded for this branch is too old"
        if moment.corrects is not None:
            step, evaluation = moment.corrects
            if self._approximated.get((moment.branch, evaluation)) == (step, True):
                return "it corrects an evaluation that was itself shortened"
        return None


class _Marked(Recording):
    """A recording of a call that stands at `at`."""

    def __init__(self, span: range, careful: bool, at: float) -> None:
        super().__init__(span, careful)
        self.at = at


def watched(
    sight: Sight,
    branch: Branch,
    call: Call,
    reached: Reached,
) -> tuple[Any, str | None]:
    """Compute the first block and show its main stream to the gate; also in words why it cannot be shown."""
    inputs = reached.tensors()
    held = {name: Held.take(x, branch.careful) for name, x in inputs.items()}
    output = call.compute(reached)
    form = match(reached.block.module, inputs, output)
    if isinstance(form, str):
        return output, form
    streams = form.split(output)
    name = main_stream(streams)
    sight.before, sight.after = held[name].value, streams[name]
    if sight.before is None:
        if branch.careful:
            return output, "the first block writes into its input"
        branch.careful = True  # from the next call on its input is copied
        return output, "the first block may have written into its input"
    return output, None


def main_stream(streams: dict[str, Tensor]) -> str:
    """Return the name of the stream that carries the picture: by its usual names, or else the largest."""
    return next((name for name in _MAIN if name in streams), max(streams, key=lambda n: streams[n].numel()))


def predicted_speedup(plan: Plan, steps: int, blocks: int) -> float:
    """Estimate the speed-up of the denoising loop from a plan: every step that may be shortened is, up to the gate's reach."""
    gate, row, spared = plan.gating(), 0, 0
    for step in range(steps):
        shortened = plan.allows(step, steps) and gate.plans(step) and row < gate.reach
        row = row + 1 if shortened else 0
        spared += len(plan.span(step, steps, blocks)) if shortened else 0
    return steps * blocks / max(1, steps * blocks - spared)


def untouched(plan: Plan, run: Run, letter: str) -> str | None:
    """Return in words why no block of a run has the letter of the plan although one should, or None."""
    if run.shortened(letter) or plan.neutral:
        return None
    if not run.saw_blocks:
        return "none of its blocks was called"
    return "; ".join(run.notes) if run.wanted.get(plan.name) or run.unknown else None


def hopeless(plan: Plan, run: Run) -> str | None:
    """Return in words why a plan will have no effect, as far as the first step shows it, or None."""
    if plan.neutral:
        return None
    if run.unknown:
        return "; ".join(run.notes)
    return getattr(run.control, "unfit", None) if run.saw_blocks else "none of its blocks was called"


def places(states: str, letter: str) -> str:
    """Write where the blocks of a call have a letter, as `7-27` or `0-4 and 6-9`."""
    ranges: list[list[int]] = []
    for place, state in enumerate(states):
        if state == letter:
            if ranges and ranges[-1][1] == place - 1:
                ranges[-1][1] = place
            else:
                ranges.append([place, place])
    return " and ".join(f"{first}-{last}" if last > first else str(first) for first, last in ranges)


def prefetches(module: nn.Module) -> bool:
    """Whether group offloading with streams loads the weights of this block while the one before it runs."""
    registry = module.__dict__.get("_diffusers_hook")
    hooks = getattr(registry, "hooks", {})
    return any("lazy_prefetch" in name for name in hooks)
