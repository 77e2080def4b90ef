"""The job ledger: what was asked for, who works on it and what came of it, in one SQLite file that outlives every process.

A job waits, is leased to a worker until a deadline that heartbeats push on, and ends `done`, `failed`, `poisoned` (the last try
failed too) or `cancelled`. A worker that lost its lease - it died, hung, or the job was cancelled - can no longer change anything:
files become visible and the job `done` in one transaction that checks the lease, so nothing is lost and nothing made twice. Which
bytes are to appear under which names is written down for good before, and these names and bytes decide what a dead worker had done.

Differs: a lease lasts by the clock of the ledger alone; other computers never compare theirs (Ray's driver holds the ledger).
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines._jobs_keys import content_key, default_model, digests_of, file_digest
from pipelines._jobs_records import STATES, Item, Job
from pipelines._jobs_saving import clear, publish, sync_names
from pipelines._jobs_store import LedgerError, Store
from pipelines.request import RequestError

__all__ = [
    "STATES", "Item", "Job", "Ledger", "LedgerError", "content_key", "default_ledger", "digests_of", "file_digest",
]  # fmt: skip

TRIES = 3
"""How often a job is begun before it counts as poisoned."""
CHANGES = 1000
"""Most jobs told by one call of `changes`."""


class Ledger:
    """The jobs of a computer; safe for several processes and threads.

    Args:
        clock: seconds, the same for all who share the file.
        tries: how often a job is begun before it counts as poisoned.

    Raises:
        LedgerError: here and in every method, where the file is damaged, foreign, of another version, or the disk is full.
    """

    def __init__(
        self, path: Path | str, *, clock: Callable[[], float] = time.time, tries: int = TRIES
    ) -> None:
        self.path, self.clock, self.tries = Path(path), clock, tries
        self._store = Store(self.path)

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        self._store.close()

    def add(self, items: Iterable[Item]) -> list[Job]:
        """Put items in the queue, all or none; one that is there already (batch, owner, id, key) is returned as it stands.

        Raises:
            RequestError: a request that is not valid.
        """
        known: dict[str, str] = {}
        values = [_values(item, known) for item in items]
        names, now = [], self.clock()
        with self._store.writing() as db:
            change = _next_change(db) if values else 0
            for value in values:
                row = value | {"name": secrets.token_urlsafe(16), "created": now, "change": change}
                marks = ", ".join(f":{one}" for one in row)
                db.execute(
                    f"INSERT INTO jobs ({', '.join(row)}, state) VALUES ({marks}, 'waiting')"
                    " ON CONFLICT DO NOTHING",
                    row,
                )
                same = (
                    "SELECT * FROM jobs WHERE batch = :batch AND owner = :owner AND id = :id AND key = :key"
                )
                names.append(Job.from_row(db.execute(same, value).fetchone()))
        return names

    def get(self, name: str, owner: str | None = None) -> Job | None:
        """Return a job by its name; with an owner, None for a job of another."""
        with self._store.reading() as db:
            row = db.execute("SELECT * FROM jobs WHERE name = ?", (name,)).fetchone()
        job = None if row is None else Job.from_row(row)
        return None if job is None or (owner is not None and job.item.owner != owner) else job

    def jobs(
        self,
        *,
        batch: str | None = None,
        owner: str | None = None,
        states: Sequence[str] = (),
        text: str = "",
        limit: int = 200,
        offset: int = 0,
        newest_first: bool = True,
    ) -> list[Job]:
        """List jobs; `text` is looked for in what was asked and in ids, in any case of letters."""
        where, values = _where(batch=batch, owner=owner, states=states)
        if text:
            where += " AND (instr(lower(request), lower(?)) OR instr(lower(id), lower(?)))"
            values += [json.dumps(text)[1:-1], text]
        order = "DESC" if newest_first else "ASC"
        query = f"SELECT * FROM jobs WHERE {where} ORDER BY number {order} LIMIT ? OFFSET ?"
        with self._store.reading() as db:
            return [Job.from_row(row) for row in db.execute(query, [*values, limit, offset])]

    def counts(self, *, batch: str | None = None, owner: str | None = None) -> dict[str, int]:
        """Return how many jobs are in each state."""
        where, values = _where(batch=batch, owner=owner)
        query = f"SELECT state, count(*) AS n FROM jobs WHERE {where} GROUP BY state"
        with self._store.reading() as db:
            found = {row["state"]: row["n"] for row in db.execute(query, values)}
        return {state: found.get(state, 0) for state in STATES}

    def lease(
        self, worker: str, *, prefers: str = "", seconds: float = 30.0, batch: str | None = None
    ) -> Job | None:
        """Give the next waiting job to a worker for some seconds; None if there is none.

        Higher priority goes first, then jobs for the model that the worker has loaded, then the oldest.
        """
        self.expire()
        where, values = _where(batch=batch, states=("waiting",))
        query = f"SELECT name FROM jobs WHERE {where} ORDER BY priority DESC, model = ? DESC, number LIMIT 1"
        with self._store.reading() as db:  # looking at an empty queue takes no lock
            if db.execute(query, [*values, prefers]).fetchone() is None:
                return None
        with self._store.writing(
            durable=False
        ) as db:  # a lease that a loss of power undoes is a job that waits
            found = db.execute(query, [*values, prefers]).fetchone()
            if found is None:
                return None
            now = self.clock()
            row = db.execute(
                "UPDATE jobs SET state = 'running', tries = tries + 1, worker = ?, lease = ?, deadline = ?, started = ?,"
                " ended = 0, phase = 'load', progress = '{}', change = ? WHERE name = ? RETURNING *",
                (worker, secrets.token_hex(8), now + seconds, now, _next_change(db), found["name"]),
            ).fetchall()[0]
            return Job.from_row(row)

    def beat(self, job: Job, progress: dict[str, Any] | None = None, *, seconds: float = 30.0) -> bool:
        """Say that a worker is alive, and where it stands; False if the job is cancelled or lost: stop within this step."""
        with self._store.writing(durable=False) as db:
            values: dict[str, Any] = {"deadline": self.clock() + seconds}
            if progress is not None:
                values |= {"progress": _json(progress), "change": _next_change(db)}
                values |= {"phase": str(progress["phase"])} if "phase" in progress else {}
            return _update(db, job, values)

    def target(self, job: Job, candidates: Iterable[Path]) -> Path | None:
        """Choose the file of a job, once: the first candidate that neither lies there nor is another job's; None if lost.

        The choice is kept, so a job that is made again replaces its own file and never adds another.
        """
        with self._store.writing(durable=False) as db:  # `done` makes it last, before anything gets that name
            held = db.execute(
                "SELECT target FROM jobs WHERE name = ? AND lease = ?", (job.name, job.lease)
            ).fetchone()
            if held is None:
                return None
            if held["target"]:
                return Path(held["target"])
            for path in candidates:
                taken = db.execute("SELECT 1 FROM jobs WHERE target = ?", (str(path),)).fetchone()
                if taken is None and not path.exists() and not path.with_suffix(".json").exists():
                    return path if _update(db, job, {"target": str(path)}) else None
        raise RequestError(
            "output", job.item.output, "a file that is not there yet: nothing of others is replaced"
        )

    def done(
        self,
        job: Job,
        files: Sequence[Path],
        report: dict[str, Any],
        *,
        staged: Mapping[Path, Path] | None = None,
    ) -> bool:
        """Finish a job; False if it was cancelled or lost, and then nothing is published.

        Args:
            files: the pictures, under their final names.
            staged: files that lie under other names on the same disk, synchronised, and their final names: they are renamed, and
                their folders synchronised, while the lease is known to be held.
        """
        staged = staged or {}
        behind = {final: draft for draft, final in staged.items()}
        hashes = [file_digest(behind.get(path, path)) for path in files]
        made = {"files": _json([str(one) for one in files]), "hashes": _json(hashes), "report": _json(report)}
        if staged:
            with self._store.writing() as db:  # lasts before a name appears: else a file might lie there that is nobody's
                if not _update(db, job, made):
                    return False
        with self._store.writing(durable=not staged) as db:  # if a loss of power undoes this one, `expire` does it again
            values = {"state": "done", "ended": self.clock(), "phase": "", "error": "", "deadline": 0.0}
            if not _update(db, job, made | values | {"change": _next_change(db)}):
                return False
            publish(staged)
        return True

    def failed(self, job: Job, error: str, *, again: bool = True) -> str:
        """Tell of a failure; return the new state: waiting, or poisoned after the last try; failed where `again` is False."""
        with self._store.writing(durable=False) as db:  # at worst it is tried once more
            row = db.execute("SELECT state, tries, lease FROM jobs WHERE name = ?", (job.name,)).fetchone()
            if row is None or row["state"] != "running" or row["lease"] != job.lease:
                return "" if row is None else str(row["state"])
            state = "failed" if not again else "poisoned" if row["tries"] >= self.tries else "waiting"
            ended = 0.0 if state == "waiting" else self.clock()
            values = {"state": state, "error": error, "phase": "", "ended": ended, "deadline": 0.0,
                      "change": _next_change(db)}  # fmt: skip
            _update(db, job, values)
        return state

    def give_back(self, job: Job) -> None:
        """Return a job to the queue as if it had not been begun: its worker was asked to stop."""
        with self._store.writing(durable=False) as db:  # at worst its lease runs out
            values = {"state": "waiting", "phase": "", "progress": "{}", "worker": "", "deadline": 0.0, "started": 0.0,
                      "tries": max(0, job.tries - 1), "change": _next_change(db)}  # fmt: skip
            _update(db, job, values)

    def cancel(self, *, name: str | None = None, batch: str | None = None, owner: str | None = None) -> int:
        """Cancel what waits or runs, and return how many; a running worker hears of it at its next step.

        Raises:
            ValueError: neither name, batch nor owner.
        """
        if name is None and batch is None and owner is None:
            raise ValueError("cancel needs a name, a batch or an owner; got none")
        where, values = _where(name=name, batch=batch, owner=owner, states=("waiting", "running"))
        return self._set(
            where, values, {"state": "cancelled", "phase": "", "deadline": 0.0, "ended": self.clock()}
        )

    def retry(
        self,
        *,
        name: str | None = None,
        batch: str | None = None,
        states: Sequence[str] = ("failed", "poisoned", "cancelled"),
    ) -> int:
        """Put ended jobs back in the queue with fresh tries, and return how many. Raises: ValueError, as `cancel`."""
        if name is None and batch is None:
            raise ValueError("retry needs a name or a batch; got none")
        where, values = _where(name=name, batch=batch, states=states)
        fresh = {
            "state": "waiting",
            "tries": 0,
            "error": "",
            "phase": "",
            "progress": "{}",
            "ended": 0.0,
            "started": 0.0,
        }
        return self._set(f"{where} AND state != 'running'", values, fresh)

    def move(self, name: str, priority: int) -> None:
        """Give a job another place in the queue: higher priorities go first."""
        self._set("name = ?", [name], {"priority": priority})

    def expire(self) -> int:
        """Take back the leases that are past their deadline: such jobs wait again, or are poisoned after the last try.

        A job whose worker ended after all its files had their names is done: they hold the bytes that it had written down.
        """
        late, now = "state = 'running' AND deadline < ?", self.clock()
        with self._store.reading() as db:
            rows = db.execute(f"SELECT name, folder, files, hashes FROM jobs WHERE {late}", (now,)).fetchall()
        if not rows:
            return 0
        for row in rows:
            files = json.loads(row["files"])
            if files and not _wrong(files, json.loads(row["hashes"])):
                sync_names(map(Path, files))  # their worker may have ended before it did
                whole = {"state": "done", "phase": "", "error": "", "deadline": 0.0, "lease": "", "ended": now}
                if self._set(f"name = ? AND {late}", [row["name"], now], whole):
                    clear(Path(row["folder"]), row["name"])
        words = f"its worker ended in the middle of it {self.tries} times"
        ended = {"phase": "", "lease": "", "deadline": 0.0}
        spent = self._set(
            f"{late} AND tries >= {self.tries:d}",
            [now],
            ended | {"state": "poisoned", "error": words, "ended": now},
        )
        again = {"state": "waiting", "error": "its worker ended in the middle of it", "progress": "{}"}
        return spent + self._set(late, [now], ended | again)

    def lost(self, worker: str) -> int:
        """Take back what a worker holds that is known to have died: as if its leases had run out."""
        return self._set("worker = ? AND state = 'running'", [worker], {"deadline": 0.0}) and self.expire()

    def verify(self, batch: str | None = None) -> list[str]:
        """Look at the files of finished jobs; those missing or changed are made again. Returns a sentence for each of them."""
        where, values = _where(batch=batch, states=("done",))
        query = f"SELECT name, id, files, hashes FROM jobs WHERE {where} ORDER BY number"
        with self._store.reading() as db:
            rows = db.execute(query, values).fetchall()
        told = []
        again = {"state": "waiting", "tries": 0, "files": "[]", "hashes": "[]", "report": "{}", "progress": "{}",
                 "started": 0.0, "ended": 0.0}  # fmt: skip
        for row in rows:
            wrong = _wrong(json.loads(row["files"]), json.loads(row["hashes"]))
            if wrong:
                changed = self._set("name = ? AND state = 'done'", [row["name"]], again)
                told += [f"{row['id']}: {wrong}; it will be made again"] if changed else []
        return told

    def changes(self, since: int, *, owner: str | None = None) -> tuple[int, list[Job]]:
        """Return the jobs that changed after `since`, oldest change first, and the number to ask with next time.

        0 asks for all there ever was; at most 1000 jobs (and those that changed together) come at once.
        """
        where, values = _where(owner=owner)
        with self._store.reading() as db:
            latest = int(db.execute("SELECT value FROM counter").fetchone()[0])
            query = f"SELECT change FROM jobs WHERE change > ? AND {where} ORDER BY change LIMIT 1 OFFSET {CHANGES - 1}"
            last = db.execute(query, [since, *values]).fetchone()
            latest = latest if last is None else int(last["change"])
            query = f"SELECT * FROM jobs WHERE change > ? AND change <= ? AND {where} ORDER BY change, number"
            return latest, [Job.from_row(row) for row in db.execute(query, [since, latest, *values])]

    def _set(self, where: str, values: Sequence[Any], fields: dict[str, Any]) -> int:
        with self._store.writing() as db:
            pairs = ", ".join(f"{name} = ?" for name in (*fields, "change"))
            query = f"UPDATE jobs SET {pairs} WHERE {where}"
            return db.execute(query, [*fields.values(), _next_change(db), *values]).rowcount


def default_ledger() -> Path:
    """Return where this person's ledger lies: the folder LEAPFROG_STATE, or the system's place for state."""
    given = os.environ.get("LEAPFROG_STATE")
    if given:
        return Path(given).expanduser() / "jobs.sqlite"
    home = Path.home()
    if sys.platform == "win32":
        state = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        state = home / "Library" / "Application Support"
    else:
        state = Path(os.environ.get("XDG_STATE_HOME") or home / ".local" / "state")
    return state / "leapfrog" / "jobs.sqlite"


def _values(item: Item, known: dict[str, str]) -> dict[str, Any]:
    """Return the columns of an item; `known` remembers the digests of models from one item to the next."""
    key = item.ready or content_key(item.request, digests_of(item.request, known))
    return {
        "batch": item.batch, "owner": item.owner, "id": item.id or key, "key": key, "kind": item.kind,
        "model": str(item.request.get("model") or default_model()), "request": _json(item.request), "folder": item.folder,
        "output": item.output, "tags": _json(item.tags), "priority": item.priority,
    }  # fmt: skip


def _where(*, states: Sequence[str] = (), **fields: str | None) -> tuple[str, list[Any]]:
    given = {name: value for name, value in fields.items() if value is not None}
    parts = [f"{name} = ?" for name in given]
    if states:
        parts.append(f"state IN ({', '.join('?' * len(states))})")
    return " AND ".join(parts) or "1", [*given.values(), *states]


def _next_change(db: sqlite3.Connection) -> int:
    return int(db.execute("UPDATE counter SET value = value + 1 RETURNING value").fetchall()[0][0])


def _update(db: sqlite3.Connection, job: Job, fields: dict[str, Any]) -> bool:
    """Change a running job for who holds its lease; False for anyone else."""
    pairs = ", ".join(f"{name} = ?" for name in fields)
    query = f"UPDATE jobs SET {pairs} WHERE name = ? AND lease = ? AND state = 'running'"
    return db.execute(query, [*fields.values(), job.name, job.lease]).rowcount == 1


def _wrong(files: list[str], hashes: list[str]) -> str:
    for file, digest in zip(files, hashes, strict=True):
        try:
            if file_digest(Path(file)) != digest:
                return f"{Path(file).name} holds other bytes"
        except OSError:
            return f"{Path(file).name} is missing"
    return ""


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, default=str)
