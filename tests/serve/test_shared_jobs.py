"""Two servers that share a table of jobs, in one process: what one makes, clients of the other see and stop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.serve import shared_jobs
from svd_trt.serve.events import SHARES, Hub, job_events
from svd_trt.serve.limits import Limits
from svd_trt.serve.service import Keep, Service, accept, cancel, close, describe, open_service, start
from svd_trt.serve.shared_jobs import SharedJobs, SharedTable, Told
from svd_trt.serve.store import ENDED, Job, Store, new_id
from tests.serve.conftest import events_of

LONG = {"num_frames": "4", "extend": "12", "num_inference_steps": "2"}
Open = Callable[[], Service]


@pytest.fixture
def table(tmp_path: Path) -> Iterator[SharedJobs]:
    jobs = SharedJobs(tmp_path / "data", ["m"])
    yield jobs
    jobs.close()


@pytest.fixture
def server(tiny_bundle: Bundle, tmp_path: Path, table: SharedJobs) -> Iterator[Open]:
    """``server()`` is a service whose table is the shared one; it makes videos once it is started."""
    lock, opened = threading.Lock(), []

    def call(method: str, *arguments: Any) -> Any:
        with lock:  # as an actor, which does one thing at a time
            return getattr(table, method)(*arguments)

    def one() -> Service:
        rows = SharedTable(call)
        pipe = VideoPipeline.open(tiny_bundle, verify=False)
        service = open_service(
            Store(tmp_path / "data", rows),
            {"m": pipe},
            {"m": tiny_bundle.path},
            lambda path: VideoPipeline.open(path, verify=False),
            limits=Limits(),
            keep=Keep(),
            api_key=None,
            names=frozenset(),
            on_failure=lambda error: None,
        )
        rows.begin(service)
        opened.append(service)
        return service

    yield one
    for service in opened:
        close(service)


def until(service: Service, job: Job, *statuses: str) -> Job:
    limit = time.monotonic() + 60
    while (now := service.store.get(job.id)) is None or now.status not in (statuses or ENDED):
        assert time.monotonic() < limit, now
        time.sleep(0.02)
    return now


def test_a_job_is_made_by_another_server_and_its_client_sees_everything(server: Open, png: bytes) -> None:
    front, maker = server(), server()  # the front makes nothing
    start(maker)
    job = accept(front, "m", png, LONG | {"seed": "3"}, streamed=False)[0]

    def now() -> dict[str, Any] | None:
        found = front.store.get(job.id)
        return None if found is None else describe(front, found)

    async def read() -> list[str]:
        parts = [part async for part in job_events(front.hub, job.id, now)]
        return b"".join(parts).decode().splitlines()

    events = list(events_of(iter(asyncio.run(read()))))
    assert until(front, job).status == "completed"
    assert [data["index"] for name, data in events if name == "frame"] == list(range(16))
    assert len({data["image"] for name, data in events if name == "frame"}) > 12
    assert {data["stage"] for name, data in events if name == "step"} >= {"denoise", "decode"}
    progress = [data["progress"] for name, data in events if name == "step"]
    assert progress == sorted(progress)
    assert progress[-1] > 50
    assert events[-1][0] == "end"


def test_a_job_that_another_server_makes_is_cancelled(server: Open, png: bytes) -> None:
    front, maker = server(), server()
    start(maker)
    job = accept(front, "m", png, LONG | {"extend": "200"}, streamed=False)[0]
    running = until(front, job, "in_progress")
    while describe(front, running)["progress"] == 0:
        time.sleep(0.05)
    assert cancel(front, running)
    after = accept(front, "m", png, {"num_frames": "2", "num_inference_steps": "1"}, streamed=False)[0]
    assert until(front, after).status == "completed"
    cancelled = until(front, job)
    assert (cancelled.status, maker.store.held) == ("cancelled", [])
    assert not list((front.store.folder / "videos").glob(f"{job.id}*"))


def test_a_server_that_ends_with_grace_finishes_what_it_makes(server: Open, png: bytes) -> None:
    front, maker = server(), dataclasses.replace(server(), grace=60)
    start(maker)
    begun, waiting = (accept(front, "m", png, LONG, streamed=False)[0] for _ in range(2))
    until(front, begun, "in_progress")
    close(maker)
    assert [front.store.get(job.id).status for job in (begun, waiting)] == ["completed", "queued"]  # type: ignore[union-attr]


def test_jobs_of_a_server_that_is_gone_are_taken_back(
    table: SharedJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is begun waits again; the stream of a client that waited there fails; those of living servers stay."""
    gone, here = (Store(tmp_path / "data", SharedTable(lambda m, *a: getattr(table, m)(*a))) for _ in range(2))
    add = {"model": "m", "picture": b"p", "given": {}, "arguments": {}, "warnings": [], "most": 9}
    lost, kept = gone.add(new_id(), **add, streamed=False), here.add(new_id(), **add, streamed=False)  # type: ignore[arg-type]
    assert [gone.claim("m"), here.claim("m")] != [None, None]
    streamed = gone.add(new_id(), **add, streamed=True)  # type: ignore[arg-type]
    strange = here.add(new_id(), **add | {"model": "n"}, streamed=False)  # type: ignore[arg-type]
    jobs = [lost, kept, streamed, strange]
    for lease, expected in (
        (1000.0, ["in_progress", "in_progress", "queued", "queued"]),
        (0.0, ["queued", "in_progress", "failed", "failed"]),
    ):
        monkeypatch.setattr(shared_jobs, "LEASE", lease)
        time.sleep(1.1)  # it looks once a second
        table.exchange(Told(["m"], held=here.held))
        assert [here.get(job.id).status for job in jobs] == expected  # type: ignore[union-attr]
    assert "no longer has a model 'n'" in here.get(strange.id).error["message"]  # type: ignore[union-attr, index]
    again = here.claim("m")
    assert again is not None
    assert (again.id, again.attempts) == (lost.id, 2)  # type: ignore[union-attr]


