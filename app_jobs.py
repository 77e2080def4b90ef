"""The jobs of the page: a thin layer over the job ledger, and what works on it. Events of the page only submit and watch.

A job outlives the tab that asked for it, and the page's own process: it stands in the ledger. It is seen only by the session that
asked for it. One press of a button is one `Job` here, and one row of the ledger for each picture.
"""

from __future__ import annotations

import dataclasses
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines.jobs import Item, Ledger, default_ledger
from pipelines.jobs import Job as Row
from pipelines.request import Request

if TYPE_CHECKING:
    from pipelines.workers import Pool, Worker

WAITING = 64
"""Most pictures of one session that wait; more are refused."""
TOTAL = 500
"""Most pictures that wait altogether."""
ROUNDS = 2
"""Timed runs of each kind in a comparison; one of each goes before."""
RUNS = 2 * (ROUNDS + 1)
NAMES = 64
"""Most rows of the ledger in one job of the page."""
PAUSE = 10.0
"""How long a worker rests that could not go on, in s: until there is room on the disk again, say."""

State = Literal["waiting", "running", "done", "failed", "cancelled"]
Make = Callable[..., Any]


class QueueFull(RuntimeError):
    """No room for another job, in words."""


@dataclasses.dataclass(frozen=True, slots=True)
class Now:
    """Where a run stands: the fields of `pipelines.generate.Progress`, without importing torch for them, and a small picture."""

    step: int = 0
    steps: int = 0
    phase: str = ""
    seconds: float = 0.0
    picture: int = 0
    note: str = ""
    preview: str = ""


@dataclasses.dataclass(eq=False, slots=True)
class Job:
    """One press of a button, as it stood when it was last read: see `Jobs.refresh`."""

    request: Request
    folder: Path
    name: str = ""
    state: State = "waiting"
    phase: str = "wait"
    progress: Now | None = None
    pace: tuple[int, float] | None = None
    """Step and time of the first step seen of this picture, from which the remaining time is estimated."""
    paths: list[Path] = dataclasses.field(default_factory=list)
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""
    started: float = 0.0
    ended: float = 0.0
    comparing: bool = False
    """Whether the picture is also made exactly, and both are measured."""
    measured: dict[str, Any] | None = None
    made: int = 0
    """How many of its pictures are finished."""
    stopped: bool = False
    """Whether it was cancelled before all of them were."""

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ("done", "failed", "cancelled")

    @property
    def seconds(self) -> float:
        """Time since the work began, or that it took, in s."""
        return (self.ended or time.time()) - self.started if self.started else 0.0

    def told(self, now: Now) -> None:
        """Take note of where the run stands."""
        last = self.progress
        if now.phase == "denoise" and (
            self.pace is None or last is None or last.picture != now.picture or now.step < self.pace[0]
        ):
            self.pace = (now.step, time.monotonic())
        self.progress, self.phase = now, now.phase


