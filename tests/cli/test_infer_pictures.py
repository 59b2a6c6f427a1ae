"""``svd-trt infer``: where pictures come from, how they are fitted, and what is said about them."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from svd_trt import VideoPipeline
from svd_trt.runtime.video import read_metadata
from tests.cli.conftest import Run, assert_refused, invoke
from tests.runtime import icc_profiles

FAST = ("--num-inference-steps", "1", "--num-frames", "2", "--seed", "7")


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture with the shape of the frames, about which nothing is said."""
    path = tmp_path_factory.mktemp("square") / "a square ü.png"
    rng = np.random.default_rng(0)
    PIL.Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def expected(small_bundle: Path, square: Path) -> np.ndarray:
    with VideoPipeline.open(small_bundle) as pipe:
        return pipe(square, num_inference_steps=1, num_frames=2, seed=7, output_type="np").frames[0]


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def test_urls_and_standard_input(
    run: Run, small_bundle: Path, square: Path, tmp_path: Path, expected: np.ndarray
) -> None:
    for image in (data_url(square), square.as_uri()):
        out = tmp_path / "o.npy"
        result = invoke("infer", small_bundle, image, "-o", out, *FAST, "--json")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["notes"] == []
        np.testing.assert_array_equal(np.load(out), expected)
    with square.open("rb") as file:  # also with the video on standard output
        raw = run("infer", small_bundle, "-", "-o", "-", *FAST, text=False, stdin=file)
    np.testing.assert_array_equal(np.frombuffer(raw.stdout, np.uint8).reshape(expected.shape), expected)


