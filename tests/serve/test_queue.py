"""Waiting, full queues, cancelling, clients that leave, and videos that take too long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serve.conftest import FAST, Served, Start, error_of, events_of

LONG = {"num_inference_steps": 100}


@pytest.fixture
def full(served: Served, png: bytes) -> Iterator[list[dict[str, Any]]]:
    """A long job that is being made, and two that wait."""
    for job in served.client.get("/v1/videos").json()["data"]:  # of the tests before this one
        served.wait(job["id"])
    jobs = [served.accepted(png, **LONG)]
    served.wait(jobs[0]["id"], "in_progress")
    jobs += [served.accepted(png, **FAST) for _ in range(2)]
    yield jobs
    for job in jobs[::-1]:
        served.client.delete(f"/v1/videos/{job['id']}")


def test_a_full_queue_says_when_to_come_again(served: Served, png: bytes, full: list[dict[str, Any]]) -> None:
    assert [served.job(job["id"])["position"] for job in full] == [None, 1, 2]
    for stream in ("false", "true"):
        answer = served.post(png, stream=stream, **FAST)
        error = error_of(answer, 429, "queue_full")
        assert error["limit"] == 2
        assert int(answer.headers["retry-after"]) >= 1
    error_of(served.client.get("/readyz"), 429, "queue_full")
    assert served.client.get("/healthz").status_code == 200
    served.client.delete(f"/v1/videos/{full[1]['id']}")
    assert served.client.get("/readyz").status_code == 200
    served.client.delete(f"/v1/videos/{served.accepted(png, **FAST)['id']}")


def test_a_job_that_waits_and_one_that_is_made_are_cancelled(
    served: Served, png: bytes, full: list[dict[str, Any]]
) -> None:
    running, waiting, last = (job["id"] for job in full)
    lines: list[tuple[str, dict[str, Any]]] = []
    with served.client.stream("GET", f"/v1/videos/{waiting}/events") as answer:
        events = events_of(answer.iter_lines())
        lines.append(next(events))
        assert served.client.delete(f"/v1/videos/{waiting}").json()["status"] == "cancelled"
        lines += events
    assert [(name, data["status"]) for name, data in lines if name == "end"] == [("end", "cancelled")]
    cancelled = served.client.delete(f"/v1/videos/{running}").json()
    assert (cancelled["status"], cancelled["error"]["type"]) == ("cancelled", "cancelled")
    # The one behind them is made at once: 100 steps would take longer than the limit of its client.
    assert served.wait(last)["status"] == "completed"
    assert served.job(running)["status"] == "cancelled"
    assert not [path for path in served.data.glob("videos/*") if running in path.name]


@pytest.mark.parametrize("begun", [True, False], ids=["after its first frame", "before its first frame"])
def test_a_client_of_a_stream_that_leaves_cancels_its_video(served: Served, png: bytes, begun: bool) -> None:
    """With parts of a longer video, so that frames come before it is finished."""
    fields = {"num_frames": 4, "extend": 200, "num_inference_steps": 2} if begun else LONG
    url = f"{served.client.base_url}/v1/videos?stream=true"
    try:
        with httpx.stream(
            "POST", url, headers=served.client.headers, files={"image": png}, data=fields, timeout=60 if begun else 0.7
        ) as answer:
            assert answer.status_code == 200
            next(answer.iter_bytes())
    except httpx.ReadTimeout:
        assert not begun
    newest = served.client.get("/v1/videos", params={"limit": 1}).json()["data"][0]
    assert served.wait(newest["id"])["status"] == "cancelled"
    assert served.wait(served.accepted(png, **FAST)["id"])["status"] == "completed"


def test_watchers_of_events_may_leave_and_come_back(served: Served, png: bytes) -> None:
    """Frames that were made before a client came are sent first, and leaving does not cancel the video."""
    job = served.accepted(png, num_frames=8, extend=20, num_inference_steps=1)["id"]
    place = f"/v1/videos/{job}/events"
    with served.client.stream("GET", place) as answer:
        next(data for name, data in events_of(answer.iter_lines()) if name == "frame")
    with served.client.stream("GET", place) as answer:
        events = list(events_of(answer.iter_lines()))
    frames = [data["index"] for name, data in events if name == "frame"]
    assert frames == list(range(28)) or (frames == [] and events[0][1]["status"] == "completed")
    assert events[-1][1]["status"] == "completed"


@pytest.mark.slow
def test_a_video_that_takes_too_long_is_stopped(start: Start, png: bytes) -> None:
    server = start("--max-seconds", "1")
    job = server.wait(server.accepted(png, num_inference_steps=100, num_frames=8, extend=200)["id"])
    assert job["status"] == "failed"
    assert "stopped after 1 s, the most that this server allows" in job["error"]["message"]
