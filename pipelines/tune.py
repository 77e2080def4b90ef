"""Tune: search accelerator settings for a model within a time, and bind the best to where it was measured.

The search is `pipelines.search`; what it chooses is then measured by `compare` on pictures that were not searched on, and
only what keeps the wish there becomes a profile. A second call with the same settings goes on from the log of the first.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import profile as profiles
from pipelines.pareto import Point, front
from pipelines.profile import Profile, Range
from pipelines.request import Request, RequestError, accelerator_kinds
from pipelines.search import Search
from pipelines.trials import Bench, Clock, Log, Scene, Tell, TimeUp, Trial, mean, scenes_for

if TYPE_CHECKING:
    from pipelines.catalog import Card, Loaded
    from pipelines.generate import OnStep

LONGEST = 7 * 24 * 60
"""Most minutes."""
SEARCHED, HELD_OUT, COMPARED, RECORDED = 6, 12, 3, 18
"""Pictures that are searched on, other ones that the result is checked on, those of them that are timed, and further ones that
forecasts are fitted to."""
FEWEST_RUNS = 16
"""Exact runs that must fit into the time, or nothing useful could be found."""
TIMED = 8
"""Most points of the curve that are timed."""
_BUDGET = re.compile(r"\s*(psnr|speedup)\s*>?=\s*(\d+(?:\.\d+)?)\s*\Z")


@dataclasses.dataclass(frozen=True, slots=True)
class Budget:
    """The wish: a mean PSNR of at least `psnr` dB, as fast as can be; or a `speedup` of denoising, as like as can be."""

    psnr: float | None = None
    speedup: float | None = None

    @classmethod
    def read(cls, text: str) -> Budget:
        """Read `psnr>=35` or `speedup>=2`. Raises: RequestError."""
        found = _BUDGET.match(text)
        value = float(found[2]) if found else 0.0
        if found and found[1] == "psnr" and 5 <= value <= 90:
            return cls(psnr=value)
        if found and found[1] == "speedup" and 1 < value <= 50:
            return cls(speedup=value)
        raise RequestError("budget", text, "psnr>=N with 5 to 90 dB, or speedup>=N above 1 and up to 50")

    def __str__(self) -> str:
        return f"psnr>={self.psnr:g}" if self.psnr is not None else f"speedup>={self.speedup:g}"

    def fits(self, psnr: float, speedup: float) -> bool:
        """Whether what was measured fulfils the wish."""
        return psnr >= self.psnr if self.psnr is not None else speedup >= (self.speedup or 1.0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What came of it: the Pareto curve, slowest first; the profile and its file, or in words why there is none."""

    curve: tuple[Point, ...]
    profile: Profile | None
    path: Path | None
    reason: str
    log: Path
    runs: int
    reused: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "curve": [one.to_dict() for one in self.curve],
            "profile": self.profile.to_dict() if self.profile else None,
            "file": str(self.path) if self.path else None,
            "reason": self.reason, "log": str(self.log), "runs": self.runs, "reused": self.reused,
            "seconds": round(self.seconds, 1),
        }  # fmt: skip

    def __str__(self) -> str:
        lines = ["speed-up of the denoising loop against the difference from the exact picture:"]
        for one in self.curve:
            kind = " " if one.timed else "~"
            methods = " ".join(map(str, one.methods))
            lines.append(f"{kind}{one.speedup:5.2f}x  {one.psnr:5.1f} dB  SSIM {one.ssim:.3f}  {methods}")
        if any(not one.timed for one in self.curve):
            lines.append("~ estimated from the block calls computed, not timed")
        lines.append(
            f"{self.runs} runs in {self.seconds:.0f} s, {self.reused} trials known before; log: {self.log}"
        )
        if self.profile is not None:
            lines += [
                str(self.profile),
                f"use it with: --profile {self.path}; it acts on nothing else than {_place(self.profile)}",
            ]
        return "\n".join([*lines, self.reason] if self.reason else lines)


