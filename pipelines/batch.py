"""Batches: a manifest becomes items of a ledger in the output folder, workers make them, and a second start makes what is missing.

The ledger `.leapfrog/jobs.sqlite` is the only truth about a batch; `results.jsonl` and `failures.jsonl` are written from it.
Several runs over one folder at once share its items. An item is committed by its file first and its row second, by a worker that
still holds the lease, so whatever is killed when, nothing is lost, torn or made twice.

Differs: what is equal is one item (content keys), and what was made with other settings under the same id is refused, never mixed.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines._batch_folder import BATCH, Folder, pages
from pipelines._engines import FULL, engine_for
from pipelines._planning import Plan, plan
from pipelines.metadata import told_of
from pipelines.request import Request

if TYPE_CHECKING:
    from pipelines._engines import Engine
    from pipelines.jobs import Job, Ledger
    from pipelines.shards import Shards

ENGINES = ("local", "ray", "accelerate")
PAUSE = 0.1
"""Between two looks at the ledger, in s."""
LATEST = 2**62
"""Asks a ledger for the number of its last change alone."""
TOLD = ("pixels", "timings", "warnings", "failures", "summary", "exact")
"""What results.jsonl has of a report."""
ADDED = 500
"""Items that are put into the ledger in one transaction."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended: items by state, how many lie in shards, s, the signal that stopped it, and whether the disk was full.

    `broken` tells why the engine gave up; `flagged` names finished items of this run whose pictures hold NaN or one colour.
    """

    counts: dict[str, int]
    packed: int | None
    seconds: float
    stopped: int = 0
    full: bool = False
    broken: str = ""
    flagged: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether everything is made, and nothing came out as NaN or one colour."""
        return not self.flagged and all(not count for state, count in self.counts.items() if state != "done")

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dataclasses.asdict(self) | {"complete": self.complete}


Tell = Callable[[dict[str, int], float], object]
"""Hears of the items by state, and of the seconds since the start."""


def run(
    what: Plan | str | Path,
    *,
    workers: int = 1,
    engine: str | Engine = "local",
    tell: Tell | None = None,
    stopped: Sequence[int] = (),
) -> Outcome:
    """Make what is missing: of a plan, or of a folder that was begun.

    Args:
        workers: processes of the engine `local`; tasks at once of `ray` (0: as many as the cluster has room for).
        stopped: gets a signal's number in it when the run shall end; leases are given back within 5 s.

    Raises:
        RequestError: a folder without a batch, or an unknown engine. Unavailable: the engine is not installed.
    """
    start = time.monotonic()
    folder = Folder(what.output if isinstance(what, Plan) else Path(what))
    made = engine_for(engine, workers)  # before anything is written
    if isinstance(what, Plan):
        folder.begin(what.form, what.members, what.manifest)
    folder.require()
    with folder.ledger() as ledger:
        if isinstance(what, Plan):
            _add(ledger, folder, made, what)
        return _drive(folder, ledger, made, start, tell, stopped)


def _drive(
    folder: Folder, ledger: Ledger, engine: Engine, start: float, tell: Tell | None, stopped: Sequence[int]
) -> Outcome:
    """Keep an engine at work until everything is over, the disk is full or a signal came."""
    shards = folder.shards(ledger)
    broken, flagged, since = "", [], ledger.changes(LATEST)[0]
    try:
        if shards is None:
            ledger.verify(BATCH)
        else:
            shards.tidy()
            shards.verify()
        counts = ledger.counts(batch=BATCH)
        if counts["waiting"] + counts["running"] and not stopped:
            engine.start(ledger)
            try:
                while not stopped and not broken and counts["waiting"] + counts["running"]:
                    time.sleep(PAUSE)
                    broken = engine.turn()
                    ledger.expire()
                    counts = ledger.counts(batch=BATCH)
                    since, changed = ledger.changes(since)
                    flagged += [
                        job.item.id for job in changed if job.state == "done" and job.report.get("failures")
                    ]
                    if tell is not None:
                        tell(counts, time.monotonic() - start)
                    if shards is not None and counts["done"] - shards.count() >= shards.members:
                        shards.pack()
            finally:
                engine.stop(5.0)
        full = FULL in broken
        if not stopped and not full:
            _finish(ledger, shards, stopped)
        return Outcome(
            counts=ledger.counts(batch=BATCH), packed=None if shards is None else shards.count(),
            seconds=time.monotonic() - start, stopped=stopped[0] if stopped else 0, full=full,
            broken="" if full else broken, flagged=tuple(dict.fromkeys(flagged)),
        )  # fmt: skip
    finally:
        if shards is not None:
            shards.close()


