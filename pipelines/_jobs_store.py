"""The file of the job ledger: one SQLite database, opened, checked and written in whole transactions.

Differs: full synchronisation only where a loss of power would cost somebody something: what was asked for, and what is about to
appear under which name. Leases, heartbeats and what follows from the files may be lost without harm. A file that is damaged, made
by another program or of another version is refused in words and never altered.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

APPLICATION = 0x4C466A6F
"""What SQLite's header says of a file of ours."""
VERSION = 1
"""Version of the tables."""
PATIENCE = 30.0
"""How long a transaction waits for others, in s."""

_TABLES = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    batch TEXT NOT NULL, owner TEXT NOT NULL, id TEXT NOT NULL, key TEXT NOT NULL,
    kind TEXT NOT NULL, model TEXT NOT NULL, request TEXT NOT NULL,
    folder TEXT NOT NULL, output TEXT NOT NULL, tags TEXT NOT NULL, priority INTEGER NOT NULL,
    state TEXT NOT NULL, tries INTEGER NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT '',
    phase TEXT NOT NULL DEFAULT '', progress TEXT NOT NULL DEFAULT '{}',
    target TEXT NOT NULL DEFAULT '', files TEXT NOT NULL DEFAULT '[]', hashes TEXT NOT NULL DEFAULT '[]',
    report TEXT NOT NULL DEFAULT '{}',
    created REAL NOT NULL, started REAL NOT NULL DEFAULT 0, ended REAL NOT NULL DEFAULT 0,
    worker TEXT NOT NULL DEFAULT '', lease TEXT NOT NULL DEFAULT '', deadline REAL NOT NULL DEFAULT 0,
    change INTEGER NOT NULL,
    UNIQUE (batch, owner, id, key)
);
CREATE INDEX jobs_by_state ON jobs (state, priority DESC, number);
CREATE INDEX jobs_by_change ON jobs (change);
CREATE INDEX jobs_by_target ON jobs (target);
CREATE TABLE counter (value INTEGER NOT NULL);
INSERT INTO counter VALUES (0);
"""


class LedgerError(RuntimeError):
    """A ledger that cannot be used, in one sentence. `full` tells whether the disk was full."""

    def __init__(self, path: Path, words: str, *, full: bool = False) -> None:
        super().__init__(f"the job ledger {path} {words}")
        self.path, self.full = path, full


class Store:
    """One connection to the ledger's file, shared by the threads of a process.

    Raises:
        LedgerError: damaged, of another program or version, or a place that cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock, self._process = path, threading.RLock(), os.getpid()
        self._connection: sqlite3.Connection | None = self._opened()

    @contextlib.contextmanager
    def writing(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Hold the only right to write; what was written is kept whole if the block ends well, and forgotten if it raises.

        Args:
            durable: whether it must outlive a loss of power; otherwise it is only safe from the death of processes.
        """
        with self._lock, self._told():
            connection = self._connected()
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.rollback()
                raise
            try:
                connection.commit()
            except sqlite3.Error:
                with contextlib.suppress(sqlite3.Error):
                    connection.rollback()
                raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Read what was committed last, without waiting for writers."""
        with self._lock, self._told():
            yield self._connected()

    def close(self) -> None:
        """Close the connection; the next use opens it again."""
        with self._lock:
            if self._connection is not None and self._process == os.getpid():
                self._connection.close()
            self._connection = None

    def _connected(self) -> sqlite3.Connection:
        # SQLite must not be carried into a forked process
        if self._connection is None or self._process != os.getpid():
            self._process = os.getpid()
            self._connection = self._opened()
        return self._connection

    def _opened(self) -> sqlite3.Connection:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # prompts are private: nobody else on this computer reads them
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            words = f"cannot be written ({error.strerror}); give another place by LEAPFROG_STATE"
            raise LedgerError(self.path, words, full=error.errno in (errno.ENOSPC, errno.EDQUOT)) from error
        with self._told():
            connection = sqlite3.connect(
                self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False
            )
            try:
                connection.row_factory = sqlite3.Row
                self._check(connection)
            except BaseException:
                connection.close()
                raise
        return connection

    def _check(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")  # two processes may meet at an empty file
        try:
            self._check_kind(connection)
        finally:
            connection.execute("COMMIT")
        if self._write_ahead(connection) != "wal":
            raise LedgerError(self.path, "lies on a disk without shared memory; put it on a local disk")
        connection.execute("PRAGMA synchronous = FULL")

    def _write_ahead(self, connection: sqlite3.Connection) -> str:
        """Ask for a write-ahead log, and return the mode that the file then has."""
        last = time.monotonic() + PATIENCE
        while True:
            try:
                return str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
            except sqlite3.OperationalError as error:
                # SQLite itself does not wait here: of several that open a new file, one changes its mode and others are told so
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > last:
                    raise
                time.sleep(0.005)

    def _check_kind(self, connection: sqlite3.Connection) -> None:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not tables and not application:
            for statement in _TABLES.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
            return
        if application != APPLICATION:
            raise LedgerError(
                self.path, "belongs to another program; move that file away, or give another place"
            )
        if version != VERSION:
            words = f"has tables of version {version}, and this leapfrog reads version {VERSION}"
            raise LedgerError(
                self.path, f"{words}; {'update leapfrog' if version > VERSION else 'move it away'}"
            )

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn SQLite's errors into sentences."""
        try:
            yield
        except sqlite3.OperationalError as error:
            text = str(error)
            full = "full" in text or "disk I/O error" in text
            words = (
                "could not be written: the disk is full, or fails" if full else f"could not be used ({text})"
            )
            raise LedgerError(self.path, words, full=full) from error
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
                raise
            words = f"is damaged or no ledger ({error}); move it away, finished pictures are not touched"
            raise LedgerError(self.path, words) from error
