"""Several tabs at one server, and a server that fails for a while: nothing waits for ever, and nothing is lost."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import OpenPage, Served, address, until
from tests.browser.test_page import DONE, choose, identifier, make
from tests.serve.conftest import Start, error_of

pytestmark = [pytest.mark.slow, pytest.mark.browser]

CANCEL = "#actions button:text-is('Cancel')"


@pytest.fixture
def busy(start: Start, picture_file: Path) -> Iterator[Served]:
    """A server that makes a long video; what others send waits until that is cancelled."""
    server = start()
    job = server.accepted(picture_file.read_bytes(), num_inference_steps=100, extend=200)["id"]
    server.wait(job, "in_progress")
    yield server
    for one in server.client.get("/v1/videos", params={"limit": 100}).json()["data"]:
        if one["status"] in ("queued", "in_progress"):
            server.client.delete(f"/v1/videos/{one['id']}")


def another(page: Any, url: str) -> Any:
    """One more tab of the same browser, with the page."""
    tab = page.context.new_page()
    tab.set_default_timeout(20_000)
    tab.goto(url, timeout=20_000)
    tab.wait_for_selector("#argument-num_frames")
    return tab


def hide(page: Any, hidden: bool) -> None:
    """Tell the page that its tab is hidden, or shown again; tabs of a Chromium without a screen are never hidden."""
    page.evaluate(
        """(hidden) => {
          Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
          document.dispatchEvent(new Event("visibilitychange"));
        }""",
        hidden,
    )


def test_many_tabs_leave_connections_for_new_ones_and_for_cancelling(
    open_page: OpenPage, busy: Served, picture_file: Path
) -> None:
    """A browser has six connections to a server, for all of its tabs."""
    first = open_page(address(busy))
    tabs = [first, *(another(first, address(busy)) for _ in range(6))]
    for tab in tabs:
        choose(tab, picture_file)
        make(tab, num_inference_steps=2, num_frames=2)
        tab.wait_for_selector("#state :text('Waiting')")
    until(first, "stream?.open")
    assert [tab.evaluate("!!stream?.open") for tab in tabs].count(True) <= 3
    another(first, address(busy))
    for tab in reversed(tabs):
        tab.click(CANCEL)
        tab.wait_for_selector("#state :text('Cancelled')", timeout=20_000)
        assert busy.job(identifier(tab))["status"] == "cancelled"


def test_a_hidden_tab_asks_from_time_to_time_and_has_no_stream(
    open_page: OpenPage, busy: Served, picture_file: Path
) -> None:
    page = open_page(address(busy))
    page.wait_for_selector("#argument-num_frames")
    choose(page, picture_file)
    make(page, num_inference_steps=2, num_frames=2)
    until(page, "stream?.open")
    hide(page, True)
    until(page, "stream === null")
    with page.expect_response(lambda answer: answer.url.endswith(f"/v1/videos/{identifier(page)}")):
        pass
    busy.client.delete(f"/v1/videos/{identifier(page)}")
    page.wait_for_selector("#state :text('Cancelled')")
    make(page, num_inference_steps=2, num_frames=2)
    page.wait_for_selector("#state :text('Waiting')")
    assert page.evaluate("stream") is None
    hide(page, False)
    until(page, "stream?.open", 5)


def test_without_locks_the_window_with_the_focus_has_the_stream(
    open_page: OpenPage, start: Start, picture_file: Path
) -> None:
    """Browsers have no locks between tabs at an address that is neither of this machine nor of HTTPS."""
    server = start("--host", "0.0.0.0")
    long = server.accepted(picture_file.read_bytes(), num_inference_steps=100, extend=200)["id"]
    url = address(server).replace("localhost", "0.0.0.0")
    first = open_page(url)
    tabs = [first, *(another(first, url) for _ in range(6))]
    assert not first.evaluate("'locks' in navigator")
    for tab in tabs:
        tab.context.new_cdp_session(tab).send("Emulation.setFocusEmulationEnabled", {"enabled": False})
    for tab in tabs:
        tab.bring_to_front()
        choose(tab, picture_file)
        make(tab, num_inference_steps=2, num_frames=2)
        until(tab, "stream?.open", 20)
    assert [tab.evaluate("!!stream?.open") for tab in tabs] == [False] * 6 + [True]
    another(first, url)
    first.bring_to_front()
    until(first, "stream?.open", 20)
    first.click(CANCEL)
    first.wait_for_selector("#state :text('Cancelled')")
    server.client.delete(f"/v1/videos/{long}")


def test_a_stream_that_does_not_open_is_given_up_and_replaced_by_questions(
    open_page: OpenPage, busy: Served, picture_file: Path
) -> None:
    page = open_page(address(busy))
    page.wait_for_selector("#argument-num_frames")
    page.route("**/events", lambda route: None)  # neither an answer nor an error
    choose(page, picture_file)
    make(page, num_inference_steps=2, num_frames=2)
    until(page, "stream")
    until(page, "stream === null")
    page.wait_for_selector("#state :text('Waiting')")
    busy.client.delete(f"/v1/videos/{identifier(page)}")
    page.wait_for_selector("#state :text('Cancelled')")


def test_a_video_that_could_not_be_loaded_is_tried_again(page: Any, served: Served, picture_file: Path) -> None:
    page.route("**/content?*", lambda route: route.abort("connectionrefused"))
    choose(page, picture_file)
    make(page, num_inference_steps=1, num_frames=2)
    again = page.get_by_role("button", name="Try again", exact=True)
    again.wait_for()
    assert "does not answer" in page.inner_text("#state small")
    again.click()
    page.wait_for_timeout(300)
    assert again.is_visible()
    page.unroute("**/content?*")
    again.click()
    page.wait_for_selector(DONE)
    until(page, "video.videoWidth === 32")
    assert "does not answer" not in page.inner_text("#state small")
    assert not again.is_visible()


def test_a_video_that_is_gone_is_not_asked_for_again(page: Any, served: Served, picture_file: Path) -> None:
    page.route("**/content?*", lambda route: route.abort("connectionrefused"))
    choose(page, picture_file)
    make(page, num_inference_steps=1, num_frames=2)
    again = page.get_by_role("button", name="Try again", exact=True)
    again.wait_for()
    page.unroute("**/content?*")
    served.client.delete(f"/v1/videos/{identifier(page)}").raise_for_status()
    again.click()
    page.wait_for_selector("#state :text('there is no video of this id')")
    assert not again.is_visible()
    assert page.get_by_role("button", name="Download as MP4").count() == 0
    page.get_by_role("button", name="Remove").click()
    assert page.is_hidden("#gallery")


def test_videos_stay_in_the_session_while_the_server_does_not_answer(
    page: Any, served: Served, picture_file: Path
) -> None:
    """The page is loaded again while requests for two of three videos fail, and another video is made meanwhile."""
    choose(page, picture_file)
    for _ in range(3):
        make(page, num_inference_steps=1, num_frames=2)
        page.wait_for_selector(DONE)
    newest, middle, oldest = [identifier(page, index) for index in range(3)]
    served.client.delete(f"/v1/videos/{oldest}").raise_for_status()
    page.route(f"**/v1/videos/{newest}", lambda route: route.abort("connectionrefused"))
    page.route(f"**/v1/videos/{middle}", lambda route: route.fulfill(status=502, body="Bad Gateway"))
    page.reload()
    page.wait_for_selector("#lost:not([hidden])")
    told = page.inner_text("#lost-why")
    assert told.startswith("2 videos of this session cannot be shown yet. ")
    choose(page, picture_file)
    make(page, num_inference_steps=1, num_frames=2)
    page.wait_for_selector(DONE)
    added = identifier(page)
    assert sorted(json.loads(page.evaluate("sessionStorage.getItem('svd-trt')"))) == sorted([added, newest, middle])
    page.unroute(f"**/v1/videos/{middle}")
    page.wait_for_selector("#lost-why:text('A video of this session cannot be shown yet.')")
    assert "does not answer" in page.inner_text("#lost-why")
    page.unroute(f"**/v1/videos/{newest}")
    page.locator("#again:enabled").click()
    page.wait_for_selector("#lost", state="hidden")
    assert page.evaluate("jobs.map((entry) => entry.job.id)") == [added, newest, middle]
    assert json.loads(page.evaluate("sessionStorage.getItem('svd-trt')")) == [added, newest, middle]


def test_a_wrong_key_is_called_wrong(open_page: OpenPage, start: Start) -> None:
    """In the server's words, which are others than those for a key that is missing."""
    server = start(SVD_TRT_API_KEY="open sesame")
    page = open_page(address(server))
    page.wait_for_selector("#lock[open]")
    assert page.inner_text("#lock-why") == ""
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    until(page, "document.getElementById('lock-why').textContent !== ''")
    server.client.headers["Authorization"] = "Bearer wrong"
    told = page.inner_text("#lock-why")
    assert told == error_of(server.client.get("/v1/models"), 401, "unauthorized")["message"]
    assert told.startswith("the key is wrong")


def test_a_video_goes_on_after_the_key_was_changed(open_page: OpenPage, start: Start, picture_file: Path) -> None:
    server = start(SVD_TRT_API_KEY="old")
    page = open_page(address(server))
    page.wait_for_selector("#lock[open]")
    page.get_by_label("API key").fill("old")
    page.keyboard.press("Enter")
    page.wait_for_selector("#argument-num_frames")
    choose(page, picture_file)
    make(page, num_inference_steps=100)
    page.wait_for_selector("#state :text('Denoising')")
    server.stop(signal.SIGKILL)
    start("--port", str(server.client.base_url.port), SVD_TRT_API_KEY="new")
    page.wait_for_selector("#lock[open]")
    page.get_by_role("button", name="Cancel", exact=True).last.click()
    page.get_by_role("button", name="Try again", exact=True).click()
    page.get_by_label("API key").fill("new")
    page.keyboard.press("Enter")
    page.wait_for_selector(DONE)
