"""Workers: they take jobs from the ledger, one after another, keep the model loaded, and commit what they made.

`Worker` works in this process; `Pool` keeps worker processes alive. A worker that is asked to stop gives its job back within a
step; one that is killed loses nothing: its lease runs out, or its pool tells the ledger, and the job is made again.

`python -m pipelines.workers LEDGER` is one worker process. It ends with 0 when nothing is left (--until-empty), 3 for a ledger that
cannot be used, 4 for a full disk, 130 or 143 when a signal stopped it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines._jobs_pool import Pool
from pipelines._jobs_saving import SPENT, DiskFull, is_full, prune, stage, staging, sweep
from pipelines.jobs import Job, Ledger, LedgerError
from pipelines.request import Request, RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipelines.generate import Progress

__all__ = ["BrokenDevice", "DiskFull", "Pool", "Worker", "main", "told"]

LEASE = 30.0
"""How long a job belongs to a worker that is not heard of, in s."""
PAUSE = 0.25
"""How long a worker without work waits before it looks again, in s."""
HUNG = 3600.0
"""How long one step may take before a worker counts as hung and its lease runs out, in s."""
GRACE = 3.0
"""How long a stopped worker process may go on with its step before it gives the job back and ends, in s."""
ROUNDS = 2
"""Timed runs of each kind in a comparison."""

ROOM = "make room and start again, finished jobs are safe"

Make = Callable[..., Any]
"""`pipelines.generate.generate`, or something that is called as make(request, on_step=...) and returns a `Result`."""


class BrokenDevice(RuntimeError):
    """The device gave up on this process: only a new process can use it again. The job counts a try."""


class Worker:
    """Work on a ledger in this process.

    Args:
        make: turns a request into a result; by default `generate`, with latents kept until the picture is safe.
        compare: measures a request against its exact run; by default `pipelines.measure.compare`.
        batch: take jobs of this batch alone, and look at its finished files first.
        name: unique among the workers of the ledger.
        seconds: length of a lease; heartbeats push it on.
        latents: where latents lie until their picture is safe; by default beside the ledger.
        pause: s between two looks for jobs while there are none.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        make: Make | None = None,
        compare: Make | None = None,
        batch: str | None = None,
        name: str | None = None,
        seconds: float = LEASE,
        latents: Path | None = None,
        pause: float = PAUSE,
    ) -> None:
        self.ledger, self.batch, self.seconds, self.pause = ledger, batch, seconds, pause
        self.name = name or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.latents = ledger.path.parent / "latents" if latents is None else latents
        self.model, self.job = "", None  # type: str, Job | None
        self._make, self._compare = make, compare
        self._stopping, self._called = threading.Event(), threading.Event()

    def stop(self) -> None:
        """Ask it to end: a running job is given back within a step. May be called from any thread."""
        self._stopping.set()
        self._called.set()

    def look(self) -> None:
        """Say that there is a new job, so that it is not found only at the next look. May be called from any thread."""
        self._called.set()

    def run(self, until_empty: bool = False) -> int:
        """Work until stopped, or until nothing waits or runs any more; return how many jobs were finished here.

        Raises:
            DiskFull: nothing can be written; the job was given back. BrokenDevice: another process must go on.
            LedgerError: the ledger cannot be used any more.
        """
        try:
            return self._run(until_empty)
        except LedgerError as error:
            if error.full:
                raise DiskFull(f"{error}; {ROOM}") from error
            raise

    def _run(self, until_empty: bool) -> int:
        finished = 0
        prune(self.ledger, self.latents)
        if self.batch is not None:
            self.ledger.verify(self.batch)
        while not self._stopping.is_set():
            job = self.ledger.lease(self.name, prefers=self.model, seconds=self.seconds, batch=self.batch)
            if job is not None:
                finished += self._work(job)
                continue
            counts = self.ledger.counts(batch=self.batch)
            if until_empty and not counts["waiting"] + counts["running"]:
                break
            self._called.wait(self.pause)
            self._called.clear()
        if self.batch is not None and not self._stopping.is_set():
            sweep(self.ledger, self.batch)
        return finished

    def give_back(self) -> None:
        """Return the running job to the queue; for a process that is about to end."""
        job = self.job
        if job is not None:
            self.ledger.give_back(job)

    def _work(self, job: Job) -> bool:
        """Make one job, whatever comes; True if it was finished. Raises: DiskFull."""
        from pipelines.catalog import Unavailable
        from pipelines.generate import Cancelled
        from pipelines.ladder import OutOfMemory
        from pipelines.result import SaveError

        self.job = job
        pulse = _Pulse(self.ledger, job, self.seconds, self._stopping)
        try:
            with pulse:
                return self._made(job, pulse)
        except Cancelled:
            if self._stopping.is_set():
                self.ledger.give_back(job)
            else:
                self._failed(
                    job, "the run was stopped from inside"
                )  # no effect on one that was cancelled or lost
        except (RequestError, Unavailable, OutOfMemory) as error:
            self._failed(job, told(error), again=False)
        except (SaveError, LedgerError, OSError) as error:
            if is_full(error):
                with contextlib.suppress(LedgerError):  # no room for that either: the lease runs out
                    self.ledger.give_back(job)
                raise DiskFull(f"{told(error)}; {ROOM}") from error
            self._failed(job, told(error), again=not isinstance(error, SaveError))
        except Exception as error:
            self._failed(job, told(error))  # one bad job must not stop the ones behind it
            if "CUDA error" in str(
                error
            ):  # after one of these the device answers nothing more to this process
                raise BrokenDevice(f"{self.name} stopped: {told(error)}") from error
        except BaseException:
            self.ledger.give_back(job)
            raise
        finally:
            self.job = None
            now = self.ledger.get(job.name)
            if now is None or now.state in SPENT:
                shutil.rmtree(self._kept(job), ignore_errors=True)
        return False

    def _made(self, job: Job, pulse: _Pulse) -> bool:
        request = Request.from_dict(job.item.request)
        if job.item.kind == "tune":
            from pipelines._tuning import tuned

            report, self.model = tuned(request, job.item.tags, pulse.tell), request.model
            return self.ledger.done(job, (), report)
        results, report = self._results(job, request, pulse)
        self.model = request.model
        pulse.tell({"phase": "save"})
        with staging(job) as draft:
            staged = stage(self.ledger, job, results, draft)
            if staged is None:
                return False
            return self.ledger.done(job, staged.pictures, report, staged=staged.finals)

    def _results(self, job: Job, request: Request, pulse: _Pulse) -> tuple[dict[str, Any], dict[str, Any]]:
        if job.item.kind == "compare":
            from pipelines.measure import compare

            measured = (self._compare or compare)(request, request.accelerators, ROUNDS, on_step=pulse.step)
            results = {"": measured.results["accelerated"], "-exact": measured.results["exact"]}
            return results, results[""].report | {"measured": measured.to_dict()}
        if self._make is not None:
            result = self._make(request, on_step=pulse.step)
        else:
            from pipelines._kept import Latents
            from pipelines.generate import generate

            seen = pulse.seen if job.item.tags.get("preview") else None
            result = generate(request, on_step=pulse.step, keep=Latents(self._kept(job)), on_preview=seen)
        return {"": result}, result.report

    def _kept(self, job: Job) -> Path:
        return self.latents / job.name

    def _failed(self, job: Job, words: str, *, again: bool = True) -> None:
        self.ledger.failed(job, words, again=again)


