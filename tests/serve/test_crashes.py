"""Servers that are killed under load: no accepted job is lost, and no half file is served."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np
import pytest

from tests.serve.conftest import FAST, Served, Start, frames_of


class Load:
    """A client that sends pictures and fetches videos until the server is gone; it remembers what was accepted."""

    def __init__(self, png: bytes) -> None:
        self.png = png
        self.accepted: dict[str, int] = {}  # ids to seeds
        self.fetched: dict[str, Any] = {}  # ids to frames

    def run(self, server: Served) -> None:
        with contextlib.suppress(httpx.TransportError, RuntimeError):  # the latter when `Served.stop` closes the client
            while True:
                seed = len(self.accepted)
                answer = server.post(self.png, **FAST, seed=seed)
                if answer.status_code == 202:
                    self.accepted[answer.json()["id"]] = seed
                else:
                    assert answer.status_code == 429, answer.text
                    time.sleep(0.05)
                for job in server.client.get("/v1/videos", params={"limit": 5}).json()["data"]:
                    if job["status"] == "completed" and job["id"] not in self.fetched:
                        self.fetched[job["id"]] = frames_of(server.content(job["id"], "mkv"))


def end_under_load(
    start: Start, png: bytes, alone: Callable[..., Any], signals: Sequence[int], record: Any, latest: float = 1.5
) -> Load:
    """End a server by each of ``signals`` up to ``latest`` seconds after a start, then check what it accepted.

    The first video of a server takes a second longer, which loads the networks.
    """
    chosen = int(os.environ.get("SVD_TRT_TEST_SEED") or random.randrange(1 << 32))
    record("seed", chosen)  # the variable repeats a run
    moments, load = random.Random(chosen), Load(png)
    for number in signals:
        server = start("--queue", "4")
        client = threading.Thread(target=load.run, args=(server,))
        client.start()
        time.sleep(moments.uniform(0.05, latest))
        assert server.stop(number) == (-number if number == signal.SIGKILL else 128 + number)
        client.join()
        assert "Traceback" not in "".join(server.said)
    last = start("--queue", "4")
    for job_id, seed in load.accepted.items():
        job = last.wait(job_id)
        if job["status"] == "failed":
            assert "the server ended 5 times while it made this video" in job["error"]["message"]
            continue
        assert job["status"] == "completed"
        expected = alone(seed=seed, num_frames=2, num_inference_steps=1)
        np.testing.assert_array_equal(frames_of(last.content(job_id, "mkv")), expected)
        assert len(frames_of(last.content(job_id, "mp4"))) == 2
        if job_id in load.fetched:
            np.testing.assert_array_equal(load.fetched[job_id], expected)
    assert {path.name[0] for path in last.data.glob("videos/*")} <= {"v"}, "a file that was not complete is left"
    assert list(last.data.glob("pictures/*")) == []
    assert last.client.get("/v1/videos", params={"limit": 100}).json()["data"] != []
    last.stop()
    return load


def test_a_server_that_is_killed_or_ended_loses_no_job(
    start: Start, png: bytes, alone: Callable[..., Any], record_property: Any
) -> None:
    load = end_under_load(start, png, alone, [signal.SIGKILL, signal.SIGTERM], record_property)
    assert load.accepted


@pytest.mark.slow
def test_a_server_that_is_killed_twenty_times_loses_no_job(
    start: Start, png: bytes, alone: Callable[..., Any], record_property: Any
) -> None:
    load = end_under_load(start, png, alone, [signal.SIGKILL] * 20, record_property, latest=5)
    record_property("accepted", len(load.accepted))
    record_property("fetched_under_load", len(load.fetched))
    assert len(load.accepted) > 40


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_and_jobs_go_on_after_the_start(
    start: Start, png: bytes, alone: Callable[..., Any], number: int
) -> None:
    server = start()
    arguments = [{"seed": 1, "num_frames": 2, "num_inference_steps": steps} for steps in (30, 1)]
    jobs = [server.accepted(png, **one) for one in arguments]
    server.wait(jobs[0]["id"], "in_progress")
    watched = threading.Event()

    def watch() -> None:
        with httpx.stream("GET", f"{server.client.base_url}/v1/videos/{jobs[1]['id']}/events", timeout=60) as answer:
            for _ in answer.iter_lines():
                watched.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    watched.wait(30)
    assert server.stop(number) == 128 + number
    watcher.join(30)
    assert not watcher.is_alive()
    assert "Traceback" not in "".join(server.said)
    again = start()
    for job, one in zip(jobs, arguments, strict=True):
        assert again.wait(job["id"])["status"] == "completed"
        np.testing.assert_array_equal(frames_of(again.content(job["id"], "mkv")), alone(**one))
