"""The page of `svd-trt serve` in a real Chromium, from the real command."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest

from svd_trt import Bundle
from tests.serve.conftest import Served, start, start_server

__all__ = ["OpenPage", "Served", "address", "served", "start", "until"]

OpenPage: TypeAlias = Callable[..., Any]


def address(server: Served) -> str:
    """Of the page."""
    return str(server.client.base_url)


def until(page: Any, expression: str, seconds: float = 60) -> None:
    """Wait until an expression is true in the page, whose policy forbids the eval of Playwright's own function."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not true within {seconds} s: {expression}"
        page.wait_for_timeout(20)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's Chromium, because Playwright's own one is no package."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium; run make test-browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="session")
def served(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server as a user starts it, without a key, that tests share."""
    server = start_server(tiny_bundle.path, tmp_path_factory.mktemp("browser") / "data")
    yield server
    server.stop()


@pytest.fixture
def open_page(browser: Any, served: Served) -> Iterator[OpenPage]:
    """``open_page(url, **options)``: a tab of a browser without a past. What its console says fails the test."""
    contexts: list[Any] = []
    troubles: list[str] = []

    def get(url: str = address(served), *, expected: tuple[str, ...] = (), **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
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
def page(open_page: OpenPage) -> Any:
    """The page, with its form."""
    page = open_page()
    page.wait_for_selector("#argument-num_frames")
    return page
