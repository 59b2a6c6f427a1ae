"""The page with several models, and with pictures that the browser cannot show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from svd_trt import Bundle
from tests.browser.conftest import OpenPage, Served, address, until
from tests.browser.test_page import DONE, choose, identifier, make
from tests.serve.conftest import start_server

pytestmark = [pytest.mark.slow, pytest.mark.browser]


@pytest.fixture
def two(tiny_bundle: Bundle, small_bundle: Path, tmp_path: Path) -> Iterator[Served]:
    """A server of two models: 2 to 8 frames, and 2 to 6."""
    links = [tmp_path / "first", tmp_path / "second"]
    for link, bundle in zip(links, (tiny_bundle.path, small_bundle), strict=True):
        link.symlink_to(bundle)
    server = start_server(links[0], tmp_path / "data", str(links[1]))
    yield server
    server.stop()


def test_one_of_several_models_is_chosen(open_page: OpenPage, two: Served, picture_file: Path) -> None:
    page = open_page(address(two))
    page.wait_for_selector("#argument-num_frames")
    model = page.get_by_label("model", exact=True)
    assert model.locator("option").all_inner_texts() == ["first", "second"]
    assert model.input_value() == "first"
    slider = page.get_by_label("num_frames, slider")
    assert (slider.get_attribute("max"), page.get_attribute("#argument-num_frames", "placeholder")) == ("8", "8")
    page.fill("#argument-num_frames", "7")
    page.fill("#argument-seed", "4")
    choose(page, picture_file)
    model.select_option("second")
    assert (slider.get_attribute("max"), page.get_attribute("#argument-num_frames", "placeholder")) == ("6", "3")
    # What was filled in stays, and the server says what is wrong with it.
    page.click("#make")
    until(page, "document.getElementById('argument-num_frames-error').textContent !== ''")
    assert "num_frames 7 is outside what this bundle was built for (2 to 6)" in page.inner_text(
        "#argument-num_frames-error"
    )
    make(page, num_frames=2, num_inference_steps=1)
    page.wait_for_selector(DONE)
    job = two.job(identifier(page))
    assert (job["model"], job["arguments"]["seed"], job["arguments"]["num_frames"]) == ("second", 4, 2)
    # Its arguments are for its model.
    model.select_option("first")
    page.locator(".card", has_text="Done").click()
    page.get_by_role("button", name="Use these arguments").click()
    assert model.input_value() == "second"
    assert slider.get_attribute("max") == "6"


def test_a_picture_that_chromium_cannot_show_is_sent(
    page: Any, served: Served, picture: PIL.Image.Image, picture_file: Path, tmp_path: Path
) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    file = tmp_path / "phone.heic"
    pillow_heif.from_pillow(picture.resize((48, 48))).save(file)
    page.set_input_files("#file", str(file))
    page.wait_for_selector("text=This browser cannot show this picture.")
    assert page.inner_text("#state b") == "phone.heic"
    assert "sent as it is, and the server says if it cannot read it" in page.inner_text("#state small")
    assert page.inner_text("#empty strong") == "No preview"
    assert page.is_hidden("#canvas")
    assert page.is_hidden("#choose")
    page.get_by_text("crop", exact=True).click()
    make(page, num_inference_steps=1, num_frames=2)
    page.wait_for_selector(DONE)
    job = served.job(identifier(page))
    assert (job["status"], job["arguments"]["resize_mode"]) == ("completed", "crop")
    assert page.locator("#strip img").count() == 2
    # A picture that it can show takes the place of it.
    choose(page, picture_file)
    assert page.is_hidden("#empty")
