"""A real server in a process of its own, and clients of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest

from svd_trt import Bundle, SvdTrtError, VideoPipeline
from svd_trt.serve import service as service_module
from svd_trt.serve.limits import Limits
from svd_trt.serve.store import Job, Store

FAST = {"num_frames": "2", "num_inference_steps": "1"}
ENDED = ("completed", "failed", "cancelled")


@dataclass
class Served:
    """A server that runs, and a client of it."""

    process: subprocess.Popen[str]
    client: httpx.Client
    data: Path
    said: list[str]
    reader: threading.Thread

    def post(self, picture: bytes, **fields: Any) -> httpx.Response:
        """Send a picture; fields are text."""
        query = {name: fields.pop(name) for name in ("stream", "format") if name in fields}
        return self.client.post(
            "/v1/videos",
            params=query,
            files={"image": ("p.png", picture, "image/png")},
            data={name: str(value) for name, value in fields.items()},
        )

    def accepted(self, picture: bytes, **fields: Any) -> dict[str, Any]:
        """Send a picture that is accepted; return the job."""
        answer = self.post(picture, **fields)
        assert answer.status_code == 202, answer.text
        return answer.json()

    def job(self, job_id: str) -> dict[str, Any]:
        answer = self.client.get(f"/v1/videos/{job_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait(self, job_id: str, *statuses: str, seconds: float = 120) -> dict[str, Any]:
        """Wait until a job has one of ``statuses``, or has ended."""
        until = time.monotonic() + seconds
        while (job := self.job(job_id))["status"] not in (statuses or ENDED):
            assert time.monotonic() < until, job
            assert not statuses or job["status"] not in ENDED, job
            time.sleep(0.1)
        return job

    def content(self, job_id: str, kind: str) -> bytes:
        answer = self.client.get(f"/v1/videos/{job_id}/content", params={"format": kind})
        assert answer.status_code == 200, answer.text
        return answer.content

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the server; return its exit code."""
        self.client.close()
        self.process.send_signal(number)
        code = self.process.wait(60)
        self.reader.join()
        return code


def start_server(
    bundle: Path, data: Path, *options: str, python: str | Path = sys.executable, **environment: str
) -> Served:
    """Start ``svd-trt serve`` on a free port, and wait until it says where."""
    command = [str(python), "-m", "svd_trt.cli", "serve", str(bundle), "--port", "0", "--data", str(data), *options]
    env = os.environ | {"COLUMNS": "200"} | environment
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    said: list[str] = []
    begun = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        with process.stderr:
            for line in process.stderr:
                said.append(line)
                if line.startswith("serving "):
                    begun.set()
        begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait(120)
    where = [line.split(" at ")[1].split(";")[0] for line in said if line.startswith("serving ")]
    assert where, "".join(said)
    return Served(process, httpx.Client(base_url=where[0], timeout=120), data, said, reader)


Start = Callable[..., Served]


@pytest.fixture
def start(tiny_bundle: Bundle, tmp_path: Path) -> Iterator[Start]:
    """``start("--queue", "1")`` starts a server of the tiny bundle, in the same folder each time."""
    with contextlib.ExitStack() as started:

        def call(*options: str, **environment: str) -> Served:
            server = start_server(tiny_bundle.path, tmp_path / "data", *options, **environment)
            started.callback(_end, server)
            return server

        yield call


@pytest.fixture(scope="session")
def served(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that tests share: with a key and tight limits, where two jobs may wait."""
    data = tmp_path_factory.mktemp("serve") / "data"
    limits = ("--queue", "2", "--max-upload", "100kB", "--max-upload-seconds", "1", "--allow-host", "Proxy.example")
    server = start_server(tiny_bundle.path, data, *limits, SVD_TRT_API_KEY="secret")
    server.client.headers["Authorization"] = "Bearer secret"
    yield server
    _end(server)


def _end(server: Served) -> None:
    if server.process.poll() is None:
        server.stop(signal.SIGKILL)


@pytest.fixture
def failures() -> list[SvdTrtError]:
    return []


@pytest.fixture
def service(tiny_bundle: Bundle, tmp_path: Path, failures: list[SvdTrtError]) -> Iterator[service_module.Service]:
    """A service in this process, whose bundle is a link that tests may remove."""
    link = tmp_path / "bundle"
    link.symlink_to(tiny_bundle.path)
    pipe = VideoPipeline.open(link, verify=False)
    store = Store(tmp_path / "data")
    made = service_module.open_service(
        store,
        {"m": pipe},
        {"m": link},
        lambda path: VideoPipeline.open(path, verify=False),
        limits=Limits(),
        keep=service_module.Keep(),
        api_key=None,
        names=frozenset(),
        on_failure=failures.append,
    )
    service_module.start(made)
    yield made
    service_module.close(made)


@pytest.fixture(scope="session")
def png(picture: PIL.Image.Image) -> bytes:
    """The bytes of a picture's file, of the shape of the tiny bundle's frames."""
    file = io.BytesIO()
    picture.resize((48, 48)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def alone(tiny_bundle: Bundle, png: bytes) -> Iterator[Callable[..., npt.NDArray[np.uint8]]]:
    """``alone(seed=1, ...)``: the frames that the pipeline makes of the picture without a server."""
    with VideoPipeline.open(tiny_bundle) as pipe:

        def frames(**arguments: Any) -> npt.NDArray[np.uint8]:
            return np.stack(list(pipe.stream(png, **arguments)))

        yield frames


def ended(service: service_module.Service, job: Job) -> Job:
    """A job of a service in this process, once it has ended."""
    until = time.monotonic() + 60
    while (now := service.store.get(job.id)) is None or now.status not in ENDED:
        assert time.monotonic() < until
        time.sleep(0.02)
    return now


def frames_of(video: bytes) -> npt.NDArray[np.uint8]:
    """Every frame of a video file, ``[F, H, W, 3]``."""
    with av.open(io.BytesIO(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def events_of(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and data of server-sent events."""
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])


def figures(server: Served) -> dict[str, float]:
    """What the server tells Prometheus, by the name with its labels."""
    lines = server.client.get("/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def error_of(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """The error object of an answer."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"type", "message", "field", "limit"}
    assert error["type"] == kind, error
    return error
