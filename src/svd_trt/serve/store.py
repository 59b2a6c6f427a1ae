"""Jobs on disk: a table in SQLite, a picture for each that waits, and the files of those that are finished.

A job is accepted once its row is committed, and its picture is complete before that. A finished video has its final
name before the row says so. So after a crash each job either waits, or is finished, or is begun again.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from svd_trt.engine.temporary_files import create_file, remove_leftovers
from svd_trt.errors import OutputError
from svd_trt.serve.database import Database, Rows, cannot_keep
from svd_trt.serve.refusals import error_object

__all__ = ["ENDED", "SUFFIXES", "Job", "Status", "Store", "new_id"]

Status: TypeAlias = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
SUFFIXES = (".mkv", ".mp4", ".webm", ".webp")
"""Of the files that a video may have."""

ENDED: Collection[str] = ("completed", "failed", "cancelled")

_ATTEMPTS = 5  # a job at which the server ended so often would end it again
_ROOM = 1_000_000  # bytes
_MOST_ROWS = 10_000  # of jobs that have ended


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


def new_id() -> str:
    """An id with 128 random bits."""
    return f"vid_{secrets.token_hex(16)}"


class Store:
    """The jobs of one folder. Every method may be called from any thread.

    Args:
        folder: of pictures and videos.
        rows: the table of jobs; None opens that of the folder, which one process at a time may use.

    Raises:
        OutputError: the folder cannot be written, or is of a newer svd-trt.
        LockedError: another server uses it.
    """

    def __init__(self, folder: Path, rows: Rows | None = None) -> None:
        self.folder = folder
        self._rows = rows or Database(folder)
        self._lock = threading.Lock()
        self._held: set[str] = set()
        try:
            for each in (folder / "pictures", folder / "videos"):
                each.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            self.close()
            raise OutputError(
                f"cannot keep jobs in {folder}: {error.strerror}; choose a folder that you may write to"
            ) from error

    def close(self) -> None:
        """Leave the folder to others. Closing twice is harmless."""
        self._rows.close()

    @property
    def held(self) -> list[str]:
        """Ids of the jobs that this store began, and of those that its clients wait for: they end with this process."""
        with self._lock:
            return sorted(self._held)

    def release(self, job_id: str) -> None:
        """Leave a job to others."""
        with self._lock:
            self._held.discard(job_id)

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
        job_id: str,
        *,
        model: str,
        picture: bytes,
        given: Mapping[str, Any],
        arguments: Mapping[str, Any],
        warnings: Sequence[str],
        streamed: bool,
        most: int,
    ) -> Job | None:
        """Accept a job; None if ``most`` jobs wait already. Only this store begins it if it is ``streamed``.

        Raises:
            OutputError: it cannot be kept.
        """
        target = self.folder / "pictures" / job_id
        if streamed:
            self._hold(job_id)
        job = None
        try:
            _write_whole(target, picture)
            added = self._all(
                "INSERT OR IGNORE INTO jobs (id, model, status, created_at, streamed, given, arguments, warnings) "
                "SELECT ?, ?, 'queued', ?, ?, ?, ?, ? "
                "WHERE (SELECT count(*) FROM jobs WHERE status = 'queued') < ? RETURNING *",
                job_id,
                model,
                time.time(),
                streamed,
                _text(given),
                _text(arguments),
                _text(list(warnings)),
                most,
            )
            job = added[0] if added else self.get(job_id)  # a table in another process may be asked twice
        except OSError as error:
            raise cannot_keep(error) from error
        finally:
            if job is None:
                self.release(job_id)
                target.unlink(missing_ok=True)
        return job

    def require_writable(self) -> None:
        """Check that the folder is there and has room for a picture.

        Raises:
            OutputError: it is not, or has none.
        """
        try:
            if shutil.disk_usage(self.folder / "pictures").free < _ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise cannot_keep(error) from error

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

    def open(self) -> int:
        """How many jobs wait or are made, of all models."""
        return self._count("status IN ('queued', 'in_progress')")

    def claim(self, model: str) -> Job | None:
        """Begin the job of ``model`` that waits longest; a streamed one only if its client waits here."""
        found = self._all(
            "UPDATE jobs SET status = 'in_progress', started_at = ?, attempts = attempts + 1 WHERE number = "
            "(SELECT min(number) FROM jobs WHERE status = 'queued' AND model = ? "
            "AND (NOT streamed OR id IN (SELECT value FROM json_each(?)))) RETURNING *",
            time.time(),
            model,
            _text(self.held),
        )
        self._hold(*(job.id for job in found))
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
        self._hold(*(job.id for job in found))
        return sorted(found, key=lambda one: one.number)

    def complete(self, job: Job, metadata: Mapping[str, Any]) -> bool:
        """Say that the video of ``job`` is in place; False if the job was cancelled before that."""
        done = self._end(job, "completed", None, metadata)
        if not done and ((now := self.get(job.id)) is None or now.status != "completed"):  # by another process
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
        self.release(job.id)

    def remove(self, job_id: str) -> None:
        """Forget a job that has ended, and its files."""
        self._remove_files(job_id)  # first: on a full disk the table cannot be written before there is room
        self._rows.execute("DELETE FROM jobs WHERE id = ?", job_id)

    def recover(self, models: Collection[str]) -> None:
        """After a start: let what was begun wait again, and end what nobody will make, with the reason.

        Args:
            models: those that are served.
        """
        self.take_back(self.unfinished(), models)
        self._remove_strangers()

    def unfinished(self) -> list[Job]:
        """The jobs that have not ended, in their order."""
        return self._all("SELECT * FROM jobs WHERE status IN ('queued', 'in_progress') ORDER BY number")

    def take_back(self, jobs: Sequence[Job], models: Collection[str]) -> None:
        """Let jobs that nobody makes any more wait again, and end those that nobody will make, with the reason.

        Args:
            jobs: some of `unfinished`.
            models: those that are served.
        """
        for job in jobs:
            if reason := _lost(job, models):
                self.fail(job, error_object("server_error", reason))
            else:
                self._all(
                    "UPDATE jobs SET status = 'queued', started_at = NULL "
                    "WHERE id = ? AND status = 'in_progress' RETURNING *",
                    job.id,
                )

    def expire(self, seconds: float | None, nbytes: int | None) -> int:
        """Remove what ended more than ``seconds`` ago, then the oldest videos until ``nbytes`` suffice.

        Returns how many jobs were removed.
        """
        ended = self._rows.execute(
            "SELECT id, completed_at FROM jobs WHERE status IN ('completed', 'failed', 'cancelled') "
            "ORDER BY number DESC"
        )
        sizes = self._sizes()
        kept, total, removed = 0, 0, 0
        for row in ended:
            job_id = row["id"]
            total += sizes.get(job_id, 0)
            old = seconds is not None and row["completed_at"] < time.time() - seconds
            if old or (nbytes is not None and total > nbytes) or kept >= _MOST_ROWS:
                self.remove(job_id)
                removed += 1
            else:
                kept += 1
        return removed

    def _sizes(self) -> dict[str, int]:
        """Bytes of all files of each video."""
        sizes: dict[str, int] = {}
        try:
            scanned = os.scandir(self.folder / "videos")
        except OSError as error:
            raise cannot_keep(error) from error
        with scanned as entries:
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
        self.release(job.id)
        if ended:
            self.picture(job).unlink(missing_ok=True)
        return bool(ended)

    def _hold(self, *ids: str) -> None:
        with self._lock:
            self._held.update(ids)

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
        return [_job(row) for row in self._rows.execute(statement, *values)]

    def _count(self, condition: str, *values: Any) -> int:
        return int(self._rows.execute(f"SELECT count(*) AS n FROM jobs WHERE {condition}", *values)[0]["n"])  # noqa: S608


def _lost(job: Job, models: Collection[str]) -> str | None:
    """Why a job that was accepted before the start cannot be made."""
    if job.streamed:
        return "the server ended while its client waited for this video; send it again"
    if job.model not in models:
        return f"the server no longer has a model {job.model!r}; send the picture again for one of {', '.join(models)}"
    if job.attempts >= _ATTEMPTS:
        return f"the server ended {job.attempts} times while it made this video; change its arguments or its picture"
    return None


def _job(fields: dict[str, Any]) -> Job:
    for name in ("given", "arguments", "warnings", "metadata", "error"):
        fields[name] = None if fields[name] is None else msgspec.json.decode(fields[name])
    fields["streamed"] = bool(fields["streamed"])
    return Job(**fields)


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


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
