"""What a run over a manifest would do: its items held against the models and the output folder, with time and room on the disk.

Differs: estimates come from what this very folder holds already, for the same settings; where there is nothing, time is not known.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines._batch_folder import Folder, pages
from pipelines._tables import Problem, problem
from pipelines.manifest import Entry, Manifest, ManifestError, read_manifest
from pipelines.request import Request, RequestError
from pipelines.shards import check_form

if TYPE_CHECKING:
    from pipelines.jobs import Job


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run over a manifest would do; made without loading or writing anything.

    `seconds` of work for one worker and `need` in bytes are estimates: from what this folder holds already, or None and the
    size of the raw pictures by half.
    """

    manifest: Manifest
    output: Path
    form: str
    members: int
    missing: tuple[Entry, ...]
    done: int
    seconds: float | None
    need: int
    free: int
    remarks: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether there is room on the disk for what is expected."""
        return self.need <= self.free

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "manifest": str(self.manifest.path), "output": str(self.output), "format": self.form,
            "items": len(self.manifest.entries), "repeated": self.manifest.repeated, "duplicates": self.manifest.duplicates,
            "done": self.done, "missing": len(self.missing), "estimated_seconds": self.seconds,
            "estimated_bytes": self.need, "free_bytes": self.free, "fits": self.fits, "remarks": list(self.remarks),
        }  # fmt: skip

    def __str__(self) -> str:
        seconds = (
            "not known yet"
            if self.seconds is None
            else f"about {self.seconds:.0f} s for one worker (estimate)"
        )
        lines = [
            f"{len(self.manifest.entries)} items, {self.manifest.repeated} repeated, {self.done} done, {len(self.missing)} to make",
            f"time: {seconds}",
            f"disk: about {self.need / 1e6:.1f} MB (estimate), {self.free / 1e6:.1f} MB free",
            *self.remarks,
        ]
        return "\n".join(lines)


def plan(
    manifest: str | Path,
    output: str | Path,
    *,
    defaults: Mapping[str, Any] | None = None,
    roots: Sequence[Path] = (),
    form: str | None = None,
    members: int | None = None,
    models: Collection[str] | None = None,
) -> Plan:
    """Read a manifest, hold it against the models and against what the folder holds, and say what would be done.

    Args:
        models: see `read_manifest`, for a stranger's manifest.

    Raises:
        ManifestError: with every problem and its line. RequestError: another bad setting.
    """
    read = read_manifest(manifest, defaults=defaults, roots=roots, models=models)
    folder = Folder(Path(output))
    form, members = folder.settled(form, members)
    check_form(form)
    problems, sizes, remarks = _checked(read)
    jobs: list[Job] = []
    known: dict[str, str] = {}
    done: set[tuple[str, str]] = set()
    if folder.exists:
        with folder.ledger() as ledger:
            for job in pages(ledger):
                known[job.item.id] = job.key
                if job.state == "done":
                    done.add((job.item.id, job.key))
                    jobs.append(_light(job))
    for entry in read.entries:
        if known.get(entry.id, entry.key) != entry.key:
            allowed = f"an id that {folder.output} does not hold with other settings; take another folder or another id"
            problems.append(problem(entry.line, "id", entry.id, allowed))
    if problems:
        raise ManifestError(read.path, problems)
    missing = tuple(entry for entry in read.entries if (entry.id, entry.key) not in done)
    return Plan(
        manifest=read, output=folder.output, form=form, members=members, missing=missing,
        done=len(read.entries) - len(missing), seconds=seconds_of(missing, jobs), need=_need(missing, jobs, sizes),
        free=free(folder.output), remarks=tuple(remarks),
    )  # fmt: skip


def _checked(read: Manifest) -> tuple[list[Problem], dict[str, tuple[int, int]], list[str]]:
    """Hold every request against its model's card; return problems, the models' own sizes in px, and remarks."""
    from pipelines import catalog, controls
    from pipelines.generate import check
    from pipelines.result import check_ending

    problems: list[Problem] = []
    remarks: list[str] = []
    cards: dict[str, Any] = {}
    folders: dict[str, Path] = {}
    fitting: set[Any] = set()
    for entry in read.entries:
        request = Request.from_dict(entry.request)
        try:
            if request.model not in cards:
                cards[request.model] = None
                source = catalog.find(request.model)
                if source.folder is None:
                    remarks.append(
                        f"{request.model} is not on this computer; it is fetched when its first item begins"
                    )
                else:
                    folders[request.model], cards[request.model] = catalog.prepare(source)
            if cards[request.model] is not None:
                check(request, cards[request.model])
                check_ending(Path(entry.output) if entry.output else None, cards[request.model])
                steering = (request.model, request.controls, request.loras)
                if steering not in fitting:
                    controls.fits(request, cards[request.model], folders[request.model])
                    fitting.add(steering)
        except RequestError as error:
            problems.append(problem(entry.line, error.field, error.given, error.allowed))
    sizes = {
        name: (card.width or 1024, card.height or 1024) for name, card in cards.items() if card is not None
    }
    return problems, sizes, remarks


def _light(job: Job) -> Job:
    """Return a job without its report, of which a plan over many keeps nothing."""
    return dataclasses.replace(job, report={})


def _likeness(request: Mapping[str, Any]) -> tuple[Any, ...]:
    named = ("model", "width", "height", "frames", "steps", "accelerators", "guidance", "scheduler")
    return tuple(str(request.get(name)) for name in named)


def seconds_of(missing: Sequence[Entry], jobs: Sequence[Job]) -> float | None:
    """Return the work of one worker in s, from finished items with the same settings; None if some have none."""
    known: dict[tuple[Any, ...], list[float]] = {}
    for job in jobs:
        known.setdefault(_likeness(job.item.request), []).append(job.ended - job.started)
    total = 0.0
    for entry in missing:
        times = known.get(_likeness(entry.request))
        if times is None:
            return None
        total += statistics.median(times)
    return total


def _need(missing: Sequence[Entry], jobs: Sequence[Job], sizes: Mapping[str, tuple[int, int]]) -> int:
    """Return the bytes that files will take: of finished items with the same settings, or half of the raw pictures'."""
    known: dict[tuple[Any, ...], list[int]] = {}
    for job in jobs[-1000:]:
        found = [path.stat().st_size for path in map(Path, job.files) if path.is_file()]
        if found:
            known.setdefault(_likeness(job.item.request), []).append(sum(found))
    total = 0.0
    for entry in missing:
        measured = known.get(_likeness(entry.request))
        width, height = sizes.get(entry.request.get("model", ""), (1024, 1024))
        sides = (entry.request.get("width") or width) * (entry.request.get("height") or height)
        total += (
            statistics.mean(measured)
            if measured
            else sides * 1.5 * (entry.request.get("frames") or 1) + 20_000
        )
    return int(total)


def free(output: Path) -> int:
    """Return the free bytes where a folder is or will be."""
    place = output
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free
