"""The table of jobs: SQLite in the folder of the jobs."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from pathlib import Path
from typing import Any, Protocol

from svd_trt.errors import LockedError, OutputError

__all__ = ["Database", "Rows", "cannot_keep"]

_OF_THE_DISK = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
_SCHEMA = 1
_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    model TEXT NOT NULL,
    status TEXT NOT NULL,
    created_at REAL NOT NULL,
    started_at REAL,
    completed_at REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    streamed INTEGER NOT NULL,
    given TEXT NOT NULL,
    arguments TEXT NOT NULL,
    warnings TEXT NOT NULL,
    metadata TEXT,
    error TEXT
);
CREATE INDEX IF NOT EXISTS jobs_by_status ON jobs (status, model, number);
"""


class Rows(Protocol):
    """Where the table is: in this process, or in another one that is asked."""

    def execute(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        """Run one statement of SQL as a transaction of its own; return its rows by the names of their columns."""

    def close(self) -> None:
        """Use the table no more. Closing twice is harmless."""


class Database:
    """The table of one folder, which one process at a time may use. Every method may be called from any thread.

    Raises:
        OutputError: the folder cannot be written, or is of a newer svd-trt.
        LockedError: another server uses it.
    """

    def __init__(self, folder: Path) -> None:
        self._lock = threading.RLock()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._held: int | None = _hold(folder)
            self._rows = sqlite3.connect(folder / "jobs.sqlite3", check_same_thread=False, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise _refused(folder, error) from error
        try:
            self._prepare()
        except sqlite3.Error as error:
            self.close()
            advice = f"move {folder} away, or choose another"
            if isinstance(error, sqlite3.OperationalError):  # the others are of a file that is no table of jobs
                advice = "free some space, or choose another folder"
            raise OutputError(f"cannot keep jobs in {folder}: {error}; {advice}") from error

    def _prepare(self) -> None:
        self._rows.row_factory = sqlite3.Row
        version = self._rows.execute("PRAGMA user_version").fetchone()[0]
        if version > _SCHEMA:
            raise sqlite3.DatabaseError("its jobs are of a newer svd-trt")
        self._rows.execute("PRAGMA journal_mode = WAL")
        self._rows.execute("PRAGMA synchronous = FULL")  # a job that was accepted survives a power cut, too
        self._rows.executescript(_TABLE)
        self._rows.execute(f"PRAGMA user_version = {_SCHEMA}")

    def execute(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        """Run one statement.

        Raises:
            OutputError: the disk is full or damaged.
        """
        try:
            with self._lock:
                return [dict(row) for row in self._rows.execute(statement, values).fetchall()]
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in _OF_THE_DISK:
                raise
            raise cannot_keep(error) from error

    @property
    def changes(self) -> int:
        """Rises with every row that is written."""
        with self._lock:
            return self._rows.total_changes

    def close(self) -> None:
        """Leave the folder to others."""
        with self._lock:
            self._rows.close()
            if self._held is not None:
                os.close(self._held)
                self._held = None


def cannot_keep(error: Exception) -> OutputError:
    """Why a running server cannot keep jobs, in words for its clients."""
    reason = getattr(error, "strerror", None) or error
    return OutputError(f"the server cannot keep jobs: {reason}; its operator must make room or mend the disk")


def _refused(folder: Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or error
    return OutputError(f"cannot keep jobs in {folder}: {reason}; choose a folder that you may write to")


def _hold(folder: Path) -> int:
    """Lock ``folder`` until the process ends, however it ends.

    Raises:
        LockedError: another process holds it.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise LockedError(f"another server keeps its jobs in {folder}; choose another folder with --data") from None
    return descriptor
