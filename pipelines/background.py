"""Batches in processes of their own: begun from uploaded files, they go on without whoever began them, and are found again.

A batch lies in a folder of its own; `.leapfrog` in it holds what was uploaded, the ledger, whose the batch is and which process
works on it. All that is shown is read from there, so nothing is lost with a browser or with the process that serves the page.

Differs: a manifest that was uploaded may name only models that are offered, and files that were uploaded with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines._batch_folder import BATCH, Folder
from pipelines._paths import file_name
from pipelines._tables import KINDS
from pipelines.request import RequestError

if TYPE_CHECKING:
    from pipelines._planning import Plan
    from pipelines.jobs import Job, Ledger

FILES, BYTES = 500, 1_000_000_000
"""Most files of a batch, and most bytes of them together."""
WORKERS = 8
"""Most worker processes of a batch that is begun here."""
TOGETHER = 4
"""Most batches that run at once."""
DAY = 86_400.0
"""How long uploaded files wait for their batch to be begun, in s."""
LEASE = 30.0
"""Length of a worker's lease, in s: it was heard of when its deadline was pushed on to that."""
WINDOW = 120.0
"""Over how long the pace of a batch is taken, in s."""
ROOT = Path(__file__).resolve().parents[1]

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,80}\Z")
_NOTE, _PROCESS, _LOG = "page.json", "process.json", "run.log"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a batch stands. `state` is new, starting, running, paused, finished or broken; `pace` in items/s, `left` in s.

    `workers` are (name, item, phase and step, seconds since it was heard of).
    """

    name: str
    title: str
    state: str
    counts: dict[str, int]
    pace: float | None = None
    left: float | None = None
    workers: tuple[tuple[str, str, str, float], ...] = ()
    failures: tuple[tuple[str, str], ...] = ()
    error: str = ""
    folder: str = ""

    @property
    def items(self) -> int:
        """All items of the batch."""
        return sum(self.counts.values())


class Batches:
    """The batches below a folder, each seen by its owner alone.

    Args:
        clock: seconds, the same as the ledgers'.
        command: what runs `leapfrog`; for tests.
    """

    def __init__(
        self, root: Path, *, clock: Callable[[], float] = time.time, command: Sequence[str] = ()
    ) -> None:
        self.root, self.clock = root.expanduser().absolute(), clock
        self._command = list(command) or [sys.executable, "-m", "pipelines.cli"]
        self._lock = threading.RLock()
        self._ledgers: dict[str, Ledger] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._seen: dict[str, deque[tuple[float, int]]] = {}

    def receive(self, owner: str, files: Sequence[Path], into: str = "") -> tuple[str, Path]:
        """Copy uploaded files into a new batch, or into one of the owner's; return its name and the manifest.

        Raises:
            RequestError: no manifest among them, several, too many or too large files, or names that cannot be used.
        """
        manifest = _manifest(files)
        if into:
            folder = self._folder(into, owner)
        else:
            self._tidy(owner)
            stem = re.sub(r"[^a-z0-9]+", "-", manifest.stem.lower()).strip("-")[:40] or "batch"
            day = time.strftime("%Y%m%d", time.localtime(self.clock()))
            folder = self.root / f"{stem.strip('-')}-{day}-{secrets.token_hex(4)}"
        place = folder / ".leapfrog" / f"inputs-{secrets.token_hex(4)}"
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        place.mkdir(mode=0o700)
        for file in files:
            shutil.copyfile(file, place / file.name)
        if not into:
            self._note(folder, {"owner": _hidden(owner), "title": manifest.name, "created": self.clock()})
        return folder.name, place / manifest.name

    def plan(self, name: str, owner: str, manifest: Path, models: Collection[str]) -> Plan:
        """Check a received manifest and say what a run would do; see `pipelines.batch.plan`.

        Raises:
            ManifestError: with every problem and its line. RequestError: no such batch.
        """
        from pipelines import batch

        return batch.plan(manifest, self._folder(name, owner), models=models)

    def start(self, name: str, owner: str, manifest: Path, workers: int) -> None:
        """Begin, or go on with, what a checked manifest asks for. Raises: RequestError."""
        folder = self._folder(name, owner)
        if not manifest.is_relative_to(folder / ".leapfrog"):
            raise RequestError("manifest", manifest.name, "one that was uploaded for this batch")
        self._note(folder, self._told(folder) | {"begun": True})
        self._spawn(folder, ["run", str(manifest), "--output", str(folder)], workers)

    def resume(self, name: str, owner: str, workers: int) -> None:
        """Go on with what is missing. Raises: RequestError."""
        folder = Folder(self._folder(name, owner)).require().output
        self._spawn(folder, ["resume", str(folder)], workers)

    def pause(self, name: str, owner: str) -> bool:
        """Ask the process of a batch to end: what runs is given back within 5 s. False if there was none."""
        process = self._process(self._folder(name, owner))
        if process is None:
            return False
        process.terminate()
        return True

    def cancel(self, name: str, owner: str) -> int:
        """Cancel what waits or runs; return how many items were."""
        return self._ledger(self._folder(name, owner)).cancel(batch=BATCH)

    def retry(self, name: str, owner: str, workers: int) -> int:
        """Try again what failed or was cancelled; return how many items are."""
        from pipelines import batch

        folder = self._folder(name, owner)
        count = batch.retry(folder)
        if count:
            self._spawn(folder, ["resume", str(folder)], workers)
        return count

    def export(self, name: str, owner: str) -> list[Path]:
        """Write results.jsonl and failures.jsonl, and return them."""
        from pipelines import batch

        return batch.export(self._folder(name, owner))

    def mine(self, owner: str) -> list[tuple[str, str]]:
        """Return name and title of the batches of an owner that were begun, the newest first."""
        found = []
        for file in self.root.glob(f"*/.leapfrog/{_NOTE}"):
            told, name = self._told(file.parent.parent), file.parent.parent.name
            if told.get("owner") == _hidden(owner) and told.get("begun") and _NAME.match(name):
                found.append((float(told.get("created", 0.0)), name, str(told.get("title", name))))
        return [(name, title) for _, name, title in sorted(found, reverse=True)]

    def ledger(self, name: str, owner: str) -> Ledger | None:
        """Return the ledger of a batch, or None where it was not begun yet. Raises: RequestError."""
        folder = self._folder(name, owner)
        return self._ledger(folder) if Folder(folder).exists else None

    def latest(self, name: str, owner: str, count: int) -> list[Job]:
        """Return the finished items that were begun last."""
        found = self.ledger(name, owner)
        return [] if found is None else found.jobs(batch=BATCH, states=("done",), limit=count)

    def look(self, name: str, owner: str) -> Standing:
        """Return how a batch stands. Raises: RequestError: no such batch of this owner."""
        folder = self._folder(name, owner)
        told, alive = self._told(folder), self._process(folder) is not None
        title = str(told.get("title", name))
        if not Folder(folder).exists:
            state = "starting" if alive else "broken" if told.get("begun") else "new"
            error = self._words(folder) if state == "broken" else ""
            return Standing(name=name, title=title, state=state, counts={}, error=error, folder=str(folder))
        ledger = self._ledger(folder)
        counts = ledger.counts(batch=BATCH)
        missing = counts["waiting"] + counts["running"]
        state = "finished" if not missing else "running" if alive else "paused"
        if alive and not sum(counts.values()):
            state = "starting"
        pace = self._pace(name, counts["done"]) if state == "running" else None
        failed = ledger.jobs(batch=BATCH, states=("failed", "poisoned"), limit=10)
        return Standing(
            name=name, title=title, state=state, counts=counts, pace=pace, left=missing / pace if pace else None,
            workers=tuple(self._beats(ledger)) if counts["running"] else (),
            failures=tuple((job.item.id, self._without_places(folder, job.error)) for job in failed),
            error=self._words(folder) if state == "paused" else "", folder=str(folder),
        )  # fmt: skip

    def close(self) -> None:
        """Close the ledgers; the batches go on."""
        with self._lock:
            for one in self._ledgers.values():
                one.close()
            self._ledgers.clear()

    def _beats(self, ledger: Ledger) -> list[tuple[str, str, str, float]]:
        now, found = self.clock(), []
        for job in ledger.jobs(batch=BATCH, states=("running",), limit=64):
            step = f" {job.progress['step']}/{job.progress['steps']}" if job.progress.get("steps") else ""
            found.append((job.worker, job.item.id, f"{job.phase}{step}", max(0.0, now - (job.deadline - LEASE))))
        return found

    def _pace(self, name: str, done: int) -> float | None:
        """Return items/s since the first look within the window."""
        now, seen = self.clock(), self._seen.setdefault(name, deque())
        if seen and (done < seen[-1][1] or now - seen[-1][0] > WINDOW):
            seen.clear()
        seen.append((now, done))
        while now - seen[0][0] > WINDOW:
            seen.popleft()
        first = seen[0]
        return (done - first[1]) / (now - first[0]) if done > first[1] else None

    def _spawn(self, folder: Path, words: list[str], workers: int) -> None:
        if isinstance(workers, bool) or not isinstance(workers, int) or not 1 <= workers <= WORKERS:
            raise RequestError("workers", workers, f"a whole number from 1 to {WORKERS}")
        import psutil

        with self._lock:  # two presses of a button begin one process
            if self._process(folder) is not None:
                return  # it goes on, and takes what was put back
            others = [one.parent.parent for one in self.root.glob(f"*/.leapfrog/{_PROCESS}")]
            if sum(self._process(one) is not None for one in others) >= TOGETHER:
                raise RequestError("batch", folder.name, f"begun when fewer than {TOGETHER} others run")
            paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            command = [*self._command, "batch", *words, "--workers", str(workers), "--quiet", "--json"]
            with (folder / ".leapfrog" / _LOG).open("wb") as log:
                child = subprocess.Popen(
                    command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL, stderr=log, start_new_session=os.name == "posix",
                )  # fmt: skip
            self._children[folder.name] = child
            self._seen.pop(folder.name, None)
            try:
                born = psutil.Process(child.pid).create_time()
            except psutil.Error:  # over already; what it said stands in the log
                born = 0.0
            self._write(folder, _PROCESS, {"pid": child.pid, "born": born})

    def _process(self, folder: Path) -> Any:
        """Return the process that works on a batch, also one that an earlier page began; None if there is none."""
        import psutil

        child = self._children.get(folder.name)
        if child is not None and child.poll() is not None:
            del self._children[folder.name]
            return None
        try:
            told = json.loads((folder / ".leapfrog" / _PROCESS).read_bytes())
            found = psutil.Process(int(told["pid"]))
            same = abs(found.create_time() - float(told["born"])) < 1.0
            return found if same and found.status() != psutil.STATUS_ZOMBIE else None
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            return None

    def _words(self, folder: Path) -> str:
        """Return the last words of a process that ended before its batch did."""
        try:
            text = (folder / ".leapfrog" / _LOG).read_bytes()[-20_000:].decode("utf-8", "replace")
        except OSError:
            return ""
        lines = [line for line in text.splitlines() if line.startswith("leapfrog: ")]
        return self._without_places(folder, lines[-1].removeprefix("leapfrog: ")[:500]) if lines else ""

    def _without_places(self, folder: Path, text: str) -> str:
        inside = re.escape(str(folder)) + r"(?:/\.leapfrog/inputs-[0-9a-f]+)?/?"
        return re.sub(inside, "", text)

    def _folder(self, name: str, owner: str) -> Path:
        folder = self.root / name if isinstance(name, str) and _NAME.match(name) else None
        if folder is None or not owner or self._told(folder).get("owner") != _hidden(owner):
            raise RequestError("batch", name, "one of yours")
        return folder

    def _ledger(self, folder: Path) -> Ledger:
        from pipelines.jobs import Ledger

        with self._lock:
            if folder.name not in self._ledgers:
                while len(self._ledgers) >= 16:
                    self._ledgers.pop(next(iter(self._ledgers))).close()
                self._ledgers[folder.name] = Ledger(Folder(folder).require().path)
            return self._ledgers[folder.name]

    def _tidy(self, owner: str) -> None:
        """Remove what was uploaded and never begun: of this owner at once, of others after a day."""
        for file in self.root.glob(f"*/.leapfrog/{_NOTE}"):
            told = self._told(file.parent.parent)
            old = self.clock() - float(told.get("created", 0.0)) > DAY
            if not told.get("begun") and (old or told.get("owner") == _hidden(owner)):
                shutil.rmtree(file.parent.parent, ignore_errors=True)

    def _told(self, folder: Path) -> dict[str, Any]:
        try:
            found = json.loads((folder / ".leapfrog" / _NOTE).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _note(self, folder: Path, told: dict[str, Any]) -> None:
        self._write(folder, _NOTE, told)

    @staticmethod
    def _write(folder: Path, name: str, value: dict[str, Any]) -> None:
        from pipelines.result import write_file

        write_file(folder / ".leapfrog" / name, json.dumps(value).encode(), overwrite=True)


def _manifest(files: Sequence[Path]) -> Path:
    """Return the one manifest among uploaded files, after a look at all names and sizes. Raises: RequestError."""
    found = [file for file in files if file.suffix.lower() in KINDS]
    if len(found) != 1:
        given = ", ".join(file.name for file in found) or "none"
        raise RequestError("manifest", given, f"one file that ends in {', '.join(KINDS)}, with the files that it names")
    if len(files) > FILES or sum(file.stat().st_size for file in files) > BYTES:
        raise RequestError("files", len(files), f"at most {FILES} files of {BYTES // 1_000_000} MB together")
    names = [file.name.casefold() for file in files]
    for file in files:
        reason = file_name(file.name)
        if reason is not None or names.count(file.name.casefold()) > 1:
            raise RequestError("files", file.name, f"usable file names, each once ({reason or 'it is there twice'})")
    return found[0]


def _hidden(owner: str) -> str:
    """Return what stands for an owner in a file: the name itself would let its reader in."""
    return hashlib.sha256(owner.encode()).hexdigest()
