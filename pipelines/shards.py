"""Finished pictures gathered into shards: WebDataset tar files or Parquet tables, each whole or not there.

A shard is written under another name, synchronised, renamed, and noted in `shards.sqlite`; only then its members count as packed
and their single files go. Whoever is killed on the way leaves single files and at most a draft: the next one packs them again.

Differs: the unit of work stays one picture. A killed run never makes a picture again because its shard was not full yet, as
writers that stream straight into shards must.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import sqlite3
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pipelines.metadata import told_of
from pipelines.request import Request, RequestError
from pipelines.result import SaveError, sync_folder

if TYPE_CHECKING:
    from pipelines.jobs import Job, Ledger

FORMS = ("files", "webdataset", "parquet")
"""How a batch leaves its pictures."""
MEMBERS = 1000
"""Members of a full shard, unless told otherwise."""
MOST_MEMBERS = 100_000
GROUP = 32
"""Rows that a Parquet table is written by, which bounds the memory."""

_ENDINGS = {"webdataset": "tar", "parquet": "parquet"}
_TABLES = (
    "CREATE TABLE IF NOT EXISTS shards (number INTEGER PRIMARY KEY, name TEXT NOT NULL, sha256 TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS members (job TEXT PRIMARY KEY, shard INTEGER NOT NULL, member TEXT NOT NULL)",
)


class Shards:
    """The shards of a batch in its output folder.

    Args:
        state: folder of the file that tells which shards are whole.
        members: how many a full shard has.

    Raises:
        RequestError: an unknown form, or pyarrow is missing.
    """

    def __init__(
        self, output: Path, state: Path, form: str, ledger: Ledger, batch: str, members: int = MEMBERS
    ) -> None:
        if form not in _ENDINGS:
            raise RequestError("format", form, f"one of {', '.join(FORMS)}")
        check_form(form)
        self.output, self.form, self.members = output, form, members
        self._ledger, self._batch = ledger, batch
        self._seen = 0
        self._ready: dict[int, str] = {}
        self._db = sqlite3.connect(state / "shards.sqlite", timeout=600, isolation_level=None)
        for statement in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", *_TABLES):
            self._db.execute(statement)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def packed(self) -> dict[str, str]:
        """Return the shard of every packed job, by the job's name."""
        query = "SELECT job, name FROM members JOIN shards ON number = shard"
        return dict(self._db.execute(query))

    def count(self) -> int:
        """Return how many jobs are packed."""
        return int(self._db.execute("SELECT count(*) FROM members").fetchone()[0])

    def names(self) -> list[str]:
        """Return the file names of the shards that are whole."""
        return [row[0] for row in self._db.execute("SELECT name FROM shards ORDER BY number")]

    def pack(self, *, rest: bool = False) -> int:
        """Write the shards that can be filled, and return how many jobs went into them.

        Args:
            rest: also a last one that is not full.

        Raises:
            SaveError: no room, or the folder cannot be written; nothing torn is left.
        """
        self._look()
        total = 0
        while len(self._ready) >= self.members or (rest and self._ready):
            with self._alone() as mine:
                if not mine:  # another run packs; what it takes will be told by its notes
                    break
                self._forget_packed()
                chosen = sorted(self._ready)[: self.members]
                if not chosen or (len(chosen) < self.members and not rest):
                    break
                jobs = [job for number in chosen if (job := self._sound(self._ready.pop(number))) is not None]
                if jobs:
                    self._write(jobs)
                total += len(jobs)
            for job in jobs:
                _remove(job)
        return total

    def tidy(self) -> None:
        """Remove what a killed run left: drafts of shards, and single files of members that are packed."""
        with self._alone() as mine:
            if not mine:
                return
            for draft in self.output.glob(".shard-*.part"):
                draft.unlink(missing_ok=True)
            for (name,) in self._db.execute("SELECT job FROM members").fetchall():
                job = self._ledger.get(name)
                if job is not None and job.state == "done":
                    _remove(job)

    def verify(self) -> list[str]:
        """Look at every shard and at what is not packed yet; what is missing or changed is made again. Returns sentences."""
        from pipelines.jobs import file_digest

        told = []
        for number, name, digest in self._db.execute("SELECT number, name, sha256 FROM shards").fetchall():
            path = self.output / name
            try:
                wrong = "" if file_digest(path) == digest else "holds other bytes"
            except OSError:
                wrong = "is missing"
            if not wrong:
                continue
            members = [
                row[0] for row in self._db.execute("SELECT job FROM members WHERE shard = ?", (number,))
            ]
            told.append(f"{name} {wrong}; its {len(members)} members will be made again")
            with self._alone(wait=True):
                self._db.execute("DELETE FROM members WHERE shard = ?", (number,))
                self._db.execute("DELETE FROM shards WHERE number = ?", (number,))
                if path.exists():  # the number may be used again: what is left of it steps aside
                    path.rename(path.with_name(f"damaged-{secrets.token_hex(3)}-{name}"))
            for member in members:
                self._ledger.retry(name=member, states=("done",))
        self._look()
        with self._alone(wait=True):  # nobody else packs, so a file that is gone is lost
            self._forget_packed()
            for number, name in list(self._ready.items()):
                if self._sound(name) is None:
                    told.append(
                        f"a finished file of {self._called(name)} is missing or changed; it will be made again"
                    )
                    del self._ready[number]
        return told

    def _called(self, name: str) -> str:
        job = self._ledger.get(name)
        return name if job is None else job.item.id

    def _look(self) -> None:
        """Hear from the ledger what was finished since the last look."""
        while True:
            latest, jobs = self._ledger.changes(self._seen)
            for job in jobs:
                if job.item.batch == self._batch:
                    if job.state == "done":
                        self._ready[job.number] = job.name
                    else:
                        self._ready.pop(job.number, None)
            if latest == self._seen or not jobs:
                break
            self._seen = latest

    def _forget_packed(self) -> None:
        packed = {row[0] for row in self._db.execute("SELECT job FROM members")}
        self._ready = {number: name for number, name in self._ready.items() if name not in packed}

    def _sound(self, name: str) -> Job | None:
        """Return a finished job whose files are as they were written; another one is put back in the queue."""
        from pipelines.jobs import file_digest

        job = self._ledger.get(name)
        if job is None or job.state != "done":
            return None
        try:
            if job.files and [file_digest(Path(file)) for file in job.files] == job.sha256:
                return job
        except OSError:
            pass
        self._ledger.retry(name=name, states=("done",))
        return None

    def _write(self, jobs: Sequence[Job]) -> None:
        """Write one shard and note it; the right to write is held."""
        from pipelines.jobs import file_digest

        last = self._db.execute("SELECT max(number) FROM shards").fetchone()[0]
        number = 0 if last is None else int(last) + 1
        path = self.output / f"shard-{number:06d}.{_ENDINGS[self.form]}"
        draft = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
        try:
            try:
                with draft.open("xb") as file:
                    (_write_tar if self.form == "webdataset" else _write_parquet)(file, jobs)
                    file.flush()
                    os.fsync(file.fileno())
                digest = file_digest(draft)
                os.replace(draft, path)
            finally:
                draft.unlink(missing_ok=True)
            sync_folder(path.parent)
        except OSError as error:
            raise SaveError(path, error) from error
        self._db.execute("INSERT INTO shards VALUES (?, ?, ?)", (number, path.name, digest))
        rows = [(job.name, number, member_key(job)) for job in jobs]
        self._db.executemany("INSERT INTO members VALUES (?, ?, ?)", rows)

    @contextlib.contextmanager
    def _alone(self, *, wait: bool = False) -> Iterator[bool]:
        """Hold the only right to write shards; yields False where another has it (with `wait` it waits)."""
        self._db.execute(f"PRAGMA busy_timeout = {600_000 if wait else 1000}")
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            if wait:
                raise
            yield False
            return
        try:
            yield True
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def check_form(form: str) -> None:
    """Check that a form of output can be written here. Raises: RequestError."""
    if form not in FORMS:
        raise RequestError("format", form, f"one of {', '.join(FORMS)}")
    if form == "parquet":
        try:
            import pyarrow  # noqa: F401, ICN001 - only looked for
        except ImportError:
            allowed = (
                "files or webdataset, where pyarrow is not installed (pip install leapfrog-dit[parquet])"
            )
            raise RequestError("format", form, allowed) from None


