"""Making a video by hand: upload, progress, frames, playback, download, errors, cancel."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from tests.browser.conftest import OpenPage, Served, address, until
from tests.serve.conftest import Start, error_of

pytestmark = [pytest.mark.slow, pytest.mark.browser]

DONE = "#video:not([hidden])"

# Notes what the page shows, 100 times a second.
WATCH = """() => {
  window.seen = [];
  setInterval(() => {
    const shown = {
      state: document.querySelector("#state b")?.textContent ?? "",
      detail: document.querySelector("#state small")?.textContent ?? "",
      progress: document.querySelector("#progress").hidden ? null : document.querySelector("#progress").value,
      frames: document.querySelectorAll("#strip img").length,
      title: document.title,
    };
    if (JSON.stringify(shown) !== JSON.stringify(window.seen.at(-1))) window.seen.push(shown);
  }, 10);
}"""


def choose(page: Any, picture: Path) -> None:
    page.set_input_files("#file", str(picture))
    page.wait_for_selector("#canvas:not([hidden])")


def make(page: Any, **arguments: object) -> None:
    for name, value in arguments.items():
        page.fill(f"#argument-{name}", str(value))
    page.click("#make")


def identifier(page: Any, index: int = 0) -> str:
    """The id of a job of this session, the newest first."""
    return str(json.loads(page.evaluate("sessionStorage.getItem('svd-trt')"))[index])


def pixels(page: Any) -> list[int]:
    return list(page.evaluate("[...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"))


def in_front(page: Any, name: str) -> bool:
    """Whether the middle of an element can be seen: it is in the window, and nothing covers it."""
    middle = """(name) => {
      const node = document.getElementById(name), box = node.getBoundingClientRect();
      return node.contains(document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2));
    }"""
    return bool(page.evaluate(middle, name))


def refusal(served: Served, picture: bytes, **fields: str) -> dict[str, Any]:
    """What the server says of a request, without the page."""
    return error_of(served.post(picture, **fields), 400, "invalid_request")


def test_a_picture_becomes_a_video(page: Any, served: Served, picture_file: Path) -> None:
    """Steps are counted, frames appear before the end, the video plays in a loop, and it can be downloaded."""
    choose(page, picture_file)
    page.evaluate(WATCH)
    make(page, num_inference_steps=60)
    page.wait_for_selector(DONE)
    until(page, "video.currentTime > 0.2")
    seen = page.evaluate("seen")
    running = [one for one in seen if one["progress"] is not None]
    shares = [one["progress"] for one in running]
    assert shares == sorted(shares)
    assert len(set(shares)) > 10
    assert {"Denoising", "Decoding frames"} <= {one["state"] for one in running}
    details = [one["detail"] for one in running]
    assert any("of 60" in text for text in details)
    assert any("left" in text for text in details)
    assert any(0 < int(one["title"].split()[0]) < 100 for one in running)
    assert any(one["frames"] > 0 for one in running), "frames come before the video is complete"
    assert page.locator("#strip img").count() == 8
    assert page.evaluate("[video.loop, video.paused, video.videoWidth, video.videoHeight]") == [True, False, 32, 32]
    assert page.evaluate("video.duration") == pytest.approx(8 / 7, abs=0.05)
    assert page.inner_text("#state b") == "Done"
    for name, mark in (("MP4", b"ftyp"), ("WebM", b"\x1a\x45\xdf\xa3"), ("WebP", b"RIFF")):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Download as {name}").click()
        content = Path(download.value.path()).read_bytes()
        assert mark in content[:12]
        assert download.value.suggested_filename.startswith("picture-")
        assert download.value.suggested_filename.endswith("." + name.lower())
    with PIL.Image.open(io.BytesIO(content)) as webp:
        assert webp.n_frames == 8


@pytest.mark.parametrize("mode", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("shape", [(192, 144), (90, 201)])
def test_the_picture_is_shown_as_the_model_gets_it(
    page: Any, picture: PIL.Image.Image, tmp_path: Path, mode: Any, shape: tuple[int, int]
) -> None:
    from svd_trt.runtime.framing import framed

    shaped = picture.resize(shape)
    shaped.save(tmp_path / "picture.png")
    choose(page, tmp_path / "picture.png")
    page.get_by_text(mode, exact=True).click()
    page.wait_for_timeout(100)
    fitted = framed(shaped, 32, 32, mode, background=None, name="", warn=str)
    expected = fitted.resize((32, 32), PIL.Image.Resampling.BOX).convert("RGBA").tobytes()
    shown = pixels(page)
    assert len(shown) == len(expected)
    # Chromium's filter is another one; pictures that are fitted otherwise differ by 25 levels and more.
    assert sum(abs(a - b) for a, b in zip(shown, expected, strict=True)) / len(expected) < 6


def test_bars_and_transparency_have_the_background(page: Any, tmp_path: Path) -> None:
    PIL.Image.new("RGBA", (64, 32), (200, 0, 0, 128)).save(tmp_path / "clear.png")
    choose(page, tmp_path / "clear.png")
    assert "transparency is dropped" in page.inner_text("#state")
    assert pixels(page)[:4] == pytest.approx([200, 0, 0, 255], abs=2)
    page.get_by_text("pad", exact=True).click()
    page.click("summary")
    page.fill("#argument-background", "#0000ff")
    assert pixels(page)[:4] == [0, 0, 255, 255]
    middle = (16 * 32 + 16) * 4
    assert pixels(page)[middle : middle + 4] == pytest.approx([100, 0, 127, 255], abs=3)


@pytest.mark.parametrize(
    ("name", "value", "folded"),
    [
        ("num_frames", "99", False),
        ("fps", "fast", False),
        ("guidance_interval", "5", True),
        ("background", "bluish", True),
    ],
)
def test_an_error_is_in_the_servers_words_at_its_field(
    page: Any, served: Served, picture_file: Path, name: str, value: str, folded: bool
) -> None:
    expected = refusal(served, picture_file.read_bytes(), **{name: value})
    assert expected["field"] == name
    choose(page, picture_file)
    if folded:
        page.click("summary")
        page.fill(f"#argument-{name}", value)
        page.click("summary")
    else:
        page.fill(f"#argument-{name}", value)
    page.click("#make")
    field = page.locator(f"#argument-{name}")
    until(page, f"document.activeElement.id === 'argument-{name}'")
    assert page.inner_text(f"#argument-{name}-error") == expected["message"]
    assert field.get_attribute("aria-invalid") == "true"
    assert in_front(page, f"argument-{name}")
    assert in_front(page, f"argument-{name}-error")
    assert page.get_by_role("alert").filter(has_text=expected["message"]).count() == 1
    page.fill(f"#argument-{name}", "")
    assert page.inner_text(f"#argument-{name}-error") == ""
    assert page.is_enabled("#make")


def test_a_file_that_is_no_picture_is_refused_at_the_picture(page: Any, served: Served, tmp_path: Path) -> None:
    (tmp_path / "words.png").write_bytes(b"no picture" * 20)
    expected = refusal(served, b"no picture" * 20)
    page.set_input_files("#file", str(tmp_path / "words.png"))
    page.wait_for_selector("text=This browser cannot show this picture")
    page.click("#make")
    until(page, "trouble.textContent !== ''")
    assert page.inner_text("#trouble") == expected["message"]


def test_a_running_and_a_waiting_video_are_cancelled(page: Any, served: Served, picture_file: Path) -> None:
    choose(page, picture_file)
    make(page, num_inference_steps=100)
    page.wait_for_selector("#state :text('Denoising')")
    make(page, num_inference_steps=99)
    page.wait_for_selector("#state :text('Waiting')")
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.wait_for_selector("#state :text('Cancelled')")
    assert page.evaluate("document.activeElement.id") == "state"
    page.locator(".card", has_text="Denoising").click()
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.wait_for_selector("#state :text('Cancelled')")
    for index in (0, 1):
        assert served.job(identifier(page, index))["status"] == "cancelled"
    assert page.locator(".card", has_text="Cancelled").count() == 2


def test_the_same_arguments_make_the_same_video(page: Any, served: Served, picture_file: Path) -> None:
    choose(page, picture_file)
    page.get_by_text("crop", exact=True).click()
    make(page, num_inference_steps=3, num_frames=4, motion_bucket_id=200)
    page.wait_for_selector(DONE)
    first = served.job(identifier(page))
    page.reload()
    page.wait_for_selector(DONE)
    assert page.locator(".card").count() == 2
    choose(page, picture_file)
    page.locator(".card", has_text="Done").click()
    page.get_by_role("button", name="Use these arguments").click()
    assert page.input_value("#argument-seed") == str(first["arguments"]["seed"])
    assert page.input_value("#argument-fps") == "", "what is the default stays open"
    page.click("#make")
    until(page, "jobs.length === 2 && jobs[0].job.status === 'completed'")
    second = served.job(identifier(page))
    assert first["id"] != second["id"]
    assert first["arguments"] == second["arguments"]
    assert (first["arguments"]["resize_mode"], first["arguments"]["num_frames"]) == ("crop", 4)
    frames = []
    for job in (first, second):
        image = PIL.Image.open(io.BytesIO(served.content(job["id"], "webp")))
        frames.append([(image.seek(i), image.convert("RGB").tobytes())[1] for i in range(image.n_frames)])
    assert frames[0] == frames[1]


def test_a_video_is_removed_from_the_server(page: Any, served: Served, picture_file: Path) -> None:
    choose(page, picture_file)
    make(page, num_inference_steps=1, num_frames=2)
    page.wait_for_selector(DONE)
    job = identifier(page)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Remove").click()
    until(page, "jobs.length === 0")
    assert page.is_hidden("#gallery")
    assert served.client.get(f"/v1/videos/{job}").status_code == 404


def test_the_dice_and_the_sliders_fill_in_numbers(page: Any) -> None:
    page.get_by_role("button", name="Roll a seed").click()
    first = page.input_value("#argument-seed")
    page.get_by_role("button", name="Roll a seed").click()
    assert first.isdecimal()
    assert first != page.input_value("#argument-seed")
    slider = page.get_by_label("num_frames, slider")
    assert [slider.get_attribute(name) for name in ("min", "max")] == ["2", "8"]
    slider.press("ArrowLeft")
    assert page.input_value("#argument-num_frames") == "7"
    page.get_by_role("button", name="Set num_frames back to its default").click()
    assert page.input_value("#argument-num_frames") == ""
    assert slider.input_value() == "8"


def test_a_preset_changes_the_defaults(page: Any) -> None:
    assert page.get_attribute("#argument-num_inference_steps", "placeholder") == "25"
    page.get_by_text("draft", exact=True).click()
    assert page.get_attribute("#argument-num_inference_steps", "placeholder") == "5"
    page.get_by_text("default", exact=True).click()
    assert page.get_attribute("#argument-num_inference_steps", "placeholder") == "25"


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_pictures_are_dropped_and_pasted(page: Any, picture_file: Path, way: str) -> None:
    page.evaluate(
        """([bytes, way]) => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], "given.png", { type: "image/png" }));
          document.body.dispatchEvent(way === "drop"
            ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
            : new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }));
        }""",
        [list(picture_file.read_bytes()), way],
    )
    page.wait_for_selector("#canvas:not([hidden])")
    assert page.inner_text("#state b") == "given.png"
    assert "32, stretched" in page.inner_text("#state small")


def test_a_key_is_asked_for_and_kept_nowhere(open_page: OpenPage, start: Start, picture_file: Path) -> None:
    key = "open sesame"
    page = open_page(address(start(SVD_TRT_API_KEY=key)))
    page.wait_for_selector("#lock[open]")
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    until(page, "document.getElementById('lock-why').textContent !== ''")
    page.get_by_label("API key").fill(key)
    page.keyboard.press("Enter")
    page.wait_for_selector("#argument-num_frames")
    choose(page, picture_file)
    make(page, num_inference_steps=1, num_frames=2)
    page.wait_for_selector(DONE)
    until(page, "video.videoWidth === 32")
    assert key not in page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    page.reload()
    page.wait_for_selector("#lock[open]")
    page.get_by_role("button", name="Cancel").click()
    assert page.get_by_role("button", name="Try again").is_visible()


def test_a_video_goes_on_after_the_server_was_killed(open_page: OpenPage, start: Start, picture_file: Path) -> None:
    server = start()
    page = open_page(address(server))
    page.wait_for_selector("#argument-num_frames")
    choose(page, picture_file)
    make(page, num_inference_steps=100)
    page.wait_for_selector("#state :text('Denoising')")
    server.stop(signal.SIGKILL)
    page.wait_for_selector("#state :text('trying again'), #state :text('does not answer')")
    page.click("#make")
    until(page, "refused.textContent !== ''")
    assert "does not answer" in page.inner_text("#refused")
    assert page.is_enabled("#make")
    start("--port", str(server.client.base_url.port))
    page.wait_for_selector(DONE)
    assert page.locator("#strip img").count() == 8
    assert page.inner_text("#state b") == "Done"
