"""Clients that take nothing of what they asked for do not hold connections, nor the device."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.serve.conftest import FAST, Served, Start, figures


def silent(server: Served, request: bytes) -> socket.socket:
    """A client that sends a request and reads nothing, with the smallest buffer for what it does not read."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    client.settimeout(60)
    client.connect((server.client.base_url.host, server.client.base_url.port))
    client.sendall(request)
    return client


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_clients_that_take_nothing_lose_their_connection_and_slow_ones_do_not(start: Start, png: bytes) -> None:
    server = start("--max-stall-seconds", "3", "--max-frames", "5000")
    one = server.client.get("/").content
    files = figures(server)["process_open_fds"]
    # A stream, and answers, both larger than all buffers on their way.
    fields = {"num_frames": "8", "extend": "3000", "num_inference_steps": "1"}
    form = httpx.Request("POST", f"{server.client.base_url}/v1/videos?stream=true", files={"image": png}, data=fields)
    head = "".join(f"{name}: {value}\r\n" for name, value in form.headers.items())
    stream = f"POST /v1/videos?stream=true HTTP/1.1\r\n{head}\r\n".encode() + form.read()
    get = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
    pages = (get + b"\r\n") * 199 + get + b"Connection: close\r\n\r\n"
    taken = bytearray()
    ended = threading.Event()

    def read_slowly(client: socket.socket) -> None:
        while some := client.recv(1 << 20 if ended.is_set() else 10_000):
            taken.extend(some)
            ended.wait(0.1)

    def others_have_ended() -> bool:
        jobs = [job["status"] for job in server.client.get("/v1/videos").json()["data"]]
        return jobs == ["cancelled"] and figures(server)["process_open_fds"] == files + 1

    with silent(server, stream), silent(server, pages), silent(server, pages) as slow, ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read_slowly, slow)
        try:
            until(others_have_ended)
        finally:
            ended.set()
        reader.result()
        assert taken.count(one) == 200
        assert server.wait(server.accepted(png, **FAST)["id"])["status"] == "completed"