def test_a_job_that_was_just_begun_is_not_taken_back(
    table: SharedJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server says so a moment later, and another one may speak before it."""
    monkeypatch.setattr(shared_jobs, "LEASE", 0.5)
    table.exchange(Told(["m"]))
    time.sleep(1.1)
    store = Store(tmp_path / "data", SharedTable(lambda m, *a: getattr(table, m)(*a)))
    add = {"model": "new", "picture": b"p", "given": {}, "arguments": {}, "warnings": [], "most": 9}
    jobs = [store.add(new_id(), **add, streamed=streamed) for streamed in (False, True, False)]  # type: ignore[arg-type]
    assert store.claim("new") is not None
    table.exchange(Told(["m"]))
    assert [store.get(job.id).status for job in jobs if job] == ["in_progress", "queued", "queued"]  # type: ignore[union-attr]


def test_a_restarted_table_leaves_what_servers_make(tmp_path: Path) -> None:
    shared = SharedJobs(tmp_path / "data", ["m"])
    store = Store(tmp_path / "data", SharedTable(lambda m, *a: getattr(shared, m)(*a)))
    job = store.add(new_id(), model="m", picture=b"p", given={}, arguments={}, warnings=[], most=9, streamed=False)
    assert job is not None
    assert store.claim("m") is not None
    shared.close()
    for first, status in ((False, "in_progress"), (True, "queued")):
        shared = SharedJobs(tmp_path / "data", ["m"], first=first)
        shared.exchange(Told(["m"], held=store.held))
        assert store.get(job.id).status == status  # type: ignore[union-attr]
        assert store.picture(job).exists()
        shared.close()


def test_the_end_of_a_job_is_told_to_others_and_not_taken_back_by_its_maker(tmp_path: Path) -> None:
    """Though it ends between two exchanges, after which nobody makes it."""
    hub, store = Hub(), SimpleNamespace(held=["vid_1"], release=lambda _: None)
    renderer = SimpleNamespace(wake=lambda: None, cancel=lambda _: None)
    service: Any = SimpleNamespace(hub=hub, store=store, renderers={"m": renderer})
    with contextlib.closing(SharedJobs(tmp_path, ["m"])) as jobs:
        shared = SharedTable(lambda method, *values: getattr(jobs, method)(*values))
        live = hub.live("vid_1")
        live.begin(SHARES)
        live.report("decode", 0, 4)
        shared.exchange(service)
        live.report("decode", 4, 4)
        store.held = []
        for _ in range(2):
            shared.exchange(service)
            assert live.step == ("decode", 4, 4)
        assert jobs.exchange(Told(["m"])).states["vid_1"]["step"] == live.step
