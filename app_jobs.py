"""The jobs of the page: one thread makes pictures, one request after another; events of the page only submit and watch.

A job outlives the tab that asked for it. Its name is random, so only who asked for it can watch or stop it.
"""

from __future__ import annotations

import dataclasses
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pipelines.generate import Progress
    from pipelines.measure import Measured
    from pipelines.request import Request
    from pipelines.result import Result

WAITING = 32
"""Most jobs that wait; more are refused."""
ROUNDS = 2
"""Timed runs of each kind in a comparison; one of each goes before."""
RUNS = 2 * (ROUNDS + 1)
KEPT = 200
"""How many finished jobs are remembered."""

State = Literal["waiting", "running", "done", "failed", "cancelled"]
Make = Callable[..., "Result"]
"""`pipelines.generate.generate`, or something with its interface."""
Compare = Callable[..., "Measured"]
"""`pipelines.measure.compare`, or something with its interface."""


class QueueFull(RuntimeError):
    """No room for another job, in words."""


@dataclasses.dataclass(eq=False, slots=True)
class Job:
    """One request on its way. The worker writes, everyone else reads, save for `cancel`."""

    request: Request
    folder: Path
    name: str = dataclasses.field(default_factory=lambda: secrets.token_urlsafe(16))
    state: State = "waiting"
    phase: str = "wait"
    progress: Progress | None = None
    pace: tuple[int, float] | None = None
    """Step and time of the first step of this picture, from which the remaining time is estimated."""
    paths: list[Path] = dataclasses.field(default_factory=list)
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""
    started: float = 0.0
    ended: float = 0.0
    cancel: threading.Event = dataclasses.field(default_factory=threading.Event)
    comparing: bool = False
    """Whether the picture is also made exactly, and both are measured."""
    measured: Measured | None = None
    runs: int = 0
    """Runs begun; a comparison takes several."""

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ("done", "failed", "cancelled")

    @property
    def seconds(self) -> float:
        """Time since the work began, or that it took, in s."""
        return (self.ended or time.monotonic()) - self.started if self.started else 0.0

    def told(self, progress: Progress) -> bool:
        """Take note of where the run stands; False asks it to stop."""
        last = self.progress
        self.runs += progress.phase == "load"
        if progress.phase == "denoise" and (
            self.pace is None or last is None or last.picture != progress.picture
        ):
            self.pace = (progress.step, time.monotonic())
        self.progress, self.phase = progress, progress.phase
        return not self.cancel.is_set()


class Jobs:
    """A queue and its one worker, which starts with the first job.

    Args:
        folder: where pictures are saved.
        make: turns a request into a result; `pipelines.generate.generate`, imported when first needed.
        warm: called once by the worker before its first job, to load what the first picture needs.
        compare: measures a request against its exact run; `pipelines.measure.compare`.
    """

    def __init__(
        self,
        folder: Path,
        make: Make | None = None,
        warm: Callable[[], object] | None = None,
        compare: Compare | None = None,
    ) -> None:
        self.folder = folder
        self._make, self._warm, self._compare = make, warm, compare
        self._known: OrderedDict[str, Job] = OrderedDict()
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._worker: threading.Thread | None = None
        self._running: Job | None = None
        self._closed = False

    def submit(self, request: Request, *, comparing: bool = False) -> Job:
        """Put a request at the end of the queue. Raises: QueueFull."""
        with self._changed:
            if self._closed:
                raise QueueFull("The page is closing; start it again and try once more.")
            if len(self._queue) >= WAITING:
                raise QueueFull(f"{WAITING} pictures are waiting already; try again when some are done.")
            job = Job(request, self.folder, comparing=comparing)
            self._known[job.name] = job
            self._queue.append(job)
            self._forget()
            self._changed.notify()
        self.start()
        return job

    def start(self) -> None:
        """Start the worker, if it does not run yet."""
        with self._changed:
            if self._worker is None and not self._closed:
                self._worker = threading.Thread(target=self._work, name="leapfrog-jobs", daemon=True)
                self._worker.start()

    def get(self, name: str) -> Job | None:
        """Return a job by its name, if it is still known."""
        with self._changed:
            return self._known.get(name)

    def ahead(self, job: Job) -> int:
        """Return how many jobs come before a waiting one."""
        with self._changed:
            before = self._queue.index(job) if job in self._queue else 0
            return before + (self._running is not None and self._running is not job)

    def cancel(self, name: str) -> Job | None:
        """Stop a job: at once if it waits, within one denoising step if it runs."""
        with self._changed:
            job = self._known.get(name)
            if job is not None and not job.over:
                job.cancel.set()
                if job in self._queue:
                    self._queue.remove(job)
                    job.state = "cancelled"
        return job

    def close(self, seconds: float = 5.0) -> None:
        """Cancel everything and wait a little for the running step to end."""
        with self._changed:
            self._closed = True
            for job in list(self._known.values()):
                job.cancel.set()
                if job in self._queue:
                    job.state = "cancelled"
            self._queue.clear()
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join(seconds)

    def _work(self) -> None:
        if self._warm is not None:
            try:
                self._warm()
            except Exception:  # noqa: BLE001 - what is wrong with the model is told by the first job that needs it
                pass
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                job = self._running = self._queue.popleft()
                job.state, job.started = "running", time.monotonic()
            state = self._run(job)
            with self._changed:
                job.ended = time.monotonic()
                job.state, self._running = state, None

    def _run(self, job: Job) -> State:
        from pipelines.generate import Cancelled

        try:
            results = (
                self._compared(job) if job.comparing else [self._generate()(job.request, on_step=job.told)]
            )
            job.phase = "save"
            job.folder.mkdir(parents=True, exist_ok=True)
            job.paths = [path for result in results for path in result.save(job.folder)]
            job.report = results[-1].report
            job.request = results[-1].request  # a profile's name has become what it stands for
        except Cancelled:
            return "cancelled"
        except Exception as error:  # noqa: BLE001 - one bad job must not stop the ones behind it
            job.error = told(error)
            return "failed"
        return "done"

    def _compared(self, job: Job) -> list[Result]:
        """Compare a request with its exact run; return the exact result and the accelerated one."""
        if self._compare is None:
            from pipelines.measure import compare

            self._compare = compare
        job.measured = self._compare(job.request, job.request.accelerators, ROUNDS, on_step=job.told)
        return [job.measured.results[kind] for kind in ("exact", "accelerated")]

    def _generate(self) -> Make:
        if self._make is None:
            from pipelines.generate import generate

            self._make = generate
        return self._make

    def _forget(self) -> None:
        over = [name for name, job in self._known.items() if job.over]
        for name in over[: max(0, len(self._known) - KEPT)]:
            del self._known[name]


def told(error: Exception) -> str:
    """Return what to tell a person about an error: our own words, or the kind and the message of a stranger's."""
    if type(error).__module__.partition(".")[0] in ("pipelines", "acceleration", "dit", "app_jobs"):
        return str(error)
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return (
            "There was not enough memory. Choose a smaller size or fewer pictures, or close other programs."
        )
    return f"Something unexpected went wrong ({type(error).__name__}: {str(error)[:300]})."
