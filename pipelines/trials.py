"""Trials: an accelerator on a scene (prompt and seed) against the exact picture, written to a log that survives a kill.

The log is one JSON line a trial, appended and flushed; the same trial is never made twice.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from acceleration.fitting import Course, Gram, Trajectory, settled
from acceleration.step_forecast import StepForecast
from pipelines import masks
from pipelines.compare import difference_of_clips
from pipelines.request import Request, RequestError
from pipelines.trajectories import courses

if TYPE_CHECKING:
    from pipelines.generate import OnStep, Progress
    from pipelines.result import Result

Methods = tuple[Any, ...]
REFIT_ON, REFIT_BYTES = 16, 2 << 30
"""Runs that a forecast is fitted anew to, and the memory that they may take."""
HIGHEST = 100.0
"""PSNR in dB that an identical picture counts as in a mean."""


class TimeUp(Exception):
    """The time that was given is used up."""


@dataclasses.dataclass(frozen=True, slots=True)
class Scene:
    """A picture to try things on: a prompt, or a class number, and a seed."""

    prompt: str
    class_label: int | None
    seed: int

    def of(self, request: Request) -> Request:
        """Return the exact request for this scene with the settings of `request`."""
        return request.replace(
            prompt=self.prompt, class_label=self.class_label, seed=self.seed, images=1,
            accelerators=(), profile=None,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What came of it: PSNR in dB, SSIM, fraction of block calls computed, seconds of the denoising loop, a failure in words.

    `sketch` stands for the difference (`masks.sketch`); empty where it was not asked for.
    """

    psnr: float = 0.0
    ssim: float = 0.0
    fraction: float = 1.0
    seconds: float = 0.0
    failure: str = ""
    sketch: str = ""

    def vector(self) -> Any:
        """Return the sketch as numbers."""
        return np.frombuffer(base64.b64decode(self.sketch), dtype="<f4").astype(np.float64)


class Clock:
    """Wall-clock time, and an `on_step` that stops a run when it is over."""

    def __init__(self, minutes: float, on_step: OnStep | None = None) -> None:
        self.begin = time.monotonic()
        self.end = self.begin + minutes * 60
        self._on_step = on_step
        self.asked = False  # somebody else has stopped the run

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.begin

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    def on_step(self, progress: Progress) -> bool:
        """Hand the news on; False at the end of the time, or where the caller stops."""
        if self._on_step is not None and self._on_step(progress) is False:
            self.asked = True
            return False
        return self.left > 0

    @contextlib.contextmanager
    def running(self) -> Any:
        """Turn a run that this clock has stopped into `TimeUp`."""
        from pipelines.generate import Cancelled

        if self.left <= 0:
            raise TimeUp
        try:
            yield
        except Cancelled:
            if self.asked:
                raise
            raise TimeUp from None


