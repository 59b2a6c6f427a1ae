"""What waits in threads must not make others wait, and what ends while it is looked at must not be lost."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx
import pytest

from svd_trt import BackendError
from svd_trt.serve import application as application_module
from svd_trt.serve.application import build_application
from svd_trt.serve.events import Hub, Live, job_events
from svd_trt.serve.service import Service, accept
from svd_trt.serve.store import ENDED, Job
from svd_trt.serve.streaming import first_frame
from tests.serve.conftest import FAST, Start, ended, error_of


def test_conversions_wait_outside_of_the_threads_of_other_requests(
    service: Service, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = accept(service, "m", png, FAST, streamed=False)
    ended(service, job)
    going = threading.Event()
    monkeypatch.setattr(application_module, "converted", held(going, application_module.converted))

    async def asked() -> list[int]:
        transport = httpx.ASGITransport(build_application(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            content = f"/v1/videos/{job.id}/content?format=webm"
            count = int(anyio.to_thread.current_default_thread_limiter().total_tokens) + 5
            waiting = [asyncio.ensure_future(client.get(content)) for _ in range(count)]
            await asyncio.sleep(1)
            found = [await asyncio.wait_for(client.get(path), 30) for path in (f"/v1/videos/{job.id}", "/readyz")]
            going.set()
            return [answer.status_code for answer in (*found, *await asyncio.gather(*waiting))]

    assert set(asyncio.run(asked())) == {200}


def held(going: threading.Event, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, once ``going`` is set."""

    def call(*arguments: Any) -> Any:
        assert going.wait(60)
        return function(*arguments)

    return call


def test_a_stream_whose_video_ends_during_a_look_has_its_frames(
    service: Service, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = service.store.get

    def slow(job_id: str) -> Job | None:
        """What the store says, asked by a route, once the job has ended."""
        while (now := inner(job_id)) and now.status not in ENDED and "render" not in threading.current_thread().name:
            time.sleep(0.02)
        return now

    monkeypatch.setattr(service.store, "get", slow)
    job, live = accept(service, "m", png, FAST, streamed=True)

    async def here() -> bool:
        return False

    assert not live.frames
    asyncio.run(first_frame(service, job, live, here))
    assert len(live.frames) == 2


def test_a_device_that_fails_while_its_job_is_cancelled_is_opened_again(
    service: Service, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer = service.renderers["m"]
    broken = renderer.pipe
    videos = renderer._videos

    def fail(call: Any) -> None:
        monkeypatch.setattr(renderer, "_videos", videos)
        renderer.cancel(call.jobs[0].id)
        raise BackendError("the device fell off the bus")

    monkeypatch.setattr(renderer, "_videos", fail)
    accept(service, "m", png, FAST, streamed=False)
    until = time.monotonic() + 60
    while renderer.pipe is broken or renderer.reopening:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert ended(service, accept(service, "m", png, FAST, streamed=False)[0]).status == "completed"


def test_requests_during_a_reopening_are_told_to_wait(service: Service, png: bytes) -> None:
    service.renderers["m"].reopening = True

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(build_application(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/v1/videos", files={"image": png}, data=FAST)

    answer = asyncio.run(asked())
    assert "is being opened again" in error_of(answer, 503, "server_error")["message"]
    assert answer.headers["retry-after"] == "30"
    service.renderers["m"].reopening = False


def test_a_job_that_is_begun_again_while_its_preview_is_made_keeps_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    live = hub.live("vid")
    live.frames.append(None)  # type: ignore[arg-type]  # never drawn
    status = ["in_progress"]

    def preview(one: Live, index: int) -> str:
        one.begin({})
        status[0] = "completed"
        return str(one.frames[index])

    monkeypatch.setattr(Live, "preview", preview)

    async def collected() -> bytes:
        def job() -> dict[str, Any]:
            return {"status": status[0], "position": None, "stage": None, "progress": 0, "seconds_left": None}

        events = job_events(hub, "vid", job)
        found = []
        async for event in events:
            found.append(event)
            hub.notify()
        return b"".join(found)

    assert b"event: end" in asyncio.run(asyncio.wait_for(collected(), 30))


def test_pictures_that_are_sent_at_the_same_time_do_not_fill_the_memory(start: Start) -> None:
    server = start("--max-upload", "20MB")
    before = peak(server.process.pid)
    picture = b"\x89PNG\r\n\x1a\n" + bytes(6_000_000)

    def send(_: int) -> int:
        return httpx.post(f"{server.client.base_url}/v1/videos", files={"image": picture}, timeout=120).status_code

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(send, range(16))) == {400}
    assert peak(server.process.pid) - before < 60_000_000, "sixteen pictures are 96 MB"


def peak(pid: int) -> int:
    """The largest resident size of a process, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
