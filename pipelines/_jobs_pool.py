"""A pool of local worker processes: started afresh, watched, and started again when they die."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines._jobs_store import LedgerError
from pipelines.jobs import Ledger

ROOT = Path(__file__).resolve().parents[1]
DEATHS = 5
"""How often in a minute one worker may die before it is not started again."""
PAUSE = 0.1


@dataclass(eq=False, slots=True)
class _Place:
    """One worker of the pool: its process now, and when earlier ones died."""

    number: int
    name: str
    process: subprocess.Popen[bytes]
    deaths: list[float]
    over: bool = False


class Pool:
    """Worker processes on one ledger.

    Args:
        batch, seconds, tries: see `Worker` and `Ledger`; make: "module:function" in the place of `generate`.
        until_empty: the workers end when nothing is left to do.
        devices: numbers of CUDA devices, given out to the workers in turn; () leaves the choice to them.
        environment: variables set for the workers.
    """

    def __init__(
        self,
        ledger: Path | Ledger,
        *,
        batch: str | None = None,
        make: str | None = None,
        until_empty: bool = False,
        seconds: float = 30.0,
        tries: int = 3,
        devices: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger, tries=tries)
        self.problem = ""
        """What stopped a worker for good, in words."""
        self._more = [f"--seconds={seconds}", f"--tries={self.ledger.tries}", "--follow"]
        self._more += [f"--batch={batch}"] if batch is not None else []
        self._more += [f"--make={make}"] if make is not None else []
        self._more += ["--until-empty"] if until_empty else []
        self._devices, self._environment = list(devices), dict(environment or {})
        self._places: list[_Place] = []
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._watcher: threading.Thread | None = None

    def start(self, count: int = 1) -> None:
        """Start so many workers. Raises: ValueError for fewer than one."""
        if count < 1:
            raise ValueError(f"count must be at least 1 worker, got {count}")
        with self._lock:
            self._stopping.clear()
            for _ in range(count):
                number = len(self._places)
                name = _name(number)
                self._places.append(_Place(number, name, self._spawned(number, name), []))
            if self._watcher is None or not self._watcher.is_alive():
                self._watcher = threading.Thread(target=self._watch, name="leapfrog-pool", daemon=True)
                self._watcher.start()

    def alive(self) -> int:
        """Return how many workers live."""
        with self._lock:
            return sum(place.process.poll() is None for place in self._places)

    def processes(self) -> list[int]:
        """Return the numbers of the living worker processes."""
        with self._lock:
            return [place.process.pid for place in self._places if place.process.poll() is None]

    def working(self) -> bool:
        """Whether a worker lives or is about to be started again; False when all have ended for good."""
        with self._lock:
            return any(not place.over for place in self._places)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all workers have ended for good; False if the time was over first."""
        end = None if seconds is None else time.monotonic() + seconds
        while self.working():
            if end is not None and time.monotonic() > end:
                return False
            time.sleep(PAUSE)
        return True

    def stop(self, seconds: float = 5.0) -> None:
        """End all workers: asked first, and killed when they have not ended in time; their jobs go back to the queue."""
        self._stopping.set()
        with self._lock:
            for place in self._places:
                if place.process.poll() is None:
                    place.process.terminate()
            end = time.monotonic() + seconds
            for place in self._places:
                try:
                    place.process.wait(max(0.0, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    place.process.kill()
                    place.process.wait()
                self._closed(place)
                with contextlib.suppress(LedgerError):
                    self.ledger.lost(place.name)
            self._places = []
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join(seconds)
            self._watcher = None

    def _watch(self) -> None:
        while not self._stopping.wait(PAUSE):
            with self._lock:
                for place in self._places:
                    code = place.process.poll()
                    if code is not None and not place.over:
                        self._ended(place, code)

    def _ended(self, place: _Place, code: int) -> None:
        self._closed(place)
        with contextlib.suppress(LedgerError):
            self.ledger.lost(place.name)
        now = time.monotonic()
        place.deaths = [one for one in place.deaths if now - one < 60] + [now]
        if code in (0, 130, 143):
            place.over = True
        elif code == 4:
            place.over, self.problem = (
                True,
                "the disk is full: make room and start again, finished jobs are safe",
            )
        elif code == 3:
            place.over, self.problem = True, f"the job ledger {self.ledger.path} cannot be used"
        elif len(place.deaths) > DEATHS:
            place.over, self.problem = (
                True,
                f"a worker died {len(place.deaths)} times in a minute (exit {code})",
            )
        else:
            place.name = _name(place.number)
            place.process = self._spawned(place.number, place.name)

    def _spawned(self, number: int, name: str) -> subprocess.Popen[bytes]:
        environment = os.environ | self._environment
        environment["PYTHONPATH"] = os.pathsep.join(
            one for one in (str(ROOT), environment.get("PYTHONPATH", "")) if one
        )
        if self._devices:
            environment["CUDA_VISIBLE_DEVICES"] = self._devices[number % len(self._devices)]
        command = [
            sys.executable,
            "-m",
            "pipelines.workers",
            str(self.ledger.path),
            f"--name={name}",
            *self._more,
        ]
        return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)

    @staticmethod
    def _closed(place: _Place) -> None:
        if place.process.stdin is not None:
            place.process.stdin.close()


def _name(number: int) -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{number}-{secrets.token_hex(3)}"