class Log:
    """Trials by accelerators and scene; those of earlier runs are read again.

    Args:
        path: the file; a line that a kill has torn is left out and overwritten by a line break.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.trials, self.found = path, {}, 0
        with contextlib.suppress(FileNotFoundError):
            for line in path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    one = json.loads(line)
                    key = str(one.pop("key"))
                    self.trials[key] = Trial(**one)
        self.found = len(self.trials)
        self._torn = path.exists() and not path.read_bytes().endswith(b"\n")

    trials: dict[str, Trial]

    def add(self, key: str, trial: Trial) -> None:
        """Append a trial and wait until it is on the disk."""
        line = json.dumps({"key": key} | dataclasses.asdict(trial)) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + line if self._torn else line)
            file.flush()
            os.fsync(file.fileno())
        self._torn, self.trials[key] = False, trial


class Bench:
    """Makes trials of one model with one setting of steps, size, scheduler and guidance."""

    def __init__(self, base: Request, clock: Clock, log: Log | None = None) -> None:
        self.base, self.clock, self.log = base, clock, log
        self.runs = 0
        self.exact_seconds: list[float] = []
        self._exact: dict[Scene, Result] = {}
        self._gram = Gram()
        self._courses: dict[Scene, Course] = {}

    def exact(self, scene: Scene) -> Result:
        """Return the exact result of a scene, made once."""
        if scene not in self._exact:
            found = self._recorded(scene)
            if found.report["failures"]:
                raise RequestError(
                    "model",
                    self.base.model,
                    f"one whose exact pictures hold something: {found.report['failures'][0]}",
                )
            self._exact[scene] = found
            self.exact_seconds.append(float(found.report["timings"]["denoise"]))
        return self._exact[scene]

    def trajectory(self, scenes: Sequence[Scene], enough: Callable[[], bool]) -> Trajectory | None:
        """Record exact runs of scenes until `enough`; None where the scheduler is none whose steps can be fitted."""
        for scene in scenes:
            if enough():
                break
            if scene not in self._exact:
                self._recorded(scene)
        return self._gram.trajectory() if self._gram.pictures else None

    def _recorded(self, scene: Scene) -> Result:
        """Make an exact run and take in its course."""
        with courses() as found:
            made = self._made(scene.of(self.base))
        for one in found:
            self._gram.add([velocity[None] for velocity in one.velocities], one.sigmas)
        if len(self._courses) < REFIT_ON and len(found) == 1 and found[0].bytes * REFIT_ON <= REFIT_BYTES:
            self._courses[scene] = found[0].cpu()
        return made

    def settled(self, method: StepForecast, enough: Callable[[], bool]) -> StepForecast:
        """Return the best of a fitted forecast and its refits to the runs it makes of recorded scenes, begun until `enough`."""
        known = dict(self._courses)

        def make(one: StepForecast) -> list[Course]:
            found: list[Course] = []
            for scene in known:
                with courses() as made:
                    self._made(scene.of(self.base).replace(accelerators=(one,)))
                found += [course.cpu() for course in made]
            return found

        if not known or enough():
            return method
        return settled(method, list(known.values()), make, rounds=2)

    def trial(self, methods: Methods, scene: Scene, *, sketched: bool = False) -> Trial:
        """Return the trial of some accelerators on a scene, from the log or made now. Raises: TimeUp."""
        key = json.dumps([[str(one) for one in methods], dataclasses.astuple(scene)])
        known = self.log.trials.get(key) if self.log else None
        if known is not None and (known.sketch or known.failure or not sketched):
            return known
        exact = self.exact(scene)
        try:
            found = self._made(scene.of(self.base).replace(accelerators=methods))
            trial = self._measured(found, exact, sketched)
        except (RequestError, RuntimeError) as error:  # refused, or without effect: that is a result too
            trial = Trial(failure=str(error)[:300] or type(error).__name__)
        if self.log is not None:
            self.log.add(key, trial)
        return trial

    @property
    def second(self) -> float:
        """Median time of an exact denoising loop in s."""
        return statistics.median(self.exact_seconds)

    def _made(self, request: Request) -> Result:
        from pipelines.generate import generate

        with self.clock.running():
            self.runs += 1
            return generate(request, on_step=self.clock.on_step, retry=False)

    @staticmethod
    def _measured(found: Result, exact: Result, sketched: bool) -> Trial:
        report = found.report
        apart = difference_of_clips(found.clips[0], exact.clips[0])
        fraction = float(report["run"].get("fraction", 1.0))
        idle = "had no effect here" if fraction == 1.0 and apart.largest == 0 else ""
        sketch = b""
        if sketched:
            gap = _pixels(found) - _pixels(exact)
            sketch = masks.sketch(gap).astype("<f4").tobytes()
        return Trial(
            psnr=min(apart.psnr, HIGHEST),
            ssim=apart.ssim,
            fraction=fraction,
            seconds=float(report["timings"]["denoise"]),
            failure="; ".join(report["failures"]) or idle,
            sketch=base64.b64encode(sketch).decode(),
        )


def mean(trials: Sequence[Trial]) -> Trial:
    """Return the mean of some trials; the first failure is a failure of all."""
    failure = next((one.failure for one in trials if one.failure), "")
    if failure:
        return Trial(failure=failure)
    psnr, ssim, fraction, seconds = (
        math.fsum(getattr(one, name) for one in trials) / len(trials)
        for name in ("psnr", "ssim", "fraction", "seconds")
    )
    return Trial(psnr=psnr, ssim=ssim, fraction=fraction, seconds=seconds)


def scenes_for(prompts: Sequence[str], classes: int | None, count: int, seed: int) -> list[Scene]:
    """Return `count` scenes with seeds from `seed` on, taking the prompts, or classes spread evenly, in turns."""
    if classes is not None:
        labels = [place * classes // count for place in range(count)]
        return [Scene("", label, seed + place) for place, label in enumerate(labels)]
    return [Scene(prompts[place % len(prompts)], None, seed + place) for place in range(count)]


Tell = Callable[[str], object]


def _pixels(result: Result) -> Any:
    return np.stack([np.asarray(one.convert("RGB"), dtype=np.float64) for one in result.clips[0]])