def tune(
    model: str,
    budget: str | Budget,
    minutes: float,
    *,
    settings: Request | None = None,
    prompts: Sequence[str] = (),
    output: Path | None = None,
    on_step: OnStep | None = None,
    tell: Tell = lambda _: None,
    heard: Callable[[Search], object] = lambda _: None,
) -> Tuned:
    """Search accelerator settings for a model and write a profile.

    Args:
        model: a shipped name, a folder or a hub id.
        budget: `psnr>=35` (as fast as can be at this mean PSNR in dB) or `speedup>=2` (as like as can be).
        minutes: wall-clock limit for everything but loading; a denoising step that runs is finished.
        settings: steps, size, scheduler, guidance, dtype and device to tune for; its prompt and seed are not used.
        prompts: what to draw; the model card's examples where there are none.
        output: the profile's file; its log goes beside it. Default: a name in the folder `profiles`.
        tell: hears in words what is being done; heard: of the search, at every point that was added.

    Raises:
        RequestError: a wish, a time or settings that cannot be. SaveError: nothing can be written there.
        Cancelled: stopped by `on_step`; the log stays.
    """
    wish = budget if isinstance(budget, Budget) else Budget.read(budget)
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 < minutes <= LONGEST:
        raise RequestError("minutes", minutes, f"above 0 and at most {LONGEST}")
    base = _base(model, settings)
    loaded, scenes, held = _prepared(base, prompts)
    clock = Clock(minutes, on_step)
    bench = Bench(base, clock)
    tell(f"exact pictures of {loaded.card.name}")
    first = _whole_time(bench, scenes[0], minutes)
    where = _range(base, loaded, bench, scenes[0])
    path = output or profiles.FOLDER / f"{_slug(model)}-{where.steps}-steps-{_slug(str(wish))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    bench.log = Log(path.parent / f"{_slug(model)}-{_digest(base, where)}.jsonl")
    held = held[: max(1, min(len(held), int(clock.left * 0.15 / first)))]
    reserve = min(0.45 * clock.left, first * (3 * len(held) + 6 * COMPARED))
    recorded = _more(scenes)
    search = Search(
        bench, scenes, clock.left - reserve, psnr=wish.psnr, speedup=wish.speedup, tell=tell, recorded=recorded,
        heard=heard,
    )
    _searched(search, bench, clock, reserve, where, loaded)
    tell("checking on other pictures")
    profile, reason = _checked(_curve(search), bench, wish, held, where, base)
    points = _timed(search, bench, _curve(search))
    if profile is not None:
        profile = dataclasses.replace(
            profile,
            curve=tuple(one.to_dict() for one in points),
            searched={"pictures": len(scenes), "runs": bench.runs, "seconds": round(clock.spent, 1)},
        )
        profile.save(path)
    return Tuned(
        curve=tuple(points), profile=profile, path=path if profile else None, reason=reason, log=bench.log.path,
        runs=bench.runs, reused=bench.log.found, seconds=clock.spent,
    )  # fmt: skip


def _base(model: str, settings: Request | None) -> Request:
    found = Request(prompt="-", model=model) if settings is None else settings.replace(model=model)
    for name in ("accelerators", "profile", "image"):
        if getattr(found, name):
            raise RequestError(name, getattr(found, name), "left out: tune chooses what is on, from noise")
    return found


def _prepared(base: Request, prompts: Sequence[str]) -> tuple[Loaded, list[Scene], list[Scene]]:
    """Load the model; return it with the pictures to search on and the held-out ones, whose seeds are others."""
    from pipelines import catalog
    from pipelines.generate import check

    folder, card = catalog.prepare(catalog.find(base.model))
    asked = list(prompts) or known_prompts(card)
    if card.takes_class and prompts:
        raise RequestError("prompts", list(prompts), f"left out: {card.name} takes class numbers")
    if not card.takes_class and not asked:
        raise RequestError("prompts", [], f"given: the card of {card.name} has no examples")
    classes = (card.classes or 1) if card.takes_class else None
    scenes = scenes_for(asked, classes, SEARCHED, 1)
    held = scenes_for(asked[::-1], classes, HELD_OUT, 10_001)
    check(scenes[0].of(base), card)
    return catalog.load_folder(folder, card, base.dtype, base.device), scenes, held


