"""Tell of jobs as they change: one thread asks the ledger, however many listen, and sleeps where nobody does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from pipelines.jobs import Job, Ledger, LedgerError

PAUSE = 0.1
"""Time between two looks at the ledger, in s."""
SILENCE = 15.0
"""After so many s without news a line of comment is sent, which keeps the way open."""

Told = Callable[[Job], None]


class Watcher:
    """Hand the changes of jobs to who listens; `changes` of the ledger is asked once for all."""

    def __init__(self, ledger: Ledger, pause: float = PAUSE) -> None:
        self._ledger, self._pause = ledger, pause
        self._listeners: dict[str, list[Told]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def listeners(self) -> int:
        """How many listen now."""
        with self._lock:
            return sum(map(len, self._listeners.values()))

    @contextlib.contextmanager
    def listening(self, job: Job, told: Told) -> Iterator[None]:
        """Have `told` called, in a thread of its own, with every change of a job after `job.change`."""
        with self._lock:
            self._listeners.setdefault(job.name, []).append(told)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._watch, args=(job.change,), name="leapfrog-watch", daemon=True
                )
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._listeners[job.name].remove(told)
                if not self._listeners[job.name]:
                    del self._listeners[job.name]

    async def states(self, job: Job) -> AsyncIterator[Job | None]:
        """Yield the states of a job from the present one to the last; None where there was no news for a while."""
        loop, news = asyncio.get_running_loop(), asyncio.Queue[Job]()

        def told(one: Job) -> None:
            with contextlib.suppress(RuntimeError):  # who listened has left, and its loop ended
                loop.call_soon_threadsafe(news.put_nowait, one)

        with self.listening(job, told):
            present = await asyncio.to_thread(self._ledger.get, job.name) or job
            last = present.change
            yield present
            while not present.over:
                try:
                    present = await asyncio.wait_for(news.get(), SILENCE)
                except TimeoutError:
                    yield None
                    continue
                if present.change > last:
                    last = present.change
                    yield present

    def _watch(self, since: int) -> None:
        pause = threading.Event()
        while True:
            with self._lock:
                if not self._listeners:
                    self._thread = None
                    return
            try:
                since, jobs = self._ledger.changes(since)
            except LedgerError:  # a full disk, a file in use: look again
                jobs = []
            for job in jobs:
                with self._lock:
                    listeners = list(self._listeners.get(job.name, ()))
                for told in listeners:
                    told(job)
            pause.wait(self._pause)


async def event_stream(
    watcher: Watcher, job: Job, shown: Callable[[Job], dict[str, Any]]
) -> AsyncIterator[str]:
    """Yield the server-sent events of a job; the last one bears the name of the state that it ended in."""
    async for state in watcher.states(job):
        if state is None:
            yield ": still there\n\n"
        else:
            name = "progress" if state.state == "running" else state.state
            yield f"id: {state.change}\nevent: {name}\ndata: {json.dumps(shown(state))}\n\n"


async def ended(watcher: Watcher, job: Job) -> Job:
    """Return a job when it has ended."""
    last = job
    async for state in watcher.states(job):
        last = state or last
    return last
