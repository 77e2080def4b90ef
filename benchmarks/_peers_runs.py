"""Pictures and times for `benchmarks.peers`: quality picture by picture, kept in a work file; time in turns with the exact run.

Quality does not depend on how busy the machine is, so it may be taken at any time and goes on where it was stopped. A time is
only worth something on a quiet machine: every round measures the exact run and a few settings one after the other on the same
prompt, and only ratios within a round are used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acceleration.base import accelerated
from acceleration.fitting import Course, Gram, fits, settled
from acceleration.step_forecast import StepForecast
from benchmarks._peers_methods import EXACT, Setting, attached, own, version
from benchmarks.machine import ROOT, interleaved
from benchmarks.measures import relative_error
from dit.seams import blocks_of, patched
from pipelines.catalog import Loaded
from pipelines.compare import difference
from pipelines.trajectories import Recorder

WORK = ROOT / "runs" / "peers"
MOST = 90.0
"""PSNR in dB that stands for equal pictures in a mean: one value of a picture off by one grey level is about that."""
GROUP = 6
"""Settings that share one exact run in a round."""


@dataclasses.dataclass(frozen=True, slots=True)
class Picture:
    """One exact picture: its final latent [1, C, H, W], what it looks like, and the blocks' multiply-adds that it took."""

    latent: Tensor
    image: Any
    work: int


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """How far one picture of a setting is from the exact one, and the share of the blocks' multiply-adds that was done."""

    psnr: float
    ssim: float
    latent_error: float
    fraction: float