class Jobs:
    """The ledger as the page sees it, and its workers.

    Args:
        folder: where pictures are saved.
        make, compare: in the place of `generate` and `measure.compare`; for tests.
        warm: called once by the worker before its first job, to load what the first picture needs.
        ledger: the ledger, or its file; None takes this person's own.
        workers: None works in a thread of this process, which keeps the model loaded; a number starts so many processes;
            0 leaves the work to others.
    """

    def __init__(
        self,
        folder: Path,
        make: Make | None = None,
        warm: Callable[[], object] | None = None,
        compare: Make | None = None,
        *,
        ledger: Ledger | Path | None = None,
        workers: int | None = None,
    ) -> None:
        self.folder = folder.expanduser().absolute()
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger or default_ledger())
        self._make, self._warm, self._compare, self._workers = make, warm, compare, workers
        self._guard, self._closed = threading.Lock(), threading.Event()
        self._worker: Worker | None = None
        self._thread: threading.Thread | None = None
        self._pool: Pool | None = None
        self._problem = ""

    @property
    def problem(self) -> str:
        """Why nothing is worked on just now, in words; nothing where all is well."""
        return self._problem or ("" if self._pool is None else self._pool.problem)

    def submit(
        self, request: Request, *, owner: str = "", comparing: bool = False, ending: str = "",
        tags: Mapping[str, Any] | None = None, folder: Path | None = None,
    ) -> Job:  # fmt: skip
        """Put a request at the end of the queue, every picture of it by itself.

        Args:
            ending: of the file of a clip, ".mp4" say; "" leaves it to the result.
            tags: kept with the job; `preview` asks for small pictures while it is made.
            folder: where it is saved; None for the page's own.

        Raises:
            QueueFull, RequestError.
        """
        if self._closed.is_set():
            raise QueueFull("The page is closing; start it again and try once more.")
        pictures = 1 if comparing else request.images
        for limit, waiting in (
            (WAITING, self.ledger.counts(owner=owner)["waiting"]), (TOTAL, self.ledger.counts()["waiting"]),
        ):  # fmt: skip
            if waiting + pictures > limit:
                raise QueueFull(f"{waiting} pictures are waiting already; try again when some are done.")
        press = secrets.token_urlsafe(12)
        rows = self.ledger.add(
            Item(
                request=request.one(place).to_dict(), id=f"page-{press}-{place + 1}", owner=owner,
                kind="compare" if comparing else "generate", folder=str(folder or self.folder),
                output=_named(request.one(place), press, ending),
                tags={"source": "page", "press": press, "place": place, "of": pictures} | dict(tags or {}),
            )
            for place in range(pictures)
        )  # fmt: skip
        self.start()
        return _joined(rows)

    def start(self) -> None:
        """Start what works on the ledger, if it does not run yet, or have it look for new jobs at once."""
        worker = self._worker
        if worker is not None:
            worker.look()
        with self._guard:
            if self._closed.is_set() or self._thread is not None or self._pool is not None:
                return
            if self._workers is None:
                self._thread = threading.Thread(target=self._work, name="leapfrog-jobs", daemon=True)
                self._thread.start()
            elif self._workers:
                from pipelines.workers import Pool

                self._pool = Pool(self.ledger)
                self._pool.start(self._workers)

    def get(self, name: str, owner: str | None = None) -> Job | None:
        """Return a job by its name, which is made of the names of its rows; None for one of another owner."""
        rows = self._rows(name, owner)
        return _joined(rows) if rows else None

    def refresh(self, job: Job) -> Job:
        """Read a job again, in place; one that was deleted counts as cancelled."""
        rows = self._rows(job.name, None)
        if not rows:
            job.state = "cancelled"
            return job
        found = _joined(rows)
        before = (job.pace, job.progress)
        for field in dataclasses.fields(Job):
            if field.name not in ("pace", "progress"):
                setattr(job, field.name, getattr(found, field.name))
        job.pace, job.progress = before
        if found.progress is not None:
            phase = job.phase
            job.told(found.progress)
            job.phase = phase
        return job

    def ahead(self, job: Job) -> int:
        """Return how many pictures come before a waiting job."""
        rows = self._rows(job.name, None)
        if not rows or any(row.state != "waiting" for row in rows):
            return 0
        first = min(rows, key=lambda row: row.number)
        counts = self.ledger.counts()
        if counts["waiting"] > TOTAL:
            return counts["waiting"]
        waiting = self.ledger.jobs(states=("waiting",), limit=TOTAL)
        before = [
            one for one in waiting if (-one.item.priority, one.number) < (-first.item.priority, first.number)
        ]
        return len(before) + counts["running"]

    def cancel(self, name: str, owner: str | None = None) -> int:
        """Stop a job: at once if it waits, within one denoising step if it runs; return how many rows of it were."""
        return sum(self.ledger.cancel(name=row.name, owner=owner) for row in self._rows(name, owner))

    def busy(self, owner: str) -> bool:
        """Say whether a job of a session runs or waits; one look, so that none is missed on its way from one to the other."""
        counts = self.ledger.counts(owner=owner)
        return counts["running"] + counts["waiting"] > 0

    def close(self, seconds: float = 5.0) -> None:
        """End the work: a running picture goes back to the queue within a step, and what waits stays there."""
        self._closed.set()
        with self._guard:
            worker, thread, pool = self._worker, self._thread, self._pool
        if worker is not None:
            worker.stop()
        if thread is not None:
            thread.join(seconds)
            if thread.is_alive() and worker is not None:
                worker.give_back()
        if pool is not None:
            pool.stop(seconds)
        self.ledger.close()

    def _rows(self, name: str, owner: str | None) -> list[Row]:
        names = [one for one in (name or "").split(".") if one][:NAMES]
        found = [self.ledger.get(one, owner) for one in names]
        return [] if any(one is None for one in found) else [one for one in found if one is not None]

    def _work(self) -> None:
        from pipelines.jobs import LedgerError
        from pipelines.workers import DiskFull, Worker, told

        if self._warm is not None:
            try:
                self._warm()
            except Exception:  # noqa: BLE001 - what is wrong with the model is told by the first job that needs it
                pass
        while not self._closed.is_set():
            self._worker = Worker(self.ledger, make=self._make, compare=self._counted, pause=0.1)
            try:
                self._worker.run()
            except (DiskFull, LedgerError) as error:
                self._problem = str(error)
            except Exception as error:  # noqa: BLE001 - a worker that fell must not take the queue with it
                self._problem = told(error)
            self._closed.wait(PAUSE if self._problem else 0.0)
            self._problem = ""

    def _counted(
        self, request: Request, methods: Any, rounds: int, *, on_step: Callable[[Any], object]
    ) -> Any:
        """Compare, with the number of the run in the note of its progress."""
        if self._compare is None:
            from pipelines.measure import compare

            self._compare = compare
        runs = 0

        def step(progress: Any) -> object:
            nonlocal runs
            runs += progress.phase == "load"
            return on_step(dataclasses.replace(progress, note=progress.note or f"run {runs} of {RUNS}"))

        return self._compare(request, methods, rounds, on_step=step)


