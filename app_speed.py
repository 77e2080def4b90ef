"""The choice of speed: what Balanced and Fast stand for on a model, one sentence that is always true, and how long it takes.

Numbers come from the model's profiles, from comparisons made on this computer, and from finished jobs in the ledger; where there
are none, the sentence says so.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from pipelines import profile as profiles
from pipelines.catalog import Card
from pipelines.jobs import Job, Ledger
from pipelines.profile import Profile
from pipelines.request import Request, RequestError

EXACT, BALANCED, FAST, CUSTOM = SPEEDS = ("Exact", "Balanced", "Fast", "Custom")
NEAR, FAR = 35.0, 25.0
"""Least mean PSNR of a profile for Balanced and for Fast, in dB."""
PLAIN = {BALANCED: "delta-cache", FAST: "delta-cache:interval=3"}
"""What they stand for where no profile fits: the settings that the README documents."""
FEW_STEPS = 8
RUNS = 60
"""How many of the newest finished jobs are looked at."""


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """What a speed stands for: a profile by its name, or accelerators in their text form; neither is exact."""

    speed: str
    name: str | None = None
    profile: Profile | None = None
    accelerators: tuple[str, ...] = ()

    def fields(self) -> dict[str, Any]:
        """Return the fields of a request."""
        return {"profile": self.name} if self.name is not None else {"accelerators": self.accelerators}


def choose(speed: str, request: Request, card: Card) -> Choice:
    """Return what Balanced or Fast stands for here: the fastest profile that is near enough and holds, else documented settings.

    Args:
        request: with the model, size and steps asked for; its own accelerators do not count.
    """
    if speed not in PLAIN:
        return Choice(EXACT)
    least = NEAR if speed == BALANCED else FAR
    plain = request.replace(accelerators=(), profile=None)
    fits = []
    for name, one in profiles.known(request.model).items():
        try:
            profiles.check(one, plain, card)
        except RequestError:
            continue
        psnr = one.expected["psnr_db"]
        if psnr is None or psnr >= least:
            fits.append((float(one.expected["speedup_end_to_end"]), name, one))
    if fits:
        _, name, best = max(fits, key=lambda one: one[:2])
        return Choice(speed, name=name, profile=best)
    return Choice(speed, accelerators=(PLAIN[speed],))


def sentence(choice: Choice, request: Request, card: Card, ledger: Ledger) -> tuple[str, bool]:
    """Return the sentence under the choice, and whether there is anything left to measure."""
    steps = request.steps or card.steps
    at = f" at {steps} steps" if steps else ""
    if choice.speed == EXACT:
        return "Every block is computed at every step.", False
    if choice.speed == CUSTOM:
        words = (
            "Work that changes little between two steps is reused. The picture will differ somewhat from the exact one; "
            "what was reused is told under the picture and written into the file."
        )
        return words, False
    if choice.profile is not None:
        day = f", {choice.profile.made[:10]}" if choice.profile.made else ""
        return (
            f"{choice.speed} on this model{at}: measured {choice.profile.measured} (profile {choice.name}{day}).",
            False,
        )
    settings = " and ".join(choice.accelerators)
    found = measured(request.replace(accelerators=choice.accelerators, profile=None), card, ledger)
    if found is not None:
        return f"{choice.speed} on this model{at}: {found} ({settings}).", True
    few = " With so few steps there is little to reuse." if steps and steps <= FEW_STEPS else ""
    return (
        f"Not measured on this model yet{at}: {settings}, as documented. The picture will differ somewhat from the exact one.{few}",
        True,
    )


def measured(request: Request, card: Card, ledger: Ledger) -> str | None:
    """Return in words what comparisons on this computer have shown of these settings on this model; None without any."""
    wanted = _settings(request, card)
    speeds, psnrs = [], []
    for job in _finished(ledger, request.model):
        told = job.report.get("measured")
        if job.item.kind != "compare" or not isinstance(told, dict) or told.get("failures"):
            continue
        if _settings(Request.from_dict(job.item.request), card) == wanted:
            speeds.append(float(told["speedup"]["end_to_end"]))
            psnrs.append(math.inf if told["psnr_db"] is None else float(told["psnr_db"]))
    if not speeds:
        return None
    near = statistics.median(psnrs)
    psnr = "no difference to exact" if math.isinf(near) else f"PSNR {near:.1f} dB (worst {min(psnrs):.1f} dB)"
    pictures = "one picture only" if len(speeds) == 1 else f"{len(speeds)} pictures"
    return (
        f"measured {statistics.median(speeds):.2f}x end to end, {psnr}, on {pictures} made on this computer"
    )


def estimate(request: Request, card: Card, ledger: Ledger) -> str:
    """Return the line beside the button: how long it will take, learned from finished jobs of this model."""
    kind = _kind(request)
    same: list[tuple[float, float]] = []
    peaks: list[float] = []
    for job in _finished(ledger, request.model):
        if job.item.kind != "generate":
            continue
        done = Request.from_dict(job.item.request)
        effective, timings = job.report.get("effective", {}), job.report.get("timings", {})
        work = _work(
            effective.get("steps"),
            effective.get("width"),
            effective.get("height"),
            effective.get("frames", 1),
        )
        if work and _kind(done) == kind:
            same.append((sum(float(value) for name, value in timings.items() if name != "load"), work))
            peaks += [float(value) for value in job.report.get("peak_memory_mb", {}).values()][-1:]
    work = _work(
        request.steps or card.steps, request.width or card.width, request.height or card.height,
        request.frames or card.more.get("frames") or 1,
    )  # fmt: skip
    if not same or not work:
        return "First run of this kind: time unknown"
    seconds = statistics.median(took / units for took, units in same) * work * request.images
    peak = f" · peak {max(peaks) / 1000:.1f} GB" if peaks else ""
    runs = "one run" if len(same) == 1 else f"{len(same)} runs"
    return f"About {_clock(seconds)}{peak}, from {runs} on this computer"


def _finished(ledger: Ledger, model: str) -> Iterable[Job]:
    found = ledger.jobs(states=("done",), text=model, limit=RUNS)
    return (job for job in found if job.item.request.get("model") == model)


def _settings(request: Request, card: Card) -> Sequence[Any]:
    return (
        request.steps or card.steps, request.width or card.width, request.height or card.height, request.scheduler,
        sorted(map(str, request.accelerators)),
    )  # fmt: skip


def _kind(request: Request) -> Sequence[Any]:
    """Return what a second of work depends on, beside steps and size."""
    return (
        sorted(map(str, request.accelerators)),
        request.profile,
        len(request.controls),
        request.panels or 1,
    )


def _work(steps: Any, width: Any, height: Any, frames: Any) -> float:
    """Return steps times megapixels of a run; 0 where that is not known."""
    try:
        return float(steps) * float(width) * float(height) * float(frames or 1) / 1e6
    except (TypeError, ValueError):
        return 0.0


def _clock(seconds: float) -> str:
    if seconds < 10:
        return f"{max(0.1, seconds):.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