class Store:
    """What was measured already: one JSON line each, so that nothing is lost where a run is stopped."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        self.rows: dict[str, Any] = {row["key"]: row["value"] for row in map(_line, lines) if row}

    def get(self, *key: Any) -> Any:
        return self.rows.get(json.dumps(key))

    def put(self, value: Any, *key: Any) -> None:
        self.rows[json.dumps(key)] = value
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"key": json.dumps(key), "value": value}) + "\n")


class Bench:
    """The loaded model, its exact pictures and the work file."""

    def __init__(self, loaded: Loaded, work: Path = WORK) -> None:
        self.loaded = loaded
        self.pipeline, self.guidance = self.loaded.pipeline, float(self.loaded.card.guidance or 1.0)
        self.store = Store(work / "measured.jsonl")
        network = _digest(
            [ROOT / "dit", ROOT / "pipelines" / "denoising.py", ROOT / "pipelines" / "text_to_image.py"]
        )
        self.base = f"{self.loaded.digest[:12]} {network} torch {torch.__version__}"
        self._own = _digest([ROOT / "acceleration"])
        self._exact: dict[tuple[int, str, int], Picture] = {}

    def origin(self, setting: Setting) -> str:
        """Return what a figure depends on: model, network code, and the method's own code or package."""
        return f"{self.base} {self._own if own(setting.method) else version(setting.method)}"

    def exact(self, steps: int, prompt: str, seed: int) -> Picture:
        """Return the exact picture, made once a process."""
        key = (steps, prompt, seed)
        if key not in self._exact:
            with counted(self.pipeline.transformer) as work:
                latent = self.call(steps, prompt, seed)
            self._exact[key] = Picture(latent, self.pipeline._decoded(latent, "pil")[0], work[0])
        return self._exact[key]

    def call(self, steps: int, prompt: str, seed: int, **more: Any) -> Any:
        """Run the pipeline for one picture, guidance batched; return its latent unless `more` asks for something else."""
        given = {
            "num_inference_steps": steps,
            "guidance_scale": self.guidance,
            "output_type": "latent",
        } | more
        return self.pipeline(prompt=prompt, seeds=[seed], **given).images

    def fitted(self, steps: int, prompts: Sequence[str], counts: Sequence[int]) -> list[str]:
        """Return step forecasts of these counts of full steps, fitted to runs of other prompts, seeds from 100 on."""
        key = ("fitted", f"{self.base} {self._own}", steps, len(prompts))
        missing = [full for full in counts if self.store.get(*key, full) is None]
        if missing:
            exact, gram = self._courses(steps, prompts), Gram()
            for one in exact:
                gram.add([velocity[None] for velocity in one.velocities], one.sigmas)
            for full, begun in fits(gram.trajectory(), missing).items():
                method = settled(begun, exact, lambda method: self._courses(steps, prompts, method))
                self.store.put(str(method), *key, full)
                print(f"{steps} steps, {full} full ones: fitted", flush=True)
        return [self.store.get(*key, full) for full in counts]

    def _courses(self, steps: int, prompts: Sequence[str], *methods: StepForecast) -> list[Course]:
        """Return the runs of prompts, exact or with a forecast."""
        found: list[Course] = []
        scheduler, network = self.pipeline.scheduler, self.pipeline.transformer
        for place, prompt in enumerate(prompts):
            recorder = Recorder(scheduler)
            with patched(scheduler, "step", recorder.step), accelerated(network, *methods, steps=steps):
                self.call(steps, prompt, 100 + place)
            found += recorder.courses()
        return found

    def quality(self, setting: Setting, pictures: Sequence[tuple[str, int]]) -> list[Found]:
        """Return how far each picture is from the exact one; only those not in the work file are made."""
        origin = self.origin(setting)
        missing = [one for one in pictures if self.store.get("quality", origin, setting.key, *one) is None]
        for one in missing:
            self.exact(setting.steps, *one)
        if missing:
            with attached(self.pipeline, setting, self.guidance), counted(self.pipeline.transformer) as work:
                for one in missing:
                    work[0] = 0
                    found = self._found(setting, self.exact(setting.steps, *one), one, work)
                    self.store.put(dataclasses.asdict(found), "quality", origin, setting.key, *one)
        return [Found(**self.store.get("quality", origin, setting.key, *one)) for one in pictures]

    def _found(self, setting: Setting, exact: Picture, one: tuple[str, int], work: list[int]) -> Found:
        latent = self.call(setting.run_steps, *one)
        seen = difference(self.pipeline._decoded(latent, "pil")[0], exact.image)
        return Found(
            min(seen.psnr, MOST), seen.ssim, relative_error(latent, exact.latent), work[0] / exact.work
        )

    def times(self, settings: Sequence[Setting], prompts: Sequence[str], rounds: int) -> None:
        """Time settings of one step count in turns with the exact run; what was timed before is timed again."""
        for place in range(0, len(settings), GROUP):
            group = settings[place : place + GROUP]
            clocks = {one.key: Timed(self, one, prompts) for one in (exact_of(group[0]), *group)}
            interleaved(dict(clocks.items()), rounds=rounds)
            first = next(iter(clocks.values()))
            for one in group:
                self.store.put(clocks[one.key].against(first), "times", self.origin(one), one.key)
                print(
                    f"timed {one.method} ({one.words}): {clocks[one.key].against(first)['denoise']:.2f}x",
                    flush=True,
                )

    def timed(self, setting: Setting) -> dict[str, float] | None:
        """Return the times of a setting, if they were taken."""
        found: dict[str, float] | None = self.store.get("times", self.origin(setting), setting.key)
        return found

    def empty_cost(self, steps: int, prompts: Sequence[str], rounds: int) -> float:
        """Measure and keep what a denoising loop costs, as a share of the exact one, in which no block computes anything."""
        blocks = [block.module for block in blocks_of(self.pipeline.transformer)]

        def nothing(
            *, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
        ) -> tuple[Tensor, Tensor]:
            return encoder_hidden_states, hidden_states

        exact = Setting.of(EXACT, steps)
        full, bare = Timed(self, exact, prompts), Timed(self, exact, prompts)

        def without_blocks() -> None:
            with contextlib.ExitStack() as stack:
                for block in blocks:
                    stack.enter_context(patched(block, "forward", nothing))
                bare()

        interleaved({"full": full, "bare": without_blocks}, rounds=rounds)
        cost = 1 / bare.against(full)["denoise"]
        self.store.put(cost, "empty", self.base, steps)
        return cost

    def delta(self, steps: int, interval: int, cached: int, prompts: Sequence[str], rounds: int) -> float:
        """Measure Delta-cache's speed-up over whole periods of its schedule: the warm-up, which no formula has, left out."""
        blocks = len(blocks_of(self.pipeline.transformer))
        text = f"delta-cache:mode=rear,interval={interval},cached_fraction={cached / blocks},warmup=1,final_full=0"
        settings = (Setting.of(EXACT, steps), Setting.of("leapfrog delta-cache", steps, set=text))
        periods = range(1, 1 + (steps - 1) // interval * interval)
        full, fast = (Timed(self, one, prompts, periods) for one in settings)
        interleaved({"full": full, "fast": fast}, rounds=rounds)
        return fast.against(full)["steps"]


class Timed:
    """A run that can be timed again and again: loop, end to end, and some of its steps, in seconds.

    Ours are attached within the time, as each request does; the others once before it, as their documents show.
    """

    def __init__(
        self, bench: Bench, setting: Setting, prompts: Sequence[str], steps: range = range(0)
    ) -> None:
        self.bench, self.setting, self.prompts, self.steps = bench, setting, prompts, steps
        self.taken: list[dict[str, float]] = []

    def __call__(self) -> None:
        pipeline, setting = self.bench.pipeline, self.setting
        prompt = self.prompts[len(self.taken) % len(self.prompts)]
        stamps: list[float] = []
        loop: list[float] = []
        inner = pipeline._denoise

        def denoise(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            done = inner(*args, **kwargs)
            loop.append(time.perf_counter() - start)
            return done

        def stamp(*_: Any) -> dict[str, Any]:
            stamps.append(time.perf_counter())
            return {}

        more = {"output_type": "pil"} | ({"callback_on_step_end": stamp} if self.steps else {})
        with patched(pipeline, "_denoise", denoise):
            before = time.perf_counter()
            with attached(pipeline, setting, self.bench.guidance):
                begun = time.perf_counter()
                self.bench.call(setting.run_steps, prompt, 0, **more)
                ended = time.perf_counter()
            if own(setting.method):
                begun, ended = before, time.perf_counter()
        found = {"denoise": loop[0], "end_to_end": ended - begun}
        if self.steps:
            found["steps"] = stamps[self.steps.stop - 1] - stamps[self.steps.start - 1]
        self.taken.append(found)

    def against(self, other: Timed) -> dict[str, float]:
        """Return medians over the rounds of the other's time by this one's, the warm-up left out, and of the loop in seconds."""
        pairs = list(zip(other.taken[1:], self.taken[1:], strict=True))
        ratios = {name: statistics.median(a[name] / b[name] for a, b in pairs) for name in self.taken[0]}
        return ratios | {"seconds": statistics.median(b["denoise"] for _, b in pairs), "rounds": len(pairs)}


def exact_of(setting: Setting) -> Setting:
    """Return the exact run that a setting is held against."""
    return Setting.of(EXACT, setting.steps)


@contextlib.contextmanager
def counted(transformer: nn.Module) -> Iterator[list[int]]:
    """Count the multiply-adds of the linear maps inside the blocks: nearly all of their work, and what a cache leaves out."""
    total = [0]

    def add(module: nn.Module, args: tuple[Any, ...], _: Any) -> None:
        assert isinstance(module, nn.Linear)
        total[0] += args[0].numel() * module.out_features

    linear = [
        one
        for block in blocks_of(transformer)
        for one in block.module.modules()
        if isinstance(one, nn.Linear)
    ]
    hooks = [one.register_forward_hook(add) for one in linear]
    try:
        yield total
    finally:
        for hook in hooks:
            hook.remove()


def summary(found: Iterable[Found]) -> dict[str, float]:
    """Return means, and the worst PSNR, of a setting's pictures."""
    rows = list(found)
    mean: Callable[[str], float] = lambda name: statistics.fmean(getattr(one, name) for one in rows)  # noqa: E731
    return {
        "pictures": len(rows), "psnr_db": mean("psnr"), "worst_psnr_db": min(one.psnr for one in rows),
        "ssim": mean("ssim"), "latent_error": mean("latent_error"), "fraction": mean("fraction"),
    }  # fmt: skip


def _digest(places: Sequence[Path]) -> str:
    found = hashlib.sha256()
    for place in places:
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            found.update(file.read_bytes())
    return found.hexdigest()[:12]


def _line(text: str) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except json.JSONDecodeError:  # the run was stopped while it wrote this line
        return None
    return row if isinstance(row, dict) and not _broken(row.get("value")) else None


def _broken(value: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(one, float) and math.isnan(one) for one in value.values()
    )