def member_key(job: Job) -> str:
    """Return the name of a member: its id, without dots, which readers of WebDataset take for the ending."""
    name = job.item.id.removeprefix("sha256:")
    plain = name.replace(".", "_")
    return plain if plain == name else f"{plain}-{job.key.removeprefix('sha256:')[:8]}"


def _about(job: Job) -> dict[str, Any]:
    """Return what a shard tells of a job: it is made to be given away, so no path of this computer."""
    request, report = told_of(Request.from_dict(job.item.request), job.report)
    return {"id": job.item.id, "key": job.key, "tags": job.item.tags, "request": request, "report": report}


def _write_tar(file: IO[bytes], jobs: Sequence[Job]) -> None:
    """Write key.png and key.json for every job, one after the other; the same jobs give the same bytes."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for job in jobs:
            key = member_key(job)
            for place, name in enumerate(job.files):
                path = Path(name)
                middle = f".{place}" if place else ""
                _add(tar, f"{key}{middle}{path.suffix.lower()}", path.read_bytes())
            _add(tar, f"{key}.json", json.dumps(_about(job), sort_keys=True).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(data)
    about.mode = 0o644
    tar.addfile(about, io.BytesIO(data))


def _write_parquet(file: IO[bytes], jobs: Sequence[Job]) -> None:
    """Write a row for every job: names, texts, and the first file's bytes under `media`."""
    import pyarrow as pa
    from pyarrow import parquet

    text = pa.string()
    media = pa.struct([("bytes", pa.large_binary()), ("path", text)])
    names = ("id", "key", "prompt", "request", "report", "tags")
    schema = pa.schema([*((name, text) for name in names), ("seed", pa.int64()), ("media", media)])
    with parquet.ParquetWriter(file, schema) as writer:
        for start in range(0, len(jobs), GROUP):
            rows = [_row(job) for job in jobs[start : start + GROUP]]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _row(job: Job) -> dict[str, Any]:
    about, path = _about(job), Path(job.files[0])
    told = {name: json.dumps(about[name], sort_keys=True) for name in ("request", "report", "tags")}
    return {
        "id": job.item.id, "key": job.key, "prompt": about["request"].get("prompt", ""), **told,
        "seed": job.item.request.get("seed", 0),
        "media": {"bytes": path.read_bytes(), "path": f"{member_key(job)}{path.suffix.lower()}"},
    }  # fmt: skip


def _remove(job: Job) -> None:
    """Remove the single files of a packed job, and the JSON beside them."""
    for name in job.files:
        for path in (Path(name), Path(name).with_suffix(".json")):
            with contextlib.suppress(OSError):
                path.unlink()