def _finish(ledger: Ledger, shards: Shards | None, stopped: Sequence[int]) -> None:
    """Pack what is left, and remove what killed workers left behind."""
    from pipelines._jobs_saving import sweep

    if shards is not None:
        shards.pack(rest=True)
        while (
            ledger.counts(batch=BATCH)["done"] > shards.count() and not stopped
        ):  # another run packs just now
            time.sleep(PAUSE)
            shards.pack(rest=True)
    sweep(ledger, BATCH)


def status(output: str | Path) -> dict[str, Any]:
    """Return how a batch stands: items by state, shards, what runs, the pace of finished items.

    Raises:
        RequestError: a folder without a batch.
    """
    folder = Folder(Path(output)).require()
    with folder.ledger() as ledger:
        counts = ledger.counts(batch=BATCH)
        running = ledger.jobs(batch=BATCH, states=("running",))
        shards = folder.shards(ledger)
        names = None if shards is None else shards.names()
        packed = None if shards is None else shards.count()
        if shards is not None:
            shards.close()
        recent = [job.ended - job.started for job in ledger.jobs(batch=BATCH, states=("done",), limit=50)]
    return {
        "output": str(folder.output), "format": folder.about["format"], "counts": counts, "items": sum(counts.values()),
        "seconds_an_item": statistics.median(recent) if recent else None, "packed": packed, "shards": names,
        "running": [{"id": job.item.id, "worker": job.worker, "phase": job.phase, **job.progress} for job in running],
    }  # fmt: skip


def retry(output: str | Path) -> int:
    """Put what failed back in the queue with fresh tries, and return how many. Raises: RequestError, as `status`."""
    with Folder(Path(output)).require().ledger() as ledger:
        return ledger.retry(batch=BATCH)


def verify(output: str | Path) -> list[str]:
    """Look at every finished file; those missing or changed are put back in the queue. Returns a sentence for each.

    Raises:
        RequestError: as `status`.
    """
    folder = Folder(Path(output)).require()
    with folder.ledger() as ledger:
        shards = folder.shards(ledger)
        if shards is None:
            return ledger.verify(BATCH)
        try:
            return shards.verify()
        finally:
            shards.close()


def export(output: str | Path) -> list[Path]:
    """Write results.jsonl and failures.jsonl of what the ledger holds, each whole. Raises: RequestError, SaveError."""
    from pipelines.result import write_file

    folder = Folder(Path(output)).require()
    with folder.ledger() as ledger:
        shards = folder.shards(ledger)
        packed = {} if shards is None else shards.packed()
        if shards is not None:
            shards.close()
        equal: dict[str, list[str]] = {}
        for other, one in folder.about["duplicates"].items():
            equal.setdefault(one, []).append(other)
        lines: dict[str, list[str]] = {"results.jsonl": [], "failures.jsonl": []}
        for job in pages(ledger):
            if job.state == "done":
                lines["results.jsonl"].append(json.dumps(_result(job, folder, packed, equal)))
            elif job.over:
                told = {
                    "id": job.item.id,
                    "key": job.key,
                    "state": job.state,
                    "error": job.error,
                    "tries": job.tries,
                }
                request = told_of(Request.from_dict(job.item.request), {})[0]
                lines["failures.jsonl"].append(json.dumps(told | {"request": request, "tags": job.item.tags}))
    paths = []
    for name, found in lines.items():
        path = folder.output / name
        write_file(path, "".join(f"{line}\n" for line in found).encode(), overwrite=True)
        paths.append(path)
    return paths


def _result(
    job: Job, folder: Folder, packed: Mapping[str, str], equal: Mapping[str, list[str]]
) -> dict[str, Any]:
    from pipelines.shards import member_key

    place: dict[str, Any] = {
        "files": [_relative(Path(one), folder.output) for one in job.files],
        "sha256": job.sha256,
    }
    if job.name in packed:
        place = {"shard": packed[job.name], "member": member_key(job), "sha256": job.sha256}
    request, report = told_of(Request.from_dict(job.item.request), job.report)
    report = {name: report[name] for name in TOLD if name in report}
    return {
        "id": job.item.id, "key": job.key, **place, "equal": equal.get(job.item.id, []), "tags": job.item.tags,
        "request": request, "report": report, "seconds": job.ended - job.started, "tries": job.tries,
    }  # fmt: skip


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _add(ledger: Ledger, folder: Folder, engine: Engine, what: Plan) -> None:
    """Put the items of a plan in the ledger; those that are there stay as they stand."""
    entries = engine.share(folder, what.missing, what.manifest.entries)
    for start in range(0, len(entries), ADDED):
        ledger.add([folder.item(entry) for entry in entries[start : start + ADDED]])


__all__ = ["ENGINES", "Outcome", "Plan", "export", "plan", "retry", "run", "status", "verify"]
