"""Many requests: a thousand videos, and a thousand malformed requests, without an error or growth of the server."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.serve.conftest import FAST, Served, Start, error_of, frames_of

pytestmark = pytest.mark.slow

VIDEOS = 1000
WARM = 200  # videos after which memory, files and threads are compared
GROWTH = (
    25_000_000  # bytes; a frame that leaked with each video would be 800 x 3 kB, a picture of 48 x 48 as much again
)


def used(server: Served) -> dict[str, int]:
    """Memory, open files and threads of a server that has nothing to do."""
    process = psutil.Process(server.process.pid)
    return {"bytes": process.memory_info().rss, "files": process.num_fds(), "threads": process.num_threads()}


def require_no_growth(before: dict[str, int], after: dict[str, int], record: Any) -> None:
    for name, value in after.items():
        record(f"{name}_before", before[name])
        record(f"{name}_after", value)
    assert after["bytes"] - before["bytes"] < GROWTH
    assert after["files"] <= before["files"] + 2
    assert after["threads"] <= before["threads"] + 2


def test_a_thousand_videos_leave_nothing_behind(start: Start, png: bytes, alone: Any, record_property: Any) -> None:
    """Some are watched, some streamed, some fetched in every format and some cancelled, as clients do."""
    server = start("--queue", "8", "--keep", "1MB")
    before = {}
    for number in range(VIDEOS):
        if number == WARM:
            before = used(server)
        if number % 10 == 3:
            assert server.post(png, **FAST, seed=number, stream="true", format="mkv").status_code == 200
            continue
        job = server.accepted(png, **FAST, seed=number)["id"]
        if number % 10 == 5:
            server.client.delete(f"/v1/videos/{job}")
            continue
        if number % 10 == 7:
            with server.client.stream("GET", f"/v1/videos/{job}/events") as answer:
                answer.read()
        assert server.wait(job)["status"] == "completed"
        if number % 50 == 0:
            expected = alone(seed=number, num_frames=2, num_inference_steps=1)
            np.testing.assert_array_equal(frames_of(server.content(job, "mkv")), expected)
            server.content(job, "webm")
    require_no_growth(before, used(server), record_property)


def conforming(server: Served, folder: Path, *options: str) -> int:
    """Run Schemathesis, whose every request must get an answer as the description says; return their number."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{server.client.base_url}/openapi.json"]
    command += ["--max-examples", "60", "--checks", checks, "--request-timeout", "60", "--no-color", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert found is not None, done.stdout[-2000:]
    assert found[1] == found[2]
    return int(found[1])


def test_a_thousand_malformed_requests(start: Start, png: bytes, tmp_path: Path, record_property: Any) -> None:
    """Schemathesis makes them of the server's own OpenAPI; every answer must be as that says, and none 500 or above."""
    server = start("--queue", "8", "--max-steps", "2", "--max-upload-seconds", "5")
    server.wait(server.accepted(png, **FAST)["id"])
    for _ in range(50):
        error_of(server.post(b"no picture"), 400, "invalid_request")
    before = used(server)
    # Its own generator of wrong bodies fails now and then on the bytes of a file ("Unsupported type: 'Binary'").
    phases = [["--phases", "examples,coverage,stateful"], ["--phases", "fuzzing", "--mode", "positive"]]
    counts = [conforming(server, tmp_path, *phase) for phase in phases]
    record_property("requests", sum(counts))
    assert sum(counts) >= 1000
    for job in server.client.get("/v1/videos", params={"limit": 100}).json()["data"]:
        server.wait(job["id"])
    assert 'svd_trt_refused_requests_total{type="server_error"}' not in server.client.get("/metrics").text
    assert "Traceback" not in "".join(server.said)
    require_no_growth(before, used(server), record_property)


def test_connections_are_bounded_in_number_and_in_time(start: Start, png: bytes) -> None:
    """Those that send nothing, or only the beginning of a request, get an answer and end; others are served again."""
    server = start()
    address = (server.client.base_url.host, server.client.base_url.port)
    with contextlib.ExitStack() as opened:
        silent = [opened.enter_context(socket.create_connection(address, timeout=60)) for _ in range(500)]
        silent[1].sendall(b"GET /v1/models HTTP/1.1\r\nHost: local")
        with socket.create_connection(address, timeout=60) as more:
            assert more.recv(4096).startswith(b"HTTP/1.1 503")
        for connection in silent[:2]:
            answer = connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 408")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request"
    assert server.wait(server.accepted(png, **FAST)["id"])["status"] == "completed"
