"""Gates: what decides, once a call and in plain Python, whether blocks are left out.

Paper: Forecasting When to Forecast: Accelerating Diffusion Models with Confidence-Gated Taylor; 2025; arXiv:2508.02240
    (confidence). ParaAttention's First Block Cache, 2025 (first-block). SeaCache: Spectral-Evolution-Aware Cache for
    Accelerating Diffusion Models; 2026; arXiv:2602.18993 (spectral).
Differs: one interface for all; the sample that changed most decides for its batch, never the mean; the calls left out
    in a row and the error they add up to are bounded; a signal that is not finite means a full call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from acceleration._latents import latents_of, relative, wiener
from acceleration._newton import Ladder
from dit.spec import Spec, kinds, knob, knobs, spec


@dataclass(slots=True)
class Sight:
    """What a gate may look at in a call: where it stands, its arguments, the main stream around the first block."""

    step: int
    at: float
    given: Mapping[str, Any]
    timestep: float | None = None
    before: Tensor | None = None
    after: Tensor | None = None


class Watch(Protocol):
    """What a gate remembers of one guidance branch."""

    @property
    def bytes(self) -> int:
        """Size of what is remembered."""

    def measure(self, sight: Sight) -> float | None:
        """Return the signal of a call, or None while there is nothing to compare with."""

    def anchor(self, sight: Sight) -> None:
        """Remember a call that is computed in full."""


class Gate(Spec):
    """The family of gates.

    `needs` is what a decision waits for: "plan" (nothing), "latent" (the arguments of the call) or "first block".
    """

    __slots__ = ()
    needs: ClassVar[str] = "plan"
    sums: ClassVar[bool] = False  # the signal is itself a sum since the last full call

    @property
    def neutral(self) -> bool:
        """Whether no call is ever shortened."""
        return False

    @property
    def reach(self) -> int:
        """The most steps between a full call and one that is made from it."""
        raise NotImplementedError(f"{type(self).__name__}.reach")

    def plans(self, step: int) -> bool:
        """Whether a step (from 0) may be shortened, whatever is measured."""
        return True

    def bounds(self) -> tuple[float, int, float] | None:
        """Return threshold, calls in a row and sum of errors up to which calls are shortened; None measures nothing."""
        return None

    def watch(self) -> Watch | None:
        """Return a fresh memory for one branch."""
        return None


@spec("interval")
class Interval(Gate):
    """Compute every n-th step in full."""

    interval: int = knob(default=2, label="Compute all blocks every n-th step", low=1, high=50, unit="steps")
    offset: int = knob(default=0, label="A step that is full", low=0, high=1000)

    @property
    def neutral(self) -> bool:
        return self.interval == 1

    @property
    def reach(self) -> int:
        return self.interval - 1

    def plans(self, step: int) -> bool:
        return (step - self.offset) % self.interval != 0


@spec("mask")
class Mask(Gate):
    """Follow a list of steps: 1 is full, 0 is shortened, steps beyond the list are full."""

    mask: str = knob(default="", label="Steps written as 1 (full) and 0 (shortened)")

    def check(self) -> None:
        """Raises: ValueError if the list is empty or holds anything but 0 and 1."""
        if not self.mask or set(self.mask) - set("01"):
            raise ValueError(f"mask: mask must be a row of 1 (full) and 0 (shortened), got {self.mask!r}")

    @property
    def neutral(self) -> bool:
        return "0" not in self.mask

    @property
    def reach(self) -> int:
        return max(len(run) for run in self.mask.split("1"))

    def plans(self, step: int) -> bool:
        return step < len(self.mask) and self.mask[step] == "0"


class _Measuring:
    """What gates share that shorten calls while a signal is below a threshold, within bounds."""

    __slots__ = ()
    threshold: float
    limit: int
    budget: float

    @property
    def neutral(self) -> bool:
        return self.threshold == 0 or self.limit == 0

    @property
    def reach(self) -> int:
        return self.limit

    def bounds(self) -> tuple[float, int, float]:
        return self.threshold, self.limit, self.budget * self.threshold


def _threshold(default: float) -> float:
    return knob(
        default=default, label="Signal below which a call is shortened", low=0.0, high=10.0, step=0.005
    )


def _limit() -> int:
    return knob(default=5, label="Most shortened calls in a row", low=0, high=50, unit="steps")


def _budget() -> float:
    return knob(default=3.0, label="Most error that adds up, in thresholds", low=0.1, high=100.0)


@spec("confidence", paper="CG-Taylor, arXiv:2508.02240")
class Confidence(_Measuring, Gate):
    """Shorten where the first block could be forecast: its forecast against what it really gave."""

    needs: ClassVar[str] = "first block"

    threshold: float = _threshold(0.1)
    limit: int = _limit()
    budget: float = _budget()
    measure: str = knob(
        default="residual", label="What of the first block is compared", choices=("residual", "output")
    )
    order: int = knob(default=1, label="Order of the forecast", low=0, high=3)

    def watch(self) -> Watch:
        return _FirstBlock(self.order, self.measure == "residual", to_truth=True)


@spec("first-block", paper="First Block Cache, ParaAttention 2025")
class FirstBlock(_Measuring, Gate):
    """Shorten where the first block adds nearly what it added at the last full call."""

    needs: ClassVar[str] = "first block"

    threshold: float = _threshold(0.1)
    limit: int = _limit()
    budget: float = _budget()

    def watch(self) -> Watch:
        return _FirstBlock(0, residual=True, to_truth=False)


@spec("spectral", paper="SeaCache, arXiv:2602.18993")
class Spectral(_Measuring, Gate):
    """Shorten while the latent, cleared of noise by a Wiener filter, has moved little since the last full call."""

    needs: ClassVar[str] = "latent"
    sums: ClassVar[bool] = True

    threshold: float = _threshold(0.25)
    limit: int = _limit()
    power: float = knob(
        default=2.0, label="Exponent of the spectrum (2 pictures, 3 video)", low=0.5, high=4.0
    )

    def bounds(self) -> tuple[float, int, float]:
        return self.threshold, self.limit, math.inf

    def watch(self) -> Watch:
        return _Spectrum(self.power)


GATES = tuple(kinds(Gate))


def gate_for(method: Any, **given: Any) -> Gate:
    """Return the gate that a method's knobs describe: its `gate` by name, with every knob of the same name handed on.

    Raises:
        ValueError: no such gate, or settings that the gate refuses.
    """
    cls = kinds(Gate)[method.gate]
    values = {one.name: given.get(one.name, getattr(method, one.name, None)) for one in knobs(cls)}
    return cls(**{name: value for name, value in values.items() if value is not None})


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a call is shortened, the signal that was measured, and why it is full where it is."""

    shorten: bool
    signal: float | None
    why: str