def _named(request: Request, press: str, ending: str) -> str:
    """Return the name of a file that is not called as `pipelines.result` would call it; "" leaves it to that."""
    from pipelines.result import _slug

    return f"{_slug(request)}-{request.seed}-{press[:6]}{ending}" if ending not in ("", ".png") else ""


def _joined(rows: Sequence[Row]) -> Job:
    """Return the rows of one press of a button as one job."""
    first = rows[0]
    request = Request.from_dict(first.item.request).replace(images=len(rows))
    job = Job(
        request,
        Path(first.item.folder),
        ".".join(row.name for row in rows),
        comparing=first.item.kind == "compare",
    )
    states = [row.state for row in rows]
    running = next((row for row in rows if row.state == "running"), None)
    place = rows.index(running) if running is not None else sum(row.over for row in rows)
    if "running" in states:
        job.state = "running"
    elif "waiting" in states:
        job.state = "waiting" if states.count("waiting") == len(states) else "running"
    else:
        job.state = "done" if "done" in states else "cancelled" if "cancelled" in states else "failed"
    if running is not None:
        known = {field.name for field in dataclasses.fields(Now)}
        now = Now(**{name: value for name, value in running.progress.items() if name in known})
        job.progress = dataclasses.replace(now, picture=place)
        job.phase = running.phase or "load"
    elif 0 < place < len(rows):
        job.progress, job.phase = Now(picture=place), "wait"
    job.made, job.stopped = states.count("done"), "cancelled" in states
    job.started = min((row.started for row in rows if row.started), default=0.0)
    job.ended = max((row.ended for row in rows), default=0.0) if job.over else 0.0
    _finished(job, [row for row in rows if row.state == "done"])
    errors = [row.error for row in rows if row.state in ("failed", "poisoned")]
    job.error = errors[0] if errors else ""
    return job


def _finished(job: Job, rows: Sequence[Row]) -> None:
    """Put files and reports of the finished rows into a job."""
    job.paths = [Path(file) for row in rows for file in row.files]
    if not rows:
        return
    job.report = _whole([row.report for row in rows])
    if job.comparing:
        job.measured = rows[0].report.get("measured")
        job.paths.reverse()  # exact first
    if job.request.profile is not None:  # the name has become what it stands for
        took = job.report.get("effective", {}).get("accelerators", ())
        job.request = job.request.replace(profile=None, accelerators=tuple(took))


def _whole(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the report of all pictures: the first one's, with times added up and every warning."""
    if len(reports) == 1:
        return reports[0]
    timings: dict[str, float] = {}
    for one in reports:
        for phase, seconds in one.get("timings", {}).items():
            timings[phase] = timings.get(phase, 0.0) + float(seconds)
    several = {
        name: list(dict.fromkeys(words for one in reports for words in one.get(name, [])))
        for name in ("warnings", "failures")
    }
    return reports[0] | {"timings": timings} | several
