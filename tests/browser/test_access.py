"""The page with the keyboard alone, on a phone, for screen readers, in both colour schemes; and what it loads."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import OpenPage, Served, address, until
from tests.browser.test_page import DONE, choose, in_front, make

pytestmark = [pytest.mark.slow, pytest.mark.browser]


def wait_for(page: Any, happened: Callable[[], bool]) -> None:
    """Let the browser report until something has happened."""
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        page.wait_for_timeout(20)


def focus_on(page: Any, selector: str) -> None:
    """Press Tab until the focus is on an element."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"Tab does not reach {selector}")


def test_the_keyboard_makes_a_video(page: Any, picture_file: Path) -> None:
    choosers: list[Any] = []
    # From the start, because Chromium may open the dialog of a key before it hears that it should not.
    page.on("filechooser", lambda chooser: choosers.append(chooser))
    page.wait_for_selector("#argument-num_frames")
    focus_on(page, "#choose")
    page.keyboard.press("Enter")
    wait_for(page, lambda: bool(choosers))
    choosers[0].set_files(str(picture_file))
    page.wait_for_selector("#canvas:not([hidden])")
    focus_on(page, "[name=resize_mode]")
    page.keyboard.press("ArrowRight")
    assert "cropped" in page.inner_text("#state small")
    focus_on(page, "[name=quality]")
    page.keyboard.press("ArrowLeft")
    assert page.is_checked("[name=quality][value=draft]")
    focus_on(page, "#argument-num_frames")
    page.keyboard.type("4")
    focus_on(page, "#argument-seed")
    page.keyboard.type("7")
    page.keyboard.press("Enter")
    page.wait_for_selector(DONE)
    assert "seed 7" in page.inner_text("#state small")
    page.evaluate("document.activeElement.blur()")
    focus_on(page, "[aria-label='Download as WebM']")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.suggested_filename == "picture-7.webm"
    focus_on(page, ".card")
    page.keyboard.press("Enter")
    assert page.inner_text("#state b") == "picture.png"


def test_a_phone_shows_everything_in_its_width(open_page: OpenPage, picture_file: Path) -> None:
    page = open_page(viewport={"width": 375, "height": 720}, has_touch=True, is_mobile=True)
    page.wait_for_selector("#argument-num_frames")

    def fits() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        outside = """[...document.querySelectorAll('main *')].filter((node) => {
          const box = node.getBoundingClientRect();
          return node.checkVisibility() && !node.closest('#strip, .hidden, .segments') && box.width > 1
            && (box.left < 0 || box.right > 375);
        }).map((node) => node.outerHTML.slice(0, 80))"""
        assert page.evaluate(outside) == []
        small = """[...document.querySelectorAll('button, select, summary, input[type=text], input[type=range]')]
          .filter((node) => node.checkVisibility({ visibilityProperty: true }))
          .filter((node) => node.getBoundingClientRect().height < 28)
          .map((node) => node.outerHTML)"""
        assert page.evaluate(small) == []

    fits()
    page.tap("summary")
    fits()
    page.tap("summary")
    choose(page, picture_file)
    fits()
    page.fill("#argument-num_frames", "99")
    page.tap("#make")
    until(page, "document.activeElement.id === 'argument-num_frames'")
    assert in_front(page, "argument-num_frames-error")
    fits()
    page.fill("#argument-num_frames", "")
    page.tap("#make")
    page.wait_for_selector(DONE)
    fits()
    # The video is what the page scrolls to.
    until(page, "stage.getBoundingClientRect().top > -2 && stage.getBoundingClientRect().top < 360")


def test_everything_has_a_name(page: Any, picture_file: Path) -> None:
    """Chromium's accessibility tree has a name for all that can have the focus."""
    choose(page, picture_file)
    page.click("summary")
    make(page, num_inference_steps=1, num_frames=2)
    page.wait_for_selector(DONE)
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    focusable = [
        node
        for node in tree
        if not node["ignored"]
        and node["role"]["value"] not in ("RootWebArea", "scrollable")
        and any(p["name"] == "focusable" and p["value"]["value"] for p in node.get("properties", ()))
    ]
    names = {node["name"]["value"] for node in focusable}
    assert {"num_frames", "num_frames, slider", "Roll a seed", "Make the video", "Download as MP4", "Frames"} <= names
    nameless = [
        node["role"]["value"]
        for node in focusable
        if not node["name"]["value"] and node["role"]["value"] != "paragraph"
    ]
    assert nameless == []


def test_what_changes_is_said(page: Any, picture_file: Path) -> None:
    page.evaluate(
        """() => {
          window.heard = [];
          new MutationObserver(() => heard.push(said.textContent)).observe(said, { childList: true });
        }"""
    )
    assert page.get_attribute("#said", "role") == "status"
    choose(page, picture_file)
    make(page, num_inference_steps=40)
    page.wait_for_selector(DONE)
    heard = page.evaluate("heard")
    assert heard[0] == "Picture picture.png chosen."
    assert heard[-1] == "Done"
    assert "Denoising" in heard
    assert len(heard) < 9, "not every step is read out"


def test_colours_follow_the_system_and_can_be_read(open_page: OpenPage, picture_file: Path) -> None:
    """Text has the contrast of WCAG AA, 4.5 to 1, in both schemes."""
    contrast = """() => {
      const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
      const light = (c) => c.slice(0, 3).map((v) => v / 255)
        .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      const under = (node) => {
        for (; node; node = node.parentElement) {
          const c = parts(getComputedStyle(node).backgroundColor);
          if (c.length < 4 || c[3] > 0) return c;
        }
      };
      return [...document.querySelectorAll("main *, header *")]
        .filter((n) => n.checkVisibility() && !n.closest(":disabled, canvas, .hidden"))
        .filter((n) => [...n.childNodes].some((c) => c.nodeType === 3 && c.data.trim()))
        .map((n) => [light(parts(getComputedStyle(n).color)), light(under(n)), n.textContent.slice(0, 40)])
        .map(([a, b, text]) => [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), text]);
    }"""
    backgrounds = set()
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        page.wait_for_selector("#argument-num_frames")
        choose(page, picture_file)
        make(page, num_frames=99)
        until(page, "document.getElementById('argument-num_frames-error').textContent !== ''")
        measured = page.evaluate(contrast)
        assert len(measured) > 20
        assert [one for one in measured if one[0] < 4.5] == []
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2


def test_nothing_comes_from_elsewhere(open_page: OpenPage, served: Served, picture_file: Path) -> None:
    """Every request of a whole session goes to the server, and its policy forbids others."""
    page = open_page("about:blank", expected=("Connecting to 'https://example.com/'", "Fetch API cannot load"))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    answer = page.goto(address(served))
    page.wait_for_selector("#argument-num_frames")
    choose(page, picture_file)
    make(page, num_inference_steps=1, num_frames=2)
    page.wait_for_selector(DONE)
    assert {url.split("/")[0] for url in asked if not url.startswith(address(served))} <= {"data:image", "blob:http:"}
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    refused = page.evaluate(
        """() => new Promise((done) => {
          document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
          fetch("https://example.com/").catch(() => {});
        })"""
    )
    assert refused == "connect-src"


def test_nothing_moves_for_those_who_asked_for_that(open_page: OpenPage, picture_file: Path) -> None:
    page = open_page(reduced_motion="reduce")
    page.wait_for_selector("#argument-num_frames")
    choose(page, picture_file)
    make(page, num_inference_steps=1, num_frames=2)
    page.wait_for_selector(DONE)
    until(page, "video.readyState > 1")
    assert page.evaluate("video.paused")