class _Pulse:
    """Heartbeats of one job: with every step, and by a thread while a step takes long."""

    def __init__(self, ledger: Ledger, job: Job, seconds: float, stopping: threading.Event) -> None:
        self.ledger, self.job, self.seconds, self.stopping = ledger, job, seconds, stopping
        self.lost, self.heard, self.preview = False, time.monotonic(), ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="leapfrog-pulse", daemon=True)

    def __enter__(self) -> _Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def step(self, progress: Progress) -> bool:
        """Take note of where a run stands; False asks it to stop."""
        import dataclasses

        more = {"preview": self.preview} if self.preview and progress.phase == "denoise" else {}
        return self.tell(dataclasses.asdict(progress) | more)

    def seen(self, picture: Image) -> None:
        """Attach a small picture of the running estimate to the next heartbeats."""
        import base64
        import io

        file = io.BytesIO()
        picture.convert("RGB").save(file, "JPEG", quality=75)
        self.preview = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"

    def tell(self, progress: dict[str, Any]) -> bool:
        """Beat with a progress; False if the job is to be stopped."""
        self.heard = time.monotonic()
        if self.stopping.is_set() or self.lost:
            return False
        self.lost = not self.ledger.beat(self.job, progress, seconds=self.seconds)
        return not self.lost

    def _beat(self) -> None:
        while not self._over.wait(self.seconds / 3):
            if self.lost or time.monotonic() - self.heard > HUNG:
                return
            with contextlib.suppress(
                LedgerError
            ):  # busy or full: the next beat, or the end of the job, tells
                self.lost = not self.ledger.beat(self.job, seconds=self.seconds)