def _more(scenes: Sequence[Scene]) -> list[Scene]:
    """Return further scenes of the same prompts or classes, with seeds that nothing else uses."""
    return [dataclasses.replace(scenes[place % len(scenes)], seed=5_001 + place) for place in range(RECORDED)]


def known_prompts(card: Card) -> list[str]:
    """Return what a card says can be drawn: its examples, and things it knows, spread evenly, in its styles in turns."""
    more = {name: card.more.get(name) for name in ("examples", "concepts", "styles")}
    listed = {
        name: [str(x) for x in value] if isinstance(value, list) else [] for name, value in more.items()
    }
    concepts, styles = listed["concepts"], listed["styles"] or [""]
    count = min(len(concepts), SEARCHED + HELD_OUT)
    chosen = [concepts[(2 * place + 1) * len(concepts) // (2 * count)] for place in range(count)]
    made = [", ".join(filter(None, (one, styles[i % len(styles)]))) for i, one in enumerate(chosen)]
    return listed["examples"] + made


def _whole_time(bench: Bench, scene: Scene, minutes: float) -> float:
    """Make the first exact picture and return its time in s, or say how long would be enough."""
    try:
        timings = bench.exact(scene).report["timings"]
    except TimeUp:
        timings = {"denoise": math.inf}
    first = float(sum(seconds for phase, seconds in timings.items() if phase != "load"))
    if bench.clock.left < FEWEST_RUNS * first:
        least = "" if math.isinf(first) else f", here at least {FEWEST_RUNS * first / 60:.2g}"
        raise RequestError("minutes", minutes, f"enough for {FEWEST_RUNS} exact pictures{least}")
    return first


def _range(base: Request, loaded: Loaded, bench: Bench, scene: Scene) -> Range:
    from pipelines.calls import arguments

    request = scene.of(base)
    found = profiles.range_of(request, loaded, arguments(loaded.pipeline, request, loaded.card, None))
    made = bench.exact(scene).report["effective"]
    return dataclasses.replace(found, width=made["width"], height=made["height"], steps=made["steps"])


def _digest(base: Request, where: Range) -> str:
    """Return what tells one log from another: everything that a trial depends on but accelerators and scene."""
    parts = [
        dataclasses.asdict(where),
        base.guidance,
        base.negative_prompt,
        base.dtype,
        base.device,
        base.frames,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _searched(
    search: Search, bench: Bench, clock: Clock, reserve: float, where: Range, loaded: Loaded
) -> None:
    """Search until the reserve is all that is left."""
    from acceleration.base import Accelerator

    kinds = [kind for kind in accelerator_kinds().values() if issubclass(kind, Accelerator)]
    multiple = max(1, loaded.card.multiple)
    tokens = (where.width or 0) * (where.height or 0) // multiple**2
    clock.end -= reserve
    try:
        search.run(int(where.steps or 1), tokens, kinds)
    except TimeUp:
        pass
    finally:
        clock.end += reserve


def _curve(search: Search) -> list[Point]:
    """Return the Pareto front of what was tried on most pictures."""
    most = max((one.pictures for one in search.points()), default=1)
    return front(search.points(most))


def _checked(
    curve: Sequence[Point], bench: Bench, wish: Budget, held: Sequence[Scene], where: Range, base: Request
) -> tuple[Profile | None, str]:
    """Return the best profile that keeps the wish on the held-out pictures, or why there is none."""
    fitting = [one for one in curve if one.speedup > 1.0 and wish.fits(one.psnr, one.speedup)]
    # The fastest first where likeness is wished for, the most alike where speed is; then those that are surer of the wish.
    fitting.sort(key=lambda one: -one.speedup if wish.psnr is not None else one.speedup)
    reason = f"no profile: nothing that was tried reaches {wish}"
    for point in fitting:
        try:
            trials = _held_out(bench, point, held)
            found = mean(trials)
            missed = f"{found.psnr:.1f} dB" if found.failure == "" else found.failure
            if not found.failure and (wish.psnr is None or found.psnr >= wish.psnr):
                speedups = _compared(bench, point, held[:COMPARED])
                if wish.fits(found.psnr, speedups[0]) and speedups[0] > 1:
                    return _profile(point, wish, where, base, trials, speedups), ""
                missed = f"{speedups[0]:.2f}x"
        except TimeUp:
            over = "the time was over before a point was checked; give more minutes, the log stays"
            return None, f"{reason}; then {over}" if "but on" in reason else f"no profile: {over}"
        reason = f"no profile: {' '.join(map(str, point.methods))} reached {wish} in the search, but on other pictures {missed}"
    return None, reason


def _held_out(bench: Bench, point: Point, held: Sequence[Scene]) -> list[Trial]:
    """Try a point on the held-out pictures, at least two, and on no more than leaves time to compare."""
    trials: list[Trial] = []
    begin = bench.clock.spent
    for scene in held:
        each = (bench.clock.spent - begin) / max(1, len(trials))
        if len(trials) >= 2 and bench.clock.left < 4 * each:
            break
        trials.append(bench.trial(point.methods, scene))
    return trials


def _compared(bench: Bench, point: Point, scenes: Sequence[Scene]) -> tuple[float, float]:
    """Return the median speed-up of denoising and end to end: exact and accelerated in turns, on one picture or more."""
    from pipelines.measure import Measured, compare

    found: list[Measured] = []
    for scene in scenes:
        try:
            with bench.clock.running():
                bench.runs += 4
                found.append(compare(scene.of(bench.base), point.methods, 1, on_step=bench.clock.on_step))
        except TimeUp:
            if not found:
                raise
            break
    denoise, whole = (statistics.median(one.speedup(of) for one in found) for of in ("denoise", "end_to_end"))
    return denoise, whole


def _profile(
    point: Point,
    wish: Budget,
    where: Range,
    base: Request,
    trials: Sequence[Trial],
    speedups: tuple[float, float],
) -> Profile:
    from pipelines.machine import device_name, environment

    expected = {
        "speedup_denoise": round(speedups[0], 3), "speedup_end_to_end": round(speedups[1], 3),
        "psnr_db": round(mean(trials).psnr, 2), "psnr_worst_db": round(min(one.psnr for one in trials), 2),
        "ssim": round(mean(trials).ssim, 5), "computed": round(mean(trials).fraction, 4), "pictures": len(trials),
    }  # fmt: skip

    machine = environment()
    kept = {name: machine[name] for name in ("processor", "threads", "versions")}
    device = base.device if base.device != "auto" else "cuda" if machine["devices"] else "cpu"
    return Profile(
        model=base.model, budget=str(wish), range=where, expected=expected,
        accelerators=tuple(one.to_dict() for one in point.methods),
        machine=kept | {"device": device_name(device)},
        made=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def _timed(search: Search, bench: Bench, points: list[Point]) -> list[Point]:
    """Time points of the curve, spread evenly, as far as time is left; a point that turns out to be beaten is left out."""
    from pipelines.measure import compare

    step = max(1, math.ceil(len(points) / TIMED))
    done = {id(one): one for one in points}
    try:
        for point in points[::-1][::step]:
            with bench.clock.running():
                bench.runs += 6
                request = search.scenes[0].of(bench.base)
                found = compare(request, point.methods, 2, on_step=bench.clock.on_step)
                done[id(point)] = dataclasses.replace(point, speedup=found.speedup("denoise"), timed=True)
    except TimeUp:
        pass
    return front(done.values())


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", Path(text).name.lower()).strip("-") or "model"


def _place(profile: Profile) -> str:
    one = profile.range
    return (
        f"these weights with {one.scheduler}, {one.steps} steps, {one.width}x{one.height} px, "
        f"guidance {'on' if one.guided else 'off'}"
    )
