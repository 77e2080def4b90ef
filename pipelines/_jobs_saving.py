"""How the files of a job become visible: saved whole under a hidden folder beside their place, renamed when the job is done.

What a killed worker left there is in nobody's way, and is removed when the job is made again or the batch has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines._jobs_records import Job
from pipelines._jobs_store import LedgerError
from pipelines.result import SaveError, sync_folder

if TYPE_CHECKING:
    from pipelines.jobs import Ledger

PREFIX = ".leapfrog-"
SAME_NAMES = 100_000
SPENT = ("done", "cancelled", "poisoned")
"""States in which latents are of no more use; a job that failed may be tried again, and then goes on from them."""
KEPT_SECONDS = 7 * 86_400.0
"""How long latents of any other job are kept, in s."""


class DiskFull(RuntimeError):
    """The disk is full: the work stops, nothing torn was left, and it goes on where it stopped when there is room."""


@dataclasses.dataclass(frozen=True, slots=True)
class Staged:
    """Saved files, and where they go: every draft with its final path, and the pictures among the final paths."""

    finals: Mapping[Path, Path]
    pictures: list[Path]


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full."""
    from pipelines.result import _FULL

    if isinstance(error, LedgerError | SaveError):
        return error.full
    return isinstance(error, OSError) and error.errno in _FULL


@contextlib.contextmanager
def staging(job: Job) -> Iterator[Path]:
    """Yield a new hidden folder beside the job's place, gone afterwards; older ones of this job are removed first."""
    folder = Path(job.item.folder)
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder, job.name)
    draft = folder / f"{PREFIX}{job.name}-{job.lease}"
    draft.mkdir()
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def clear(folder: Path, name: str) -> None:
    """Remove what killed workers left behind of a job."""
    for old in folder.glob(f"{PREFIX}{name}-*"):
        shutil.rmtree(old, ignore_errors=True)


def stage(ledger: Ledger, job: Job, results: Mapping[str, Any], draft: Path) -> Staged | None:
    """Save results into `draft` and choose their final names; None if the job is not ours any more.

    Args:
        results: by what is added to their names, "" for the one that the job is called after.
    """
    wanted = Path(job.item.output.replace("\\", "/"))
    named = draft / wanted.name if job.item.output else draft
    saved, *others = results[""].save(named, draft=True)  # others: panels of one set
    stem, pictures = wanted.stem if others and job.item.output else saved.stem, [saved, *others]
    for more, result in results.items():
        if more:
            pictures += result.save(draft / f"{stem}{more}{saved.suffix}", draft=True)
    place = Path(job.item.folder) / wanted.parent
    place.mkdir(parents=True, exist_ok=True)
    target = ledger.target(job, _names(place, saved) if not job.item.output else iter([place / f"{stem}{saved.suffix}"]))
    if target is None:
        return None
    finals = {one: target.with_name(target.stem + one.name[len(stem) :]) for one in sorted(draft.iterdir())}
    finals = {one: finals[one] for one in sorted(finals, key=pictures.__contains__)}  # pictures appear last
    return Staged(finals, [finals[one] for one in pictures])


def sweep(ledger: Ledger, batch: str) -> int:
    """Remove the hidden folders of jobs of a batch that nobody works on; return how many."""
    removed = 0
    ended = ledger.jobs(batch=batch, states=("done", "failed", "poisoned", "cancelled"), limit=-1)
    by_folder: dict[str, set[str]] = {}
    for job in ended:
        by_folder.setdefault(job.item.folder, set()).add(job.name)
    for folder, names in by_folder.items():
        for old in Path(folder).glob(f"{PREFIX}*"):
            if old.is_dir() and old.name[len(PREFIX) :].rpartition("-")[0] in names:
                shutil.rmtree(old, ignore_errors=True)
                removed += 1
    return removed


def prune(ledger: Ledger, latents: Path) -> None:
    """Delete the kept latents of jobs that nobody will make: ended ones, and after a week those that wait for nobody either."""
    for folder in latents.iterdir() if latents.is_dir() else ():
        with contextlib.suppress(OSError):  # another worker prunes too
            job = ledger.get(folder.name)
            old = time.time() - folder.stat().st_mtime > KEPT_SECONDS
            if (job is not None and job.state in SPENT) or (old and (job is None or job.over)):
                shutil.rmtree(folder, ignore_errors=True)


def publish(staged: Mapping[Path, Path]) -> None:
    """Rename drafts to their final names, in order, and synchronise the folders. Raises: OSError."""
    for draft, final in staged.items():
        if final.is_dir():  # a folder of frames: the system renames no folder over a full one
            shutil.rmtree(final)
        os.replace(draft, final)
    sync_names(staged.values())


def sync_names(paths: Iterable[Path]) -> None:
    """Make the names of files last, before the ledger says that their job is done. Raises: OSError."""
    for folder in {path.parent for path in paths}:
        sync_folder(folder)


def _names(place: Path, saved: Path) -> Iterator[Path]:
    yield place / saved.name
    for number in range(2, SAME_NAMES):
        yield place / f"{saved.stem}-{number}{saved.suffix}"