def told(error: BaseException) -> str:
    """Return what to tell a person about an error: our own words, or the kind and the message of a stranger's."""
    if type(error).__module__.partition(".")[0] in ("pipelines", "acceleration", "control", "dit"):
        return str(error)
    return f"Something unexpected went wrong ({type(error).__name__}: {str(error)[:300]})."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one worker process; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.workers", description="One worker process on a job ledger."
    )
    parser.add_argument("ledger", type=Path, help="file of the ledger")
    parser.add_argument("--batch", help="take jobs of this batch alone")
    parser.add_argument("--name", help="name of the worker in the ledger")
    parser.add_argument("--until-empty", action="store_true", help="end when nothing is left to do")
    parser.add_argument("--seconds", type=float, default=LEASE, help="length of a lease, in s")
    parser.add_argument(
        "--tries", type=int, default=3, help="how often a job is begun before it counts as poisoned"
    )
    parser.add_argument("--make", help="module:function in the place of pipelines.generate:generate")
    parser.add_argument("--follow", action="store_true", help="stop when the standard input ends")
    given = parser.parse_args(arguments)
    try:
        ledger = Ledger(given.ledger, tries=given.tries)
        worker = Worker(
            ledger, make=_named(given.make), batch=given.batch, name=given.name, seconds=given.seconds
        )
        with _signals(worker) as heard:
            if given.follow:
                threading.Thread(target=_follow, args=(worker,), daemon=True).start()
            worker.run(until_empty=given.until_empty)
        return 128 + heard[0] if heard else 0
    except DiskFull as error:
        print(error, file=sys.stderr)
        return 4
    except LedgerError as error:
        print(error, file=sys.stderr)
        return 3


def _named(name: str | None) -> Make | None:
    if name is None:
        return None
    module, _, function = name.partition(":")
    found: Make = getattr(importlib.import_module(module), function)
    return found


def _follow(worker: Worker) -> None:
    """Stop when whoever started the process is gone: its end of the pipe closes."""
    with contextlib.suppress(OSError, ValueError):
        while os.read(0, 1024):
            pass
    _ended(worker, 0)


@contextlib.contextmanager
def _signals(worker: Worker) -> Iterator[list[int]]:
    """Let SIGTERM and SIGINT stop the worker, also in the middle of a long step; yields the list of those that came."""
    heard: list[int] = []
    wanted = (signal.SIGTERM, signal.SIGINT)
    if not hasattr(signal, "pthread_sigmask"):

        def stopped(number: int, _frame: object) -> None:
            heard.append(number)
            worker.stop()

        for one in wanted:
            signal.signal(one, stopped)
        yield heard
        return
    # The main thread sees a signal only between two lines of Python, and a step can be one line: a thread waits for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)

    def wait() -> None:
        number = int(signal.sigwait(wanted))
        heard.append(number)
        _ended(worker, 128 + number)

    threading.Thread(target=wait, name="leapfrog-signals", daemon=True).start()
    yield heard


def _ended(worker: Worker, code: int) -> None:
    """Stop a worker; where its step lasts too long, give its job back and end the process."""
    worker.stop()
    time.sleep(GRACE)
    with contextlib.suppress(LedgerError):
        worker.give_back()
    os._exit(code)


if __name__ == "__main__":
    # run as a module this file would be there twice: here, and as what others import
    raise SystemExit(functools.partial(importlib.import_module("pipelines.workers").main)())