def test_several_kinds_of_pictures_in_one_command(run: Run, small_bundle: Path, square: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.npy"
    with VideoPipeline.open(small_bundle) as pipe:
        expected = pipe([square] * 3, num_inference_steps=1, num_frames=2, seed=7, output_type="np").frames
    with square.open("rb") as file:
        result = run("infer", small_bundle, square.as_uri(), "-", data_url(square), "-o", out, *FAST, stdin=file)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o-0.npy", "o-1.npy", "o-2.npy"]
    for index in range(3):
        np.testing.assert_array_equal(np.load(tmp_path / f"o-{index}.npy"), expected[index])


def test_standard_input_without_a_picture(run: Run, small_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.npy"
    empty = run("infer", small_bundle, "-", "-o", out, *FAST, "-q", stdin=subprocess.DEVNULL)
    assert_refused(empty, "the picture from standard input", "not a picture")
    assert_refused(invoke("infer", small_bundle, "-", "-", "-o", out, *FAST), "read once", code=2)
    closed = subprocess.run(
        ["sh", "-c", f'exec "{sys.executable}" -m svd_trt.cli infer {small_bundle} - -o {out} <&-'],
        capture_output=True,
        text=True,
    )
    assert_refused(closed, "< picture.png", code=2)
    assert list(tmp_path.iterdir()) == []


def test_inputs_that_are_urls_are_safe_from_outputs(small_bundle: Path, square: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine ü.gif"
    mine.write_bytes(square.read_bytes())
    assert_refused(invoke("infer", small_bundle, mine.as_uri(), "-o", mine, *FAST), "also an input")
    profile = ("--profile", mine)
    assert_refused(invoke("infer", small_bundle, mine.as_uri(), "-o", tmp_path / "o.gif", *profile), "also an input")
    assert mine.read_bytes() == square.read_bytes()


@pytest.mark.parametrize(
    ("image", "word"),
    [
        ("data:image/png;base64," + "A" * 100_000, "not a picture"),
        ("data:image/png;base64,====" + "$" * 100_000, "damaged"),
        ("x" * 4000, "too long"),
        ("/".join(["folder"] * 500), "no such file"),
        ("https://example.com/" + "a" * 4000, "download"),
        ("file://server/" + "a" * 4000, "another machine"),
        ("file:///" + "a" * 4000 + "%00b.png", "no file has %00 in its name"),
        ("\x1b[31mred\x07", "no such file"),
        ("\udcff\udcfe.png", "no such file"),
    ],
)
def test_long_and_binary_arguments_are_echoed_in_one_short_line(
    image: str, word: str, small_bundle: Path, tmp_path: Path
) -> None:
    result = invoke("infer", small_bundle, image, "-o", tmp_path / "o.gif", *FAST, "-q")
    assert_refused(result, word)
    assert len(result.stderr) < 500
    assert "\x1b" not in result.stderr


def test_long_outputs_and_bundles_are_shortened_too(small_bundle: Path, square: Path) -> None:
    for arguments in (
        ("infer", small_bundle, square, "-o", "o" * 4000 + ".gif"),
        ("infer", small_bundle, square, "-o", "o." + "g" * 4000),
        ("infer", "b" * 4000, square, "-o", "o.gif"),
        ("infer", small_bundle, square, "-o", "o.gif", "--device", "d" * 4000),
    ):
        result = invoke(*arguments)
        assert_refused(result, "4,0")
        assert len(result.stderr) < 700


def test_a_stretched_picture_is_said_once(small_bundle: Path, picture_file: Path, square: Path, tmp_path: Path) -> None:
    asked = ("infer", small_bundle, square, picture_file, "-o", tmp_path / "o.gif", *FAST)
    result = invoke(*asked, "--json")
    assert result.returncode == 0, result.stderr
    (note,) = json.loads(result.stdout)["notes"]
    assert "picture.png' of 192x144 pixels is stretched to 32x32" in note
    assert "--resize-mode" in note
    assert result.stderr.count("is stretched") == 1
    assert note in result.stderr
    assert invoke(*asked, "-q").stderr == ""
    assert "is stretched" not in invoke(*asked, "--resize-mode", "stretch").stderr


def test_nothing_is_said_before_an_error(small_bundle: Path, picture_file: Path, tmp_path: Path) -> None:
    result = invoke("infer", small_bundle, picture_file, "-o", tmp_path / "o.gif", *FAST, "--vram-budget", "1MB")
    assert_refused(result, "smallest budget")


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_resize_modes(mode: str, small_bundle: Path, picture: PIL.Image.Image, tmp_path: Path) -> None:
    """The video is that of the picture cropped or padded before; the file says how it was made."""
    fitted = picture.crop((24, 0, 168, 144)) if mode == "crop" else PIL.Image.new("RGB", (192, 192), "orange")
    if mode == "pad":
        fitted.paste(picture, (0, 24))
    with VideoPipeline.open(small_bundle) as pipe:
        expected = pipe(fitted, num_inference_steps=1, num_frames=2, seed=7, output_type="np").frames[0]
    picture.save(tmp_path / "picture.png")
    options = ("--resize-mode", mode, "--background", "orange")
    for out in (tmp_path / "o.npy", tmp_path / "o.mp4"):
        result = invoke("infer", small_bundle, tmp_path / "picture.png", "-o", out, *FAST, *options)
        assert result.returncode == 0, result.stderr
        assert "stretched" not in result.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), expected)
    metadata = read_metadata(tmp_path / "o.mp4")
    assert (metadata["resize_mode"], metadata["background"], metadata["icc"]) == (mode, "orange", "ignore")


def test_colours_are_said_and_converted(small_bundle: Path, square: Path, tmp_path: Path) -> None:
    profile = icc_profiles.rgb_profile("Display P3", icc_profiles.DISPLAY_P3)
    with PIL.Image.open(square) as image:
        image.save(tmp_path / "p3.png", icc_profile=profile)
    asked = ("infer", small_bundle, tmp_path / "p3.png", *FAST)
    ignored = invoke(*asked, "-o", tmp_path / "ignored.npy")
    assert "Display P3" in ignored.stderr
    assert "--icc convert" in ignored.stderr
    converted = invoke(*asked, "-o", tmp_path / "converted.npy", "--icc", "convert")
    assert "Display P3" not in converted.stderr
    assert not np.array_equal(np.load(tmp_path / "ignored.npy"), np.load(tmp_path / "converted.npy"))
