"""A short benchmark of this computer on a model: exact against accelerators, in turns, from the same noise.

Recommended are the profiles of the model that hold for the run, and where there is none what asks nothing special of a model.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipelines import profile as profiles
from pipelines.request import Request, RequestError

if TYPE_CHECKING:
    from pipelines.generate import OnStep
    from pipelines.result import Result

ROUNDS = 50
"""Most rounds."""
USUAL = ("delta-cache:interval=2", "step-forecast:interval=2")
"""Tried where a model has no profile that holds."""
PHASES = ("encode", "denoise", "decode")
MOST = 16
"""Most settings of one benchmark."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One setting: seconds of every round, speed-ups as medians over the rounds of exact by accelerated, and the difference.

    `psnr` is in dB (infinite if identical), `refused` in words why it did not run.
    """

    name: str
    accelerators: tuple[str, ...]
    source: str
    denoise: tuple[float, ...] = ()
    whole: tuple[float, ...] = ()
    speedup_denoise: float = 0.0
    speedup_whole: float = 0.0
    psnr: float = math.inf
    ssim: float = 1.0
    refused: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; an infinite PSNR is null."""
        psnr = None if math.isinf(self.psnr) else round(self.psnr, 2)
        return dataclasses.asdict(self) | {
            "psnr": psnr,
            "identical": math.isinf(self.psnr) and not self.refused,
        }

    def __str__(self) -> str:
        if self.refused:
            return f"{self.name}: {self.refused}"
        like = "identical" if math.isinf(self.psnr) else f"PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.3f}"
        return (
            f"{self.name}: denoising {statistics.median(self.denoise):.3f} s ({self.speedup_denoise:.2f}x), "
            f"whole {statistics.median(self.whole):.3f} s ({self.speedup_whole:.2f}x), {like}"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came of it: the exact run first. `floor` is the PSNR in dB of the exact run against itself."""

    request: Request
    rounds: int
    rows: tuple[Row, ...]
    floor: float
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "request": self.request.to_dict(), "rounds": self.rounds, "rows": [one.to_dict() for one in self.rows],
            "floor_psnr_db": None if math.isinf(self.floor) else round(self.floor, 2), "machine": self.machine,
        }  # fmt: skip

    def __str__(self) -> str:
        floor = "bit for bit the same" if math.isinf(self.floor) else f"PSNR {self.floor:.1f} dB"
        head = f"{self.request.model}: {self.rounds} rounds in turns; exact against itself: {floor}; this picture only"
        return "\n".join([head, *map(str, self.rows)])


def bench(
    request: Request, accelerators: Sequence[str] = (), rounds: int = 3, *, on_step: OnStep | None = None
) -> Report:
    """Make one picture exactly and with each setting, in turns; one run of each goes before, untimed.

    Args:
        accelerators: settings to try, each as text, + between two that act together; the recommended ones where none are given.

    Raises:
        RequestError: rounds or settings that cannot be, or what `generate` refuses in the exact run.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= ROUNDS:
        raise RequestError("rounds", rounds, f"a whole number from 1 to {ROUNDS}")
    if len(accelerators) > MOST:
        raise RequestError("accelerate", len(accelerators), f"given at most {MOST} times")
    plain = request.replace(accelerators=(), profile=None, images=1)
    asked = {text: (_with(plain, text), "given") for text in accelerators} or recommended(plain)
    first = _Runs(plain, on_step)
    runs = {name: _Runs(made, on_step) for name, (made, _) in asked.items()}
    working: dict[str, _Runs] = {"exact": first}
    refused: dict[str, str] = {}
    first.warm()
    for name, one in runs.items():
        try:
            one.warm()
            working[name] = one
        except (RequestError, RuntimeError) as error:
            refused[name] = str(error)
    for turn in range(rounds):
        for name in list(working) if turn % 2 == 0 else list(working)[::-1]:
            working[name].once()
    rows = [_row("exact", first, first, (), "")]
    for name, (made, source) in asked.items():
        texts = tuple(str(one) for one in made.accelerators)
        rows.append(
            Row(name=name, accelerators=texts, source=source, refused=refused[name])
            if name in refused
            else _row(name, runs[name], first, texts, source)
        )
    from pipelines.machine import environment

    return Report(request=plain, rounds=rounds, rows=tuple(rows), floor=first.floor(), machine=environment())


def recommended(request: Request) -> dict[str, tuple[Request, str]]:
    """Return the settings that are recommended for a request, by name, with where they come from."""
    from pipelines import catalog

    found: dict[str, tuple[Request, str]] = {}
    source = catalog.find(request.model)
    card = None if source.folder is None else catalog.prepare(source)[1]
    for name, one in profiles.known(request.model).items():
        try:
            if card is not None:
                profiles.check(one, request.replace(profile=name), card)
            found[name] = (request.replace(accelerators=one.accelerators), f"profile for {one.budget}")
        except RequestError:
            continue  # tuned for other steps or another size
    return found or {text: (_with(request, text), "asks nothing special of a model") for text in USUAL}


class _Runs:
    """The runs of one setting."""

    def __init__(self, request: Request, on_step: OnStep | None) -> None:
        self.request, self._on_step = request, on_step
        self.denoise: list[float] = []
        self.whole: list[float] = []
        self.results: list[Result] = []

    def warm(self) -> None:
        self.results.append(self._made())

    def once(self) -> None:
        result = self._made()
        seconds = result.report["timings"]
        self.denoise.append(float(seconds["denoise"]))
        self.whole.append(float(sum(seconds[phase] for phase in PHASES)))
        self.results = [self.results[0], result]

    def floor(self) -> float:
        from pipelines.compare import difference_of_clips

        first, last = self.results[0], self.results[-1]
        return difference_of_clips(first.clips[0], last.clips[0]).psnr

    def _made(self) -> Result:
        from pipelines.generate import generate

        return generate(self.request, on_step=self._on_step, retry=False)


def _row(name: str, runs: _Runs, exact: _Runs, accelerators: tuple[str, ...], source: str) -> Row:
    from pipelines.compare import difference_of_clips

    apart = difference_of_clips(runs.results[0].clips[0], exact.results[0].clips[0])
    speedups = [
        statistics.median(a / max(b, 1e-9) for a, b in zip(theirs, mine, strict=True))
        for theirs, mine in ((exact.denoise, runs.denoise), (exact.whole, runs.whole))
    ]
    return Row(
        name=name, accelerators=accelerators, source=source, denoise=tuple(runs.denoise), whole=tuple(runs.whole),
        speedup_denoise=speedups[0], speedup_whole=speedups[1], psnr=apart.psnr, ssim=apart.ssim,
        refused="; ".join(runs.results[0].report.get("failures", [])),
    )  # fmt: skip


def _with(request: Request, text: str) -> Request:
    return request.replace(accelerators=tuple(one.strip() for one in text.split("+")))
