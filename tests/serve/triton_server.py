"""Triton's real server, from the wheel nvidia-pytriton in an environment of its own, and streams of requests to it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import np_to_triton_dtype

from tests.serve.environments import ROOT, environment_of, pins

WHEEL = ("nvidia-pytriton==0.7.0", "numpy==1.26.4", "grpcio==1.85.3")
RUNTIME = ("av", "click", "imageio", "msgspec", "onnxruntime", "pillow", "platformdirs", "rich")
LONG = {"extend": 10_000}
"""Frames for hours: only a request that is cancelled ends in the time of a test."""


def environment(folder: Path) -> Path:
    """The interpreter of an environment with the wheel, the runtime's dependencies and this tree."""
    return environment_of(folder, [*WHEEL, *pins(RUNTIME)])


@dataclass
class Server:
    """A server that runs.

    Attributes:
        http: the address of the plain API.
        grpc: that of the streams.
        log: what it prints.
    """

    http: str
    grpc: str
    log: Path


@contextlib.contextmanager
def serving(python: Path, models: Path, log: Path) -> Iterator[Server]:
    """Run the server on ``models`` until the block ends."""
    ports = _free_ports(3)
    named = [f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), ports, strict=True)]
    command = [python, "-m", "svd_trt.serve.triton.triton_wheel", f"--model-repository={models}", *named]
    # Triton 2.51 never unloads a model after it refused a request for the number of its dimensions; it waits in vain.
    command.append("--exit-timeout-secs=3")
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(ROOT / "src")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*map(str, command), *(f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics"))],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=clean,
            start_new_session=True,
        )
    server = Server(f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}", log)
    try:
        _wait_until_ready(server, process)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes]) -> None:
    with triton.InferenceServerClient(server.grpc) as client:
        for _ in range(600):
            assert process.poll() is None, server.log.read_text()
            with contextlib.suppress(Exception):
                if client.is_server_ready():
                    return
            time.sleep(0.2)
    raise AssertionError(server.log.read_text())


@dataclass
class Answer:
    """What came of one request until now."""

    frames: list[Any] = field(default_factory=list)
    indexes: list[int] = field(default_factory=list)
    totals: set[int] = field(default_factory=set)
    details: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    ended: bool = False


class Stream:
    """One gRPC stream of requests; the end of its block cancels those that are not finished."""

    def __init__(self, server: Server) -> None:
        self._client = triton.InferenceServerClient(server.grpc)
        self._arrived: queue.Queue[Any] = queue.Queue()
        self.answers: dict[str, Answer] = {}

    def __enter__(self) -> Stream:
        self._client.start_stream(lambda result, error: self._arrived.put((result, error)))
        return self

    def __exit__(self, *_: object) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()

    def request(self, model: str, **tensors: Any) -> Answer:
        """Send a request; numbers become arrays ``[1]``, and bytes and texts such of objects."""
        inputs = []
        for name, value in tensors.items():
            array = _array(name, value)
            inputs.append(triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
            inputs[-1].set_data_from_numpy(array)
        name = str(len(self.answers))
        answer = self.answers[name] = Answer()
        self._client.async_stream_infer(model, inputs, request_id=name, enable_empty_final_response=True)
        return answer

    def take(self, seconds: float = 120) -> None:
        """Wait for the next response of any request."""
        result, error = self._arrived.get(timeout=seconds)
        if error is not None:
            message = str(error)
            name = message.partition("[request id: ")[2].partition("]")[0]
            answer = self.answers[name or next(n for n, a in self.answers.items() if not a.ended)]
            answer.error, answer.ended = message, True
            return
        response = result.get_response()
        answer = self.answers[response.id]
        if response.parameters["triton_final_response"].bool_param:
            answer.ended = True
            return
        answer.frames.append(result.as_numpy("frame"))
        answer.indexes.append(int(result.as_numpy("index")[0]))
        answer.totals.add(int(result.as_numpy("total")[0]))
        answer.details = json.loads(result.as_numpy("details")[0])

    def finish(self, answer: Answer) -> Answer:
        """Wait for the end of one request."""
        while not answer.ended:
            self.take()
        return answer


def _array(name: str, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, bytes | str):
        return np.array([value.encode() if isinstance(value, str) else value], np.object_)
    kind = np.uint64 if name == "seed" else np.int64 if isinstance(value, int) else np.float64
    return np.array(value if isinstance(value, list) else [value], kind)
