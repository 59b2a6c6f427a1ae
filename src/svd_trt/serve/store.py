"""Jobs on disk: a table in SQLite, a picture for each that waits, and the files of those that are finished.

A job is accepted once its row is committed, and its picture is complete before that. A finished video has its final
name before the row says so. So after a crash each job either waits, or is finished, or is begun again.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from svd_trt.engine.temporary_files import create_file, remove_leftovers
from svd_trt.errors import LockedError, OutputError
from svd_trt.serve.refusals import error_object

__all__ = ["ENDED", "SUFFIXES", "Job", "Status", "Store"]

Status: TypeAlias = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
SUFFIXES = (".mkv", ".mp4", ".webm", ".webp")
"""Of the files that a video may have."""

ENDED: Collection[str] = ("completed", "failed", "cancelled")

_ATTEMPTS = 5  # a job at which the server ended so often would end it again
_MOST_ROWS = 10_000  # of jobs that have ended
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


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One row.

    Attributes:
        number: rises with every job that is accepted.
        id: what clients call it; it cannot be guessed.
        streamed: its client waits for the frames, and nobody would fetch the video later.
        attempts: how often it was begun.
        given: keyword arguments for the pipeline, the seed included.
        arguments: everything decided, as clients are told.
        error: an error object, if it failed or was cancelled.
        metadata: what its video's file says; known once it is completed.
        created_at: and the other times: seconds since 1970.
    """

    number: int
    id: str
    model: str
    status: Status
    created_at: float
    started_at: float | None = None
    completed_at: float | None = None
    attempts: int = 0
    streamed: bool = False
    given: dict[str, Any]
    arguments: dict[str, Any]
    warnings: list[str]
    metadata: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


def _new_id() -> str:
    """An id with 128 random bits."""
    return f"vid_{secrets.token_hex(16)}"


