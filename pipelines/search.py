"""Search accelerator settings across methods: cheap trials first, the better half again on more pictures, then rows of steps.

Paper: Non-stochastic Best Arm Identification and Hyperparameter Optimization, Jamieson and Talwalkar 2015, arXiv:1502.07943
    (successive halving).
Differs: two aims at once (time and likeness), so layers of the Pareto front are kept, not the best half of a ranking; the
    steps to compute are searched directly, from the measured effect of each.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from acceleration.base import Accelerator
from acceleration.delta_cache import DeltaCache
from acceleration.fitting import fits
from acceleration.step_forecast import StepForecast
from acceleration.taylor_cache import TaylorCache
from dit.spec import knobs
from pipelines import masks
from pipelines.pareto import Point, layers
from pipelines.trials import Bench, Methods, Scene, Tell, Trial, mean

COARSE = (0.75, 0.62, 0.5, 0.43, 0.36, 0.3, 0.25, 0.2, 0.15)
"""Parts of the steps that are full in the rows measured first."""
SCREENED, EXPLORED = 0.5, 0.7
"""Parts of the search time after which no further method is screened, and no further single step measured."""

RECORDED, FITTED = 0.12, 0.35
"""Parts of the search time after which no further run is recorded, and no further fitted forecast is measured."""
REFITTED = 0.45
"""Part of the search time after which none is fitted anew to the runs that it makes."""

DECIBELS = 12.0
"""What twice the speed-up costs, roughly, where two methods have no speed-up in common."""
SURER = 4
"""How many rows with more full steps than are needed are measured on all pictures, should the wish fail on other ones."""


def guarded(steps: int) -> int:
    """Return how many steps at the start stay full in rows: they decide what the picture shows, and a few pictures flip."""
    return min(3, max(1, steps // 8))


def rowed(base: Accelerator, row: str) -> Accelerator:
    """Return a method that follows a row of steps."""
    return base.replace(gate="mask", mask=row)


BASES: tuple[Accelerator, ...] = (
    DeltaCache(mode="whole", warmup=1, final_full=0),
    TaylorCache(fresh=1, warmup=1, final_full=0),
    TaylorCache(fresh=0, order=1, warmup=1, final_full=0),
    DeltaCache(mode="rear", cached_fraction=0.75, warmup=1, final_full=0),
)
"""What a row of steps can be followed with."""


def candidates(steps: int, tokens: int, kinds: Iterable[type[Accelerator]]) -> list[Methods]:
    """Return what is screened, most promising first; methods that need long sequences only where there are enough tokens."""
    found: list[Accelerator] = [
        rowed(base, masks.every(interval, steps)) for interval in (2, 3) for base in BASES
    ]
    found += [StepForecast(interval=interval) for interval in (2, 3, 4)]
    found += [DeltaCache(mode="whole", interval=interval) for interval in (2, 3, 4)]
    found += [DeltaCache(), DeltaCache(interval=3), DeltaCache(interval=4, cached_fraction=0.9)]
    found += [DeltaCache(mode="front"), DeltaCache(mode="whole", gate="spectral", threshold=0.2)]
    found += [TaylorCache(interval=interval) for interval in (2, 3, 5)]
    found += [TaylorCache(gate="confidence", order=order, threshold=0.1) for order in (0, 1)]
    found += [TaylorCache(gate="first-block", threshold=0.1), TaylorCache(gate="spectral", threshold=0.2)]
    found += [TaylorCache(interval=2, order=1, variable="sigma"), TaylorCache(interval=2, order=2)]
    found.append(TaylorCache(interval=3, order=1, level="modules"))
    for kind in kinds:
        if any(one.name == "min_tokens" for one in knobs(kind)):
            made: Any = kind()
            if made.min_tokens <= tokens:
                found.append(made)
    return [(one,) for one in found if not one.neutral]


class Search:
    """One search: its trials, the points they make, and the stages that add to them.

    Args:
        seconds: the search time, from now on.
        psnr, speedup: the wish; one of them is None.
        recorded: pictures beside `scenes` whose exact runs a forecast of whole steps is fitted to.
        heard: hears of the search whenever a point was added to it.
    """

    def __init__(
        self,
        bench: Bench,
        scenes: Sequence[Scene],
        seconds: float,
        *,
        psnr: float | None,
        speedup: float | None,
        tell: Tell,
        recorded: Sequence[Scene] = (),
        heard: Callable[[Search], object] = lambda _: None,
    ) -> None:
        self.bench, self.scenes, self.tell, self.heard = bench, list(scenes), tell, heard
        self.recorded = [*scenes, *recorded]
        self.psnr, self.speedup = psnr, speedup
        self.begin, self.seconds = bench.clock.spent, seconds
        self.tried: dict[str, tuple[Methods, list[Trial]]] = {}

    def run(self, steps: int, tokens: int, kinds: Iterable[type[Accelerator]]) -> None:
        """Go through all stages; `TimeUp` ends any of them, and what was found stays."""
        self._fitted(steps)
        self._screen(candidates(steps, tokens, kinds))
        for place, base in enumerate(self.ranked(steps)[:2]):
            effects = self.effects(base, steps, careful=place > 0)
            if effects is not None:
                self._rows(base, effects)

    def points(self, pictures: int = 1) -> list[Point]:
        """Return everything that was tried without failure on at least so many pictures."""
        return [
            self.point(methods, trials)
            for methods, trials in self.tried.values()
            if len(trials) >= pictures and not mean(trials).failure
        ]

    def point(self, methods: Methods, trials: Sequence[Trial]) -> Point:
        """Return the point that some trials make."""
        one = mean(trials)
        return Point(
            methods=methods, speedup=self.estimate(one), psnr=one.psnr, ssim=one.ssim, fraction=one.fraction,
            pictures=len(trials),
        )  # fmt: skip

    def estimate(self, trial: Trial) -> float:
        """Estimate the speed-up of the denoising loop: from block calls, or (attention thinned out) from the time taken."""
        if trial.fraction == 1.0:
            return self.bench.second / trial.seconds if trial.seconds else 1.0
        return 1 / (trial.fraction + (1 - trial.fraction) * self.overhead())

    def overhead(self) -> float:
        """Return the time of a call whose blocks are all left out, as a part of a full one; measured over all trials."""
        shares = [
            (one.seconds / self.bench.second - one.fraction) / (1 - one.fraction)
            for _, trials in self.tried.values()
            for one in trials
            if one.fraction < 0.75 and not one.failure
        ]
        return min(0.5, max(0.02, statistics.median(shares))) if shares else 0.05

    def used(self) -> float:
        """Return the part of the search time that is used up."""
        return (self.bench.clock.spent - self.begin) / self.seconds

    def measure(self, methods: Methods, pictures: int, floor: Sequence[Trial] | None = None) -> list[Trial]:
        """Try methods on the first pictures; with a `floor` stop as soon as they fall behind it."""
        trials: list[Trial] = []
        for place, scene in enumerate(self.scenes[:pictures]):
            trials.append(self.bench.trial(methods, scene))
            known = self.tried.get(_key(methods), (methods, []))[1]
            if len(trials) > len(known):
                self.tried[_key(methods)] = (methods, list(trials))
                self.heard(self)
            if trials[-1].failure:
                break
            if floor is not None:
                ahead = math.fsum(a.psnr - b.psnr for a, b in zip(trials, floor, strict=False)) / len(trials)
                if ahead < (-0.3 if place == 0 else 0.0):
                    break
        return trials

    def _fitted(self, steps: int) -> None:
        """Fit forecasts of whole steps to recorded exact runs; measure all on two pictures, those near the wish on all."""
        self.tell("fitting forecasts of whole steps to exact runs")
        trajectory = self.bench.trajectory(self.recorded, lambda: self.used() > RECORDED)
        if trajectory is None or trajectory.steps != steps:
            return
        counts = range(max(2, steps // 8), max(3, round(0.8 * steps)))
        ladder = {full: (method,) for full, method in fits(trajectory, counts).items()}
        for methods in ladder.values():
            if self.used() > FITTED:
                break
            self.measure(methods, 2)
        points = {full: self._known(methods) for full, methods in ladder.items()}
        near = [full for full, one in points.items() if one is not None and self.wished(one)]
        edge = (min(near) if self.psnr is not None else max(near)) if near else max(counts)
        close = sorted(counts, key=lambda one: abs(one - edge))[: SURER + 2]
        for full in close:
            if self.used() > FITTED:
                break
            self.measure(ladder[full], len(self.scenes))
        self.tell("fitting them anew to the runs that they make")
        for full in close:
            if self.used() > REFITTED:
                break
            method = self.bench.settled(ladder[full][0], lambda: self.used() > REFITTED)
            if method != ladder[full][0]:
                self.measure((method,), len(self.scenes))

    def _known(self, methods: Methods) -> Point | None:
        known = self.tried.get(_key(methods))
        return None if known is None or mean(known[1]).failure else self.point(*known)

    def _screen(self, found: Sequence[Methods]) -> None:
        """Try all candidates on one picture, the better half on two, thresholds around the best on the way, the rest on all."""
        self.tell(f"screening {len(found)} settings")
        for methods in found:
            if self.used() > SCREENED * 0.8:
                break
            self.measure(methods, 1)
        kept = layers(self.points(), len(found) // 2)
        for one in [*kept, *(self._moved(point) for point in kept)]:
            if self.used() > SCREENED * 0.9:
                break
            if one is not None:
                self.measure(one.methods if isinstance(one, Point) else one, 2)
        for point in layers(self.points(2), len(found) // 6):
            if self.used() > SCREENED * 0.95:
                break
            self.measure(point.methods, len(self.scenes))

    def _moved(self, point: Point) -> Methods | None:
        """Return a gate that measures with a threshold nearer to the wish."""
        (method, *rest) = point.methods
        threshold = getattr(method, "threshold", None)
        if threshold is None:
            return None
        careful = point.psnr < self.psnr if self.psnr is not None else point.speedup > (self.speedup or 1)
        return (method.replace(threshold=min(10.0, threshold * (0.6 if careful else 1.6))), *rest)

    def ranked(self, steps: int) -> list[Accelerator]:
        """Return the bases of rows of steps, the one first that promises most at the wish; all are tried alike."""
        self.tell("choosing what follows a row of steps")
        rows = list(dict.fromkeys(masks.every(interval, steps) for interval in (2, 3, 4)))
        points: dict[int, list[Point]] = {place: [] for place in range(len(BASES))}
        for row in rows:
            if self.used() > SCREENED and points[0]:
                break
            for place, base in enumerate(BASES):
                methods = (rowed(base, row),)
                if methods[0].neutral:
                    continue
                trials = self.measure(methods, 3)
                if not mean(trials).failure:
                    points[place].append(self.point(methods, trials))
        worth = {place: self._worth(seen) for place, seen in points.items() if seen}
        return [BASES[place] for place in sorted(worth, key=lambda place: -worth[place])]

    def _worth(self, points: Sequence[Point]) -> float:
        """Return what a base is worth: speed-up and PSNR of the point nearest to the wish, one set against the other."""
        if self.psnr is not None:
            wish = self.psnr
            near = min(points, key=lambda one: abs(one.psnr - wish))
        else:
            speedup = self.speedup or 1.0
            near = min(points, key=lambda one: abs(math.log(one.speedup / speedup)))
        return math.log2(near.speedup) + near.psnr / DECIBELS

    def effects(self, base: Accelerator, steps: int, *, careful: bool = False) -> masks.Effects | None:
        """Measure each single shortened step, on as many pictures as time allows; where one is too much, every n-th step.

        With `careful` nothing is measured that does not fit into the time that is left.
        """
        second = self.bench.second * 1.1
        allowed = (EXPLORED - self.used()) * self.seconds
        if careful:
            allowed = (0.9 - self.used()) * self.seconds / 2
        pictures = min(len(self.scenes), max(1, int(allowed / (second * steps))))
        stride = max(1, math.ceil(second * steps / max(allowed, 1e-9)))
        if steps < 3 or stride > max(1, steps // 4):
            return None
        self.tell(f"measuring single steps with {base} on {pictures} of {len(self.scenes)} pictures")
        fixed = guarded(steps)
        places = sorted({*range(fixed, steps, stride), steps - 1})
        found = []
        for scene in self.scenes[:pictures]:
            rows = np.zeros((steps, masks.WIDTH))
            for step in places:
                row = "".join("0" if other == step else "1" for other in range(steps))
                trial = self.bench.trial((rowed(base, row),), scene, sketched=True)
                rows[step] = 100.0 if trial.failure else trial.vector()
            for step in range(fixed, steps):
                rows[step] = rows[_nearest(step, places)]
            found.append(rows)
        return masks.Effects(found, getattr(base, "order", 0), fixed)

    def _rows(self, base: Accelerator, effects: masks.Effects) -> None:
        """Measure the proposed rows, then improve them: first around the wish, then the others."""
        rows, every = effects.ladder(), len(self.scenes)
        coarse = sorted({min(max(rows), max(min(rows), round(part * effects.steps))) for part in COARSE})
        self.tell(f"measuring rows of steps with {base}")
        for full in coarse[::-1]:
            self.measure((rowed(base, rows[full]),), 2)
        edge = self._edge(base, rows)
        order = sorted(rows, key=lambda full: (abs(full - edge) > 1, abs(full - edge)))
        order = [full for full in order if full in coarse or abs(full - edge) <= 1]
        for full in order[:3]:
            self.measure((rowed(base, rows[full]),), every)
        self.tell(f"improving rows of steps around {edge} full ones")
        if self.psnr is not None:
            while edge < max(rows) and not self._improved(base, effects, rows, edge):
                edge += 1
            surer = [full for full in range(edge, edge + SURER) if full in rows]
            for full in surer:
                self.measure((rowed(base, rows[full]),), every)
            while edge > min(rows) and self._improved(base, effects, rows, edge - 1):
                edge -= 1
        for full in order:
            self._improved(base, effects, rows, full, wished=False)

    def _edge(self, base: Accelerator, rows: dict[int, str]) -> int:
        """Return the fewest full steps that fulfil the wish (of PSNR), or the most (of speed-up), on two pictures."""
        low, high = min(rows) - 1, max(rows) + 1
        while high - low > 1:
            middle = (low + high) // 2
            upper = (
                self.fits(base, rows[middle], 2)
                if self.psnr is not None
                else not self.fits(base, rows[middle], 2)
            )
            low, high = (low, middle) if upper else (middle, high)
        return min(high, max(rows)) if self.psnr is not None else max(low, min(rows))

    def fits(self, base: Accelerator, row: str, pictures: int) -> bool:
        """Whether a row fulfils the wish, on so many pictures."""
        methods = (rowed(base, row),)
        one = self.point(methods, self.measure(methods, pictures))
        return self.wished(one)

    def wished(self, point: Point) -> bool:
        """Whether a point fulfils the wish."""
        return point.psnr >= self.psnr if self.psnr is not None else point.speedup >= (self.speedup or 1.0)

    def _improved(
        self, base: Accelerator, effects: masks.Effects, rows: dict[int, str], full: int, wished: bool = True
    ) -> bool:
        """Exchange full and shortened steps while the pictures get better; with `wished` only until the wish is fulfilled.

        Returns whether it is; `rows` holds the best row afterwards.
        """
        every = len(self.scenes)
        best = self.measure((rowed(base, rows[full]),), every)
        while True:
            if mean(best).failure:
                return False
            if wished and self.wished(self.point((rowed(base, rows[full]),), best)):
                return True
            for other in _neighbours(rows[full], effects):
                trials = self.measure((rowed(base, other),), every, floor=best)
                if len(trials) == every and mean(trials).psnr > mean(best).psnr + 0.02:
                    rows[full], best = other, trials
                    break
            else:
                return self.wished(self.point((rowed(base, rows[full]),), best))


def _nearest(step: int, places: Sequence[int]) -> int:
    return min(places, key=lambda place: abs(place - step))


def _neighbours(row: str, effects: masks.Effects) -> list[str]:
    """Return the shifts of one step and the best promised exchanges, most promising first."""
    every = masks.exchanges(row, effects.fixed)
    if not every:
        return []
    worth = dict(zip(every, effects.predicted(every), strict=True))
    first = sorted(worth, key=lambda one: -worth[one])
    near = {one for one in masks.shifts(row, effects.fixed) if one in worth}
    chosen = set(first[:12]) | near
    return [one for one in first if one in chosen]


def _key(methods: Methods) -> str:
    return " ".join(map(str, methods))
