"""What a grid would take, from what the ledgers of this computer know of earlier runs."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.request import RequestError

if TYPE_CHECKING:
    from pipelines.grid import Cell
    from pipelines.jobs import Job

_LIKE = ("model", "width", "height", "frames", "guidance_mode", "dtype", "device")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What is still to make would take, from earlier runs: s for one worker, peak memory in MB by place; None for not known.

    `unknown` cells are like none that ran here; of `scaled` ones only others with the same size ran: their time a step was taken.
    """

    cells: int
    made: int
    seconds: float | None
    unknown: int
    scaled: int
    memory: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        left = self.cells - self.made
        time = (
            "not known yet: nothing like it ran here"
            if self.seconds is None
            else f"about {_clock(self.seconds)} for one worker"
        )
        if self.seconds is not None and self.unknown:
            time = f"more than {_clock(self.seconds)} ({self.unknown} cells are not known yet)"
        peaks = ", ".join(f"{size / 1000:.2g} GB ({name})" for name, size in self.memory.items())
        return (
            f"{self.cells} pictures, {self.made} made, {left} to make; time: {time if left else 'none'}"
            f"{' (estimate)' if self.seconds is not None and left else ''}; memory: {peaks or 'not known yet'}"
        )


def estimate(cells: Sequence[Cell], jobs: Iterable[Job], made: Iterable[str] = ()) -> Estimate:
    """Estimate time and memory of cells from finished jobs.

    Args:
        made: content keys of what is there already.
    """
    there = set(made)
    same: dict[str, list[float]] = {}
    near: dict[str, list[float]] = {}
    peaks: dict[str, dict[str, float]] = {}
    for job in jobs:
        if job.state != "done" or job.item.kind != "generate":
            continue
        request, seconds = job.item.request, job.ended - job.started
        same.setdefault(_settings(request, exact=True), []).append(seconds)
        steps = job.report.get("effective", {}).get("steps") or 0
        if steps:
            near.setdefault(_settings(request), []).append(seconds / steps)
        for name, size in job.report.get("peak_memory_mb", {}).items():
            peak = peaks.setdefault(_settings(request), {})
            peak[name] = max(peak.get(name, 0.0), float(size))
    seconds, unknown, scaled, memory = 0.0, 0, 0, dict[str, float]()
    for cell in cells:
        values = cell.request.to_dict()
        for name, size in peaks.get(_settings(values), {}).items():
            memory[name] = max(memory.get(name, 0.0), size)
        if cell.key in there:
            continue
        if known := same.get(_settings(values, exact=True)):
            seconds += statistics.median(known)
        elif known := near.get(_settings(values)):
            seconds += statistics.median(known) * (cell.request.steps or _own_steps(cell.request.model))
            scaled += 1
        else:
            unknown += 1
    left = sum(cell.key not in there for cell in cells)
    return Estimate(cells=len(cells), made=len(cells) - left, seconds=None if left and unknown == left else seconds,
                    unknown=unknown, scaled=scaled, memory=memory)  # fmt: skip


def _settings(request: Mapping[str, Any], *, exact: bool = False) -> str:
    more = ("steps", "guidance", "scheduler", "accelerators", "profile") if exact else ()
    return json.dumps([request.get(name) for name in (*_LIKE, *more)], sort_keys=True, default=str)


def _own_steps(model: str) -> int:
    from pipelines import catalog

    try:
        source = catalog.find(model)
        card = None if source.folder is None else catalog.prepare(source)[1]
    except RequestError:
        card = None
    return (card.steps if card is not None else None) or 28


def _clock(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