class Store:
    """The jobs of one folder, which one process at a time may use. Every method may be called from any thread.

    Raises:
        OutputError: the folder cannot be written, or is of a newer svd-trt.
        LockedError: another server uses it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        try:
            for each in (folder, folder / "pictures", folder / "videos"):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._held: int | None = _hold(folder)
            self._rows = sqlite3.connect(folder / "jobs.sqlite3", check_same_thread=False, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(
                f"cannot keep jobs in {folder}: {reason}; choose a folder that you may write to"
            ) from error
        try:
            self._prepare()
        except sqlite3.Error as error:
            self.close()
            raise OutputError(
                f"cannot keep jobs in {folder}: {error}; move {folder} away, or choose another"
            ) from error

    def _prepare(self) -> None:
        self._rows.row_factory = sqlite3.Row
        version = self._rows.execute("PRAGMA user_version").fetchone()[0]
        if version > _SCHEMA:
            raise sqlite3.DatabaseError("its jobs are of a newer svd-trt")
        self._rows.execute("PRAGMA journal_mode = WAL")
        self._rows.execute("PRAGMA synchronous = FULL")  # a job that was accepted survives a power cut, too
        self._rows.executescript(_TABLE)
        self._rows.execute(f"PRAGMA user_version = {_SCHEMA}")

    def close(self) -> None:
        """Leave the folder to others. Closing twice is harmless."""
        with self._lock:
            self._rows.close()
            if self._held is not None:
                os.close(self._held)
                self._held = None

    # Files. Their names are made of ids, and ids come from the table alone.

    def picture(self, job: Job) -> Path:
        """The picture as it was uploaded."""
        return self.folder / "pictures" / job.id

    def video(self, job: Job, suffix: str) -> Path:
        """The video in one format, which may not exist yet; ``suffix`` is such as ``.mp4``."""
        return self.folder / "videos" / f"{job.id}{suffix}"

    # Jobs.

    def add(
        self,
        *,
        model: str,
        picture: bytes,
        given: Mapping[str, Any],
        arguments: Mapping[str, Any],
        warnings: Sequence[str],
        streamed: bool,
        most: int,
    ) -> Job | None:
        """Accept a job; None if ``most`` jobs wait already."""
        job_id = _new_id()
        target = self.folder / "pictures" / job_id
        _write_whole(target, picture)
        with self._lock:
            row = self._rows.execute(
                "INSERT INTO jobs (id, model, status, created_at, streamed, given, arguments, warnings) "
                "SELECT ?, ?, 'queued', ?, ?, ?, ?, ? "
                "WHERE (SELECT count(*) FROM jobs WHERE status = 'queued') < ? RETURNING *",
                (job_id, model, time.time(), streamed, _text(given), _text(arguments), _text(list(warnings)), most),
            ).fetchall()
        if not row:
            target.unlink(missing_ok=True)
            return None
        return _job(row[0])

    def get(self, job_id: str) -> Job | None:
        """The job of an id."""
        found = self._all("SELECT * FROM jobs WHERE id = ?", job_id)
        return found[0] if found else None

    def newest(self, limit: int, after: str | None = None) -> list[Job]:
        """Up to ``limit`` jobs, the newest first, of those that are older than ``after``."""
        older = "WHERE number < (SELECT number FROM jobs WHERE id = ?)" if after is not None else ""
        arguments = (limit,) if after is None else (after, limit)
        return self._all(f"SELECT * FROM jobs {older} ORDER BY number DESC LIMIT ?", *arguments)  # noqa: S608

    def ahead(self, job: Job) -> int:
        """How many jobs of its model are made or begun before ``job``."""
        return self._count("model = ? AND status IN ('queued', 'in_progress') AND number < ?", job.model, job.number)

    def waiting(self, model: str | None = None) -> int:
        """How many jobs wait, of one model or of all."""
        return self._count("status = 'queued'" + ("" if model is None else " AND model = ?"), *filter(None, [model]))

    def claim(self, model: str) -> Job | None:
        """Begin the job of ``model`` that waits longest."""
        found = self._all(
            "UPDATE jobs SET status = 'in_progress', started_at = ?, attempts = attempts + 1 WHERE number = "
            "(SELECT min(number) FROM jobs WHERE status = 'queued' AND model = ?) RETURNING *",
            time.time(),
            model,
        )
        return found[0] if found else None

    def claim_alike(self, job: Job, most: int) -> list[Job]:
        """Begin up to ``most`` jobs that wait, whose arguments are those of ``job`` but for the seed; the oldest first.

        Left out are streams, whose clients wait for the first frame, and jobs at which the server ended before.
        """
        found = self._all(
            "UPDATE jobs SET status = 'in_progress', started_at = ?, attempts = attempts + 1 WHERE number IN "
            "(SELECT number FROM jobs WHERE status = 'queued' AND model = ? AND attempts = 0 AND NOT streamed "
            "AND json_remove(arguments, '$.seed') = json_remove(?, '$.seed') ORDER BY number LIMIT ?) RETURNING *",
            time.time(),
            job.model,
            _text(job.arguments),
            most,
        )
        return sorted(found, key=lambda one: one.number)

    def complete(self, job: Job, metadata: Mapping[str, Any]) -> bool:
        """Say that the video of ``job`` is in place; False if the job was cancelled before that."""
        done = self._end(job, "completed", None, metadata)
        if not done:
            self._remove_files(job.id)
        return done

    def fail(self, job: Job, error: Mapping[str, Any], status: Status = "failed") -> bool:
        """End a job that has no video; False if it had ended before."""
        return self._end(job, status, error, None)

    def cancel(self, job: Job, reason: str) -> bool:
        """Cancel a job that waits or is made; False if it had ended before. A crash does not bring it back."""
        return self._end(job, "cancelled", error_object("cancelled", reason), None)

    def put_back(self, job: Job) -> None:
        """Let a job that was begun wait again, in its old place, because the server is ending."""
        self._all(
            "UPDATE jobs SET status = 'queued', started_at = NULL, attempts = attempts - 1 "
            "WHERE id = ? AND status = 'in_progress' RETURNING *",
            job.id,
        )

    def remove(self, job_id: str) -> None:
        """Forget a job that has ended, and its files."""
        with self._lock:
            self._rows.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
        self._remove_files(job_id)

    def recover(self, models: Collection[str]) -> None:
        """After a start: let what was begun wait again, and end what nobody will make, with the reason.

        Args:
            models: those that are served.
        """
        for job in self._all("SELECT * FROM jobs WHERE status IN ('queued', 'in_progress')"):
            if reason := _lost(job, models):
                self.fail(job, error_object("server_error", reason))
        with self._lock:
            self._rows.execute("UPDATE jobs SET status = 'queued', started_at = NULL WHERE status = 'in_progress'")
        self._remove_strangers()

    def expire(self, seconds: float | None, nbytes: int | None) -> int:
        """Remove what ended more than ``seconds`` ago, then the oldest videos until ``nbytes`` suffice.

        Returns how many jobs were removed.
        """
        with self._lock:
            ended = self._rows.execute(
                "SELECT id, completed_at FROM jobs WHERE status IN ('completed', 'failed', 'cancelled') "
                "ORDER BY number DESC"
            ).fetchall()
        sizes = self._sizes()
        kept, total, removed = 0, 0, 0
        for job_id, completed_at in ended:
            total += sizes.get(job_id, 0)
            old = seconds is not None and completed_at < time.time() - seconds
            if old or (nbytes is not None and total > nbytes) or kept >= _MOST_ROWS:
                self.remove(job_id)
                removed += 1
            else:
                kept += 1
        return removed

    def _sizes(self) -> dict[str, int]:
        """Bytes of all files of each video."""
        sizes: dict[str, int] = {}
        with os.scandir(self.folder / "videos") as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    name = entry.name.partition(".")[0]
                    sizes[name] = sizes.get(name, 0) + entry.stat().st_size
        return sizes

    def _end(
        self, job: Job, status: Status, error: Mapping[str, Any] | None, metadata: Mapping[str, Any] | None
    ) -> bool:
        ended = self._all(
            "UPDATE jobs SET status = ?, completed_at = ?, error = ?, metadata = ? "
            "WHERE id = ? AND status IN ('queued', 'in_progress') RETURNING *",
            status,
            time.time(),
            None if error is None else _text(error),
            None if metadata is None else _text(metadata),
            job.id,
        )
        if ended:
            self.picture(job).unlink(missing_ok=True)
        return bool(ended)

    def _remove_files(self, job_id: str) -> None:
        (self.folder / "pictures" / job_id).unlink(missing_ok=True)
        for suffix in SUFFIXES:
            (self.folder / "videos" / f"{job_id}{suffix}").unlink(missing_ok=True)

    def _remove_strangers(self) -> None:
        """Remove the files of jobs that are not in the table, or that no longer need them: a crash left them."""
        status = {job.id: job.status for job in self._all("SELECT * FROM jobs")}
        for path in (self.folder / "pictures").glob("vid_*"):
            if status.get(path.name) != "queued":
                path.unlink(missing_ok=True)
        for path in (self.folder / "videos").glob("vid_*"):
            if status.get(path.name.partition(".")[0]) != "completed":
                path.unlink(missing_ok=True)
        for folder in ("pictures", "videos"):
            remove_leftovers(self.folder / folder)

    def _all(self, statement: str, *values: Any) -> list[Job]:
        with self._lock:
            return [_job(row) for row in self._rows.execute(statement, values).fetchall()]

    def _count(self, condition: str, *values: Any) -> int:
        with self._lock:
            found = self._rows.execute(f"SELECT count(*) FROM jobs WHERE {condition}", values)  # noqa: S608
            return int(found.fetchone()[0])


def _lost(job: Job, models: Collection[str]) -> str | None:
    """Why a job that was accepted before the start cannot be made."""
    if job.streamed:
        return "the server ended while its client waited for this video; send it again"
    if job.model not in models:
        return f"the server no longer has a model {job.model!r}; send the picture again for one of {', '.join(models)}"
    if job.attempts >= _ATTEMPTS:
        return f"the server ended {job.attempts} times while it made this video; change its arguments or its picture"
    return None


def _job(row: sqlite3.Row) -> Job:
    fields = dict(row)
    for name in ("given", "arguments", "warnings", "metadata", "error"):
        fields[name] = None if fields[name] is None else msgspec.json.decode(fields[name])
    fields["streamed"] = bool(fields["streamed"])
    return Job(**fields)


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


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


def _write_whole(target: Path, content: bytes) -> None:
    """Write a file that is complete on disk when it has its name."""
    temporary, file = create_file(target, "")
    try:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        file.close()
