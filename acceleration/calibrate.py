"""Choose a gate's threshold: one exact run shows signal and true error of every step, and every threshold is then played through.

Paper: Confidence-gated Taylor, 2025, arXiv:2508.02240 (whose thresholds are tuned for each model by hand).
Differs: the threshold follows from a wished speed-up or a wished error, and is bound to checkpoint, scheduler and steps.
    The run is exact, so that errors do not feed back into it: what a profile predicts is an estimate.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from acceleration._latents import latents_of, relative
from acceleration._newton import Ladder
from acceleration._ranges import Recording
from acceleration._reuse import Branch, watched
from acceleration.base import Accelerator, Call, Reached, Refused, Run, accelerated
from acceleration.gates import Judge, Sight
from acceleration.taylor_cache import TaylorCache
from dit.seams import timestep_of
from dit.spec import parse


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What an exact run said about a method's gate.

    `rows` holds for each threshold the fraction of block calls computed, and mean and largest relative error of what the
    blocks add, over all steps. `trace` holds signal and error of every step, made from the full steps just before it.
    """

    method: dict[str, Any]
    digest: str
    scheduler: str
    steps: int
    rows: list[dict[str, float]]
    trace: list[dict[str, Any]]

    def threshold(self, *, speedup: float | None = None, error: float | None = None) -> float:
        """Return the lowest threshold that gives a speed-up of the blocks, or the highest that keeps a mean error.

        Raises:
            ValueError: not exactly one wish, or one that no threshold fulfils.
        """
        if (speedup is None) == (error is None):
            raise ValueError("give either speedup= or error=")
        if speedup is not None:
            fitting = [row["threshold"] for row in self.rows if row["computed"] * speedup <= 1]
            best = 1 / min(row["computed"] for row in self.rows)
            if not fitting:
                raise ValueError(f"speedup must be at most {best:.2f} here, got {speedup}")
            return min(fitting)
        fitting = [row["threshold"] for row in self.rows if row["error"] <= (error or 0.0)]
        if not fitting:
            raise ValueError(
                f"error must be at least {min(row['error'] for row in self.rows):.4g} here, got {error}"
            )
        return max(fitting)

    def tuned(
        self,
        *,
        digest: str,
        scheduler: str,
        steps: int,
        speedup: float | None = None,
        error: float | None = None,
    ) -> TaylorCache:
        """Return the method with the threshold that fulfils a wish. Raises: ValueError, also outside the profile's range."""
        for name, given in (("digest", digest), ("scheduler", scheduler), ("steps", steps)):
            if given != getattr(self, name):
                raise ValueError(f"the profile is for {name} {getattr(self, name)!r}, got {given!r}")
        method = parse(Accelerator, self.method)
        assert isinstance(method, TaylorCache)
        return method.replace(threshold=self.threshold(speedup=speedup, error=error))

    def save(self, path: Path) -> None:
        """Write the profile as JSON: whole, or not at all."""
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile. Raises: ValueError if it is none."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is no calibration profile: {error}") from None


@dataclass(slots=True)
class _Seen:
    sight: Sight
    added: dict[tuple[int, str], Tensor]
    blocks: int


def calibrate(
    transformer: nn.Module,
    method: TaylorCache,
    play: Callable[[], Any],
    *,
    steps: int,
    digest: str = "",
    scheduler: str = "",
) -> Profile:
    """Play one run exactly (`play()` calls the pipeline) and return what it says about the method's gate.

    Every step's residual is kept in main memory until the end.

    Raises:
        Refused: the gate measures nothing, or the method cannot serve the transformer.
    """
    if method.gating().bounds() is None or method.level != "last-block":
        raise Refused(
            "only a gate that measures (confidence, first-block, spectral) at level=last-block has a threshold"
        )
    method = method.replace(threshold=1.0) if method.neutral else method
    reason = method.refuses(transformer)
    if reason is not None:
        raise Refused(f"{method.name}: {reason}")
    observer = _Observer(method)
    with accelerated(transformer, _Observed(observer), steps=steps):
        play()
    branches = [seen for seen in observer.seen.values() if seen]
    if not branches:
        raise Refused("the run has shown no step that could be recorded")
    trace = [row for key, seen in observer.seen.items() for row in _trace(method, key, seen)]
    signals = sorted({row["signal"] for row in trace if row["signal"]})
    top = max(signals, default=1.0) * (method.limit + 1)
    picked = {signals[round(i * (len(signals) - 1) / 15)] * 1.0001 for i in range(16)} if signals else set()
    rows = [
        _played(method.replace(threshold=min(10.0, one)), branches, steps) for one in sorted(picked | {top})
    ]
    exact = {"threshold": 0.0, "computed": 1.0, "error": 0.0, "largest": 0.0}
    return Profile(
        method=method.to_dict(),
        digest=digest,
        scheduler=scheduler,
        steps=steps,
        rows=[exact, *rows],
        trace=trace,
    )


