"""The page of `svd-trt serve` in a real Chromium, served by the real command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from svd_trt import Bundle

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_READY = 60  # seconds for the server to start


class Server(NamedTuple):
    """A server that runs."""

    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def get(self, path: str) -> Any:
        """The JSON of an answer."""
        with urllib.request.urlopen(self.url + path) as answer:
            return json.loads(answer.read())


@contextmanager
def serve(bundle: Path, data: Path, port: int | None = None, **environment: str) -> Iterator[Server]:
    """Run `svd-trt serve` until the end of the block, on a free port if none is given."""
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    command = [sys.executable, "-m", "svd_trt", "serve", str(bundle), "--port", str(port), "--data", str(data)]
    log = data.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
        )
    server = Server(port, process)
    try:
        _wait(server, log)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(server: Server, log: Path) -> None:
    for _ in range(_READY * 10):
        assert server.process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(server.url + "readyz"):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"the server is not ready after {_READY} s: {log.read_text()}")


def until(page: Any, expression: str, seconds: float = 30) -> None:
    """Wait until an expression of the page is true. Playwright's own function needs eval, which the page's policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not true within {seconds} s: {expression}"
        page.wait_for_timeout(20)


@pytest.fixture(scope="session")
def server(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tiny_bundle.path, tmp_path_factory.mktemp("served") / "data") as running:
        yield running


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's Chromium. Playwright's own one would be a download."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium; run make test-browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any, server: Server) -> Iterator[Callable[..., Any]]:
    """``open_page(url, **options)``: the page in a context of its own. A message of the console fails the test."""
    contexts: list[Any] = []
    troubles: list[str] = []

    def get(url: str = server.url, *, expected: tuple[str, ...] = (), **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        # Chromium reports every answer of 400 and more, which tests of errors ask for.
        fine = ("Failed to load resource", *expected)
        page.on("console", lambda told: troubles.append(told.text) if not told.text.startswith(fine) else None)
        page.goto(url)
        return page

    yield get
    for context in contexts:
        context.close()
    assert troubles == []


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Any:
    """The page, with its form."""
    page = open_page()
    page.wait_for_selector("#argument-num_frames")
    return page