class Judge:
    """A gate at work on one guidance branch."""

    def __init__(self, gate: Gate) -> None:
        self.gate, self.watch = gate, gate.watch()
        self._row, self._spent = 0, 0.0

    @property
    def bytes(self) -> int:
        """Size of what the gate remembers."""
        return 0 if self.watch is None else self.watch.bytes

    def decide(self, sight: Sight, forced: str | None) -> Verdict:
        """Decide about a call; `forced` says in words why it must be full."""
        signal = None if self.watch is None else self.watch.measure(sight)
        why = self._objection(signal) if forced is None else forced
        if why is None:
            self._row += 1
            self._spent += signal or 0.0
        else:
            self._row, self._spent = 0, 0.0
            if self.watch is not None:
                self.watch.anchor(sight)
        finite = signal is not None and math.isfinite(signal)
        return Verdict(why is None, signal if finite else None, why or "below the threshold")

    def _objection(self, signal: float | None) -> str | None:
        bounds = self.gate.bounds()
        if bounds is None:
            return None
        threshold, limit, most = bounds
        if signal is None:
            return "nothing to compare with"
        if not math.isfinite(signal):
            return "the signal is not finite"
        if not signal < threshold:
            return "above the threshold"
        if self._row >= limit:
            return "too many shortened calls in a row"
        return None if self._spent + signal < most else "the errors add up to too much"


class _FirstBlock:
    """The first block's residual or output, forecast from its full calls and compared with what it is."""

    def __init__(self, order: int, residual: bool, to_truth: bool) -> None:
        self._ladder, self._residual, self._to_truth = Ladder(order), residual, to_truth

    @property
    def bytes(self) -> int:
        return self._ladder.bytes

    def measure(self, sight: Sight) -> float | None:
        value = self._value(sight)
        if value is None or not self._ladder.factors or not self._ladder.fits(value):
            return None
        forecast = self._ladder.at(sight.at)
        return relative(forecast, value) if self._to_truth else relative(value, forecast)

    def anchor(self, sight: Sight) -> None:
        value = self._value(sight)
        if value is not None:
            self._ladder.push(value, sight.at)

    def _value(self, sight: Sight) -> Tensor | None:
        if sight.before is None or sight.after is None:
            return None
        # The output may be written to after this call: it is copied, the difference is new anyway.
        return (sight.after - sight.before if self._residual else sight.after.clone()).detach()


class _Spectrum:
    """The latent after a Wiener filter for its noise level, and the way it has gone since the last full call."""

    def __init__(self, power: float) -> None:
        self._power = power
        self._last: list[Tensor] = []
        self._gone = self._largest = 0.0
        self._first: float | None = None

    @property
    def bytes(self) -> int:
        return sum(one.numel() * one.element_size() for one in self._last)

    def measure(self, sight: Sight) -> float | None:
        latents = latents_of(sight.given)
        if not latents:
            return None
        level, before = self._level(sight.timestep), self._last
        self._last = [wiener(one, level, self._power) for one in latents]
        if [one.shape for one in before] != [one.shape for one in self._last]:
            return None
        self._gone += max(relative(new, old) for new, old in zip(self._last, before, strict=True))
        return self._gone

    def anchor(self, sight: Sight) -> None:
        self._gone = 0.0

    def _level(self, timestep: float | None) -> float:
        """Return the noise level 0-1 of a timestep in 0-1 or 0-1000, falling or (where 1 is the picture) rising."""
        if timestep is None:
            return 0.5
        self._first = timestep if self._first is None else self._first
        self._largest = max(self._largest, timestep)
        scale = 1.0 if self._largest <= 1 else 1000.0
        level = timestep / scale
        return 1 - level if timestep > self._first else level