def calibrated(
    transformer: nn.Module,
    method: TaylorCache,
    play: Callable[[], Any],
    *,
    folder: Path,
    digest: str,
    scheduler: str,
    steps: int,
    speedup: float | None = None,
    error: float | None = None,
) -> TaylorCache:
    """Return the method with the threshold that fulfils a wish, from the profile that `folder` holds of it.

    Without one for this method, checkpoint (`digest` tells it from others), scheduler and number of steps, `play()` is called
    for one exact run, and its profile is stored there.

    Raises:
        Refused: as `calibrate`.
        ValueError: as `Profile.tuned`, or a file in the profile's place that is none.
    """
    place = folder / stored_name(method, digest=digest, scheduler=scheduler, steps=steps)
    if place.is_file():
        profile = Profile.load(place)
    else:
        profile = calibrate(transformer, method, play, steps=steps, digest=digest, scheduler=scheduler)
        folder.mkdir(parents=True, exist_ok=True)
        profile.save(place)
    return profile.tuned(digest=digest, scheduler=scheduler, steps=steps, speedup=speedup, error=error)


def stored_name(method: TaylorCache, *, digest: str, scheduler: str, steps: int) -> str:
    """Return the file name of a profile; whatever the threshold, for that is what it finds."""
    about = [method.replace(threshold=None).to_dict(), digest, scheduler, steps]
    mark = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return f"{method.name}-{method.gate}-{steps}-{mark}.json"


class _Observed(Accelerator):
    """Lets an observer sit where a method would; it is no registered method."""

    __slots__ = ("observer",)
    name = "observed"

    def __init__(self, observer: _Observer) -> None:
        self.observer = observer

    def attached(self, transformer: nn.Module, run: Run) -> AbstractContextManager[None]:
        return run.controlled_by(self.observer)


@dataclass(slots=True)
class _Observer:
    """Compute every block; keep what the range adds and what a gate may look at, for each branch and evaluation."""

    method: TaylorCache
    seen: dict[tuple[str, int], list[_Seen]] = field(default_factory=dict)
    _sight: Sight | None = None
    _recording: Recording | None = None
    _branch: Branch | None = None

    def started(self, call: Call) -> bool:
        timestep = timestep_of(call.given)()
        timed = self.method.variable == "sigma" and timestep is not None
        step = call.moment.step
        latents = [one.detach().cpu().clone() for one in latents_of(call.given)]
        given = {"sample": [one[0] for one in latents] if len(latents) > 1 else next(iter(latents), None)}
        at = float(timestep or 0.0) if timed else float(step)
        self._sight = Sight(step, at, given, timestep)
        self._branch = Branch(len(call.run.blocks), Judge(self.method.gating()), careful=True)
        self._recording = Recording(self.method.span(step, None, 10**6), careful=True)
        return True

    def visited(self, call: Call, reached: Reached) -> Any:
        assert self._recording is not None
        assert self._sight is not None
        assert self._branch is not None
        if reached.place == 0 and 0 not in self._recording.span:
            output, _ = watched(self._sight, self._branch, call, reached)
            return output
        return self._recording.visited(call, reached)

    def finished(self, call: Call, failed: bool) -> None:
        recording, sight = self._recording, self._sight
        if failed or recording is None or sight is None:
            return
        if sight.before is not None and sight.after is not None:
            sight.before, sight.after = sight.before.cpu(), sight.after.detach().cpu().clone()
        added = {(part.first, name): x.cpu() for part in recording.finish() for name, x in part.added.items()}
        key = (call.moment.branch, call.moment.evaluation)
        if added:
            self.seen.setdefault(key, []).append(_Seen(sight, added, len(call.states)))


def _trace(method: TaylorCache, key: tuple[str, int], seen: list[_Seen]) -> list[dict[str, Any]]:
    """Return signal and error of each step, forecast from the steps just before it."""
    judge, stored, rows = Judge(method.gating()), _Stored(method), []
    for one in seen:
        verdict, error = judge.decide(one.sight, "observed"), stored.error(one)
        rows.append({
            "branch": key[0], "evaluation": key[1], "step": one.sight.step, "signal": verdict.signal, "error": error,
        })  # fmt: skip
        stored.push(one)
    return rows


def _played(method: TaylorCache, branches: list[list[_Seen]], steps: int) -> dict[str, float]:
    """Play a threshold through: what would be computed, and how wrong the forecasts would be."""
    computed = blocks = 0
    errors: list[float] = []
    for seen in branches:
        judge, stored = Judge(method.gating()), _Stored(method)
        for one in seen:
            planned = not method.allows(one.sight.step, steps) or not stored.ladders
            verdict = judge.decide(one.sight, "full by plan" if planned else None)
            blocks += one.blocks
            if verdict.shorten:
                errors.append(stored.error(one) or 0.0)
                computed += one.blocks - len(method.span(one.sight.step, steps, one.blocks))
            else:
                errors.append(0.0)
                computed += one.blocks
                stored.push(one)
    return {
        "threshold": float(method.threshold or 0.0),
        "computed": computed / blocks,
        "error": sum(errors) / len(errors),
        "largest": max(errors),
    }


class _Stored:
    """The ladders of one branch."""

    def __init__(self, method: TaylorCache) -> None:
        self.order = method.order
        self.ladders: dict[tuple[int, str], Ladder] = {}

    def push(self, one: _Seen) -> None:
        for key, value in one.added.items():
            self.ladders.setdefault(key, Ladder(self.order)).push(value, one.sight.at)

    def error(self, one: _Seen) -> float | None:
        """Return the relative error of the forecast, of the stream and sample where it is largest."""
        known = [(self.ladders[key], x) for key, x in one.added.items() if key in self.ladders]
        return max(
            (relative(ladder.at(one.sight.at), x) for ladder, x in known if ladder.fits(x)), default=None
        )
