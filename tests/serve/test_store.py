"""Jobs on disk: what survives, what is removed, and who may use the folder. No video is made."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from svd_trt.errors import LockedError, OutputError
from svd_trt.serve.database import Database
from svd_trt.serve.refusals import error_object
from svd_trt.serve.store import Job, Store, new_id


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def store(folder: Path) -> Iterator[Store]:
    opened = Store(folder)
    yield opened
    opened.close()


def add(store: Store, model: str = "m", *, streamed: bool = False, most: int = 100) -> Job | None:
    return store.add(
        new_id(),
        model=model,
        picture=b"picture",
        given={"seed": 2**64 - 1},
        arguments={"seed": 2**64 - 1, "fps": 7},
        warnings=["stretched"],
        streamed=streamed,
        most=most,
    )


def added(store: Store, model: str = "m", **options: Any) -> Job:
    job = add(store, model, **options)
    assert job is not None
    return job


def status(store: Store, job: Job) -> str:
    found = store.get(job.id)
    assert found is not None
    return found.status


def made(store: Store, size: int) -> Job:
    """A job that is completed with a video of ``size`` bytes."""
    added(store)
    job = store.claim("m")
    assert job is not None
    store.video(job, ".mkv").write_bytes(b"x" * size)
    assert store.complete(job, {"seed": 1})
    return job


def test_jobs_are_begun_in_their_order_and_by_model(store: Store) -> None:
    jobs = [added(store, model) for model in ("m", "n", "m")]
    assert [store.ahead(job) for job in jobs] == [0, 0, 1]
    first = store.claim("m")
    assert first is not None
    assert (first.id, first.given, first.warnings) == (jobs[0].id, {"seed": 2**64 - 1}, ["stretched"])
    assert store.ahead(jobs[2]) == 1
    assert store.complete(first, {})
    assert store.ahead(jobs[2]) == 0
    assert (store.open(), store.waiting()) == (2, 2)
    assert [job.id for job in (store.claim("m"), store.claim("m")) if job] == [jobs[2].id]
    assert (store.open(), store.waiting()) == (2, 1)


def test_after_a_crash_a_job_that_was_begun_waits_in_its_old_place(store: Store, folder: Path) -> None:
    first, second = added(store), added(store)
    assert store.claim("m") is not None
    store.close()
    again = Store(folder)
    again.recover(["m"])
    assert [status(again, job) for job in (first, second)] == ["queued", "queued"]
    claimed = again.claim("m")
    assert claimed is not None
    assert (claimed.id, claimed.attempts) == (first.id, 2)
    assert again.picture(claimed).read_bytes() == b"picture"
    again.close()


def test_what_nobody_can_make_is_reported_with_the_reason(store: Store) -> None:
    streamed, strange, deadly = added(store, streamed=True), added(store, "gone"), added(store, "d")
    for _ in range(5):
        assert store.claim("d") is not None
        store.recover(["m", "d", "gone"]) if store.get(deadly.id).attempts < 5 else None  # type: ignore[union-attr]
    store.recover(["m", "d"])
    reasons = [store.get(job.id).error["message"] for job in (streamed, strange, deadly)]  # type: ignore[union-attr, index]
    assert "client waited" in reasons[0]
    assert "no longer has a model 'gone'" in reasons[1]
    assert "ended 5 times" in reasons[2]
    assert {status(store, job) for job in (streamed, strange, deadly)} == {"failed"}


def test_a_cancelled_job_stays_cancelled(store: Store, folder: Path) -> None:
    """Also if its video is complete a moment later, and after a crash."""
    job = added(store)
    begun = store.claim("m")
    assert begun is not None
    assert store.cancel(job, "the video was cancelled")
    assert not store.picture(job).exists()
    store.video(job, ".mp4").write_bytes(b"video")
    assert not store.complete(begun, {})
    assert not store.video(job, ".mp4").exists()
    store.put_back(begun)
    store.recover(["m"])
    assert status(store, job) == "cancelled"
    assert not store.cancel(job, "again")


def test_the_queue_is_bounded_for_clients_at_the_same_time(store: Store, folder: Path) -> None:
    found: list[Job | None] = []
    threads = [threading.Thread(target=lambda: found.append(add(store, most=5))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    accepted = [job for job in found if job is not None]
    assert len(accepted) == 5
    assert {path.name for path in (folder / "pictures").iterdir()} == {job.id for job in accepted}


def test_two_stores_share_a_table(folder: Path) -> None:
    """As servers that ask one process for it: each begins the streams of its own clients, and no job is begun twice."""
    rows = Database(folder)
    one, other = Store(folder, rows), Store(folder, rows)
    streamed, plain = added(one, streamed=True), added(one)
    assert [job.id for job in (other.claim("m"), other.claim("m")) if job] == [plain.id]
    assert (one.held, other.held) == ([streamed.id], [plain.id])
    assert [job.id for job in (one.claim("m"), one.claim("m")) if job] == [streamed.id]
    # What the other does not make any more is made by the one; a video is not removed if both complete it.
    one.take_back([job for job in one.unfinished() if job.id == plain.id], ["m"])
    again = one.claim("m")
    assert again is not None
    assert (again.id, again.attempts) == (plain.id, 2)
    one.video(again, ".mkv").write_bytes(b"video")
    assert other.complete(plain, {"seed": 1})
    assert not one.complete(again, {"seed": 1})
    assert one.video(again, ".mkv").read_bytes() == b"video"
    assert (one.held, other.held) == ([streamed.id], [])
    rows.close()


class Twice:
    """A table that is asked twice, as one whose first answer was lost."""

    def __init__(self, rows: Database) -> None:
        self._rows = rows
        self.close = rows.close

    def execute(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        self._rows.execute(statement, *values)
        return self._rows.execute(statement, *values)


def test_statements_may_be_sent_twice(folder: Path) -> None:
    store = Store(folder, Twice(Database(folder)))
    job = added(store, most=1)
    assert store.picture(job).exists()
    assert add(store, most=1) is None
    store.video(job, ".mkv").write_bytes(b"video")
    assert not store.complete(job, {})  # it was, before the second answer
    assert status(store, job) == "completed"
    assert store.video(job, ".mkv").exists()
    store.close()


def test_old_videos_are_removed_by_age_and_by_size(store: Store, folder: Path) -> None:
    jobs = [made(store, 100) for _ in range(4)]
    waiting = added(store)
    assert store.expire(None, None) == 0
    assert store.expire(3600, 250) == 2
    assert [store.get(job.id) is not None for job in jobs] == [False, False, True, True]
    assert len(list((folder / "videos").iterdir())) == 2
    time.sleep(0.01)
    assert store.expire(0.001, None) == 2
    assert status(store, waiting) == "queued"


def test_files_that_no_job_needs_are_removed_at_the_start(store: Store, folder: Path) -> None:
    done, failed = made(store, 10), added(store)
    assert store.fail(failed, error_object("server_error", "x"))
    for name in ("pictures/vid_0", "videos/vid_0.mp4", f"videos/{failed.id}.mkv", "videos/.svd-trt-0123456789ab.mkv"):
        (folder / name).write_bytes(b"left")
    store.recover(["m"])
    assert [path.name for path in (folder / "videos").iterdir()] == [f"{done.id}.mkv"]
    assert list((folder / "pictures").iterdir()) == []


def test_one_server_at_a_time_uses_a_folder(store: Store, folder: Path) -> None:
    with pytest.raises(LockedError, match="another server keeps its jobs"):
        Store(folder)
    store.close()
    Store(folder).close()


@pytest.mark.parametrize("damage", ["newer", "no database", "a file"])
def test_a_folder_that_cannot_be_used_is_refused(folder: Path, damage: str) -> None:
    damages: dict[str, Callable[[], object]] = {
        "newer": lambda: sqlite3.connect(folder / "jobs.sqlite3").execute("PRAGMA user_version = 9"),
        "no database": lambda: (folder / "jobs.sqlite3").write_bytes(b"x" * 5000),
        "a file": lambda: (folder.rmdir(), folder.write_text("x")),
    }
    folder.mkdir()
    damages[damage]()
    with pytest.raises(OutputError, match="cannot keep jobs in"):
        Store(folder)
