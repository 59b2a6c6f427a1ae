"""Every format is written, then read back by a decoder: frames, size, rate, colours, parameters."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import av
import imageio.v3 as iio
import numpy as np
import pytest
from av.video.reformatter import Interpolation
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from svd_trt.errors import ArgumentError, OutputError
from svd_trt.runtime.video import FORMATS, STREAMS, exact_rate, open_writer, read_metadata
from svd_trt.runtime.video._yuv import yuv420p

Frames = NDArray[np.uint8]

NAMES = ["out.mp4", "out.mov", "out.webm", "out.mkv", "out.gif", "out.webp", "out.apng", "out.npy", "out"]
LIBAV = [".mp4", ".mov", ".webm", ".mkv"]
LOSSLESS = dict.fromkeys(["out.mkv", "out.apng", "out.npy", "out"], 0.0)
WITH_PARAMETERS = [name for name in NAMES if name != "out.npy"]
RATES = [(7, Fraction(7)), (7.5, Fraction(15, 2)), (24, Fraction(24)), (30.0, Fraction(30))]
# Mean absolute error in levels of 255: a smooth picture survives well, except for the dither of 256 colours.
SMOOTH_ERROR = {"out.mp4": 2.0, "out.mov": 2.0, "out.webm": 2.5, "out.gif": 6.0, "out.webp": 3.0} | LOSSLESS
PLAIN_ERROR = {"out.mp4": 1.1, "out.mov": 1.1, "out.webm": 1.5, "out.gif": 0.0, "out.webp": 2.1} | LOSSLESS


def moving(count: int, height: int = 72, width: int = 136) -> Frames:
    """Smooth colours that drift, so that neither order nor orientation nor channels can be mixed up."""
    t, y, x = np.mgrid[0:count, 0:height, 0:width]
    red, green = x * 255 / width, y * 255 / height
    blue = 127 + 127 * np.sin((x + y) / 30 + t / 2)
    return np.stack([red, green, blue], -1).astype(np.uint8)


def save(
    path: Path | str,
    frames: Frames,
    *,
    fps: float | Fraction = 7,
    chunks: tuple[int, ...] = (),
    metadata: dict[str, object] | None = None,
) -> None:
    _, height, width, _ = frames.shape
    with open_writer(path, height=height, width=width, fps=fps, metadata=metadata or {}) as writer:
        for chunk in np.split(frames, chunks):
            writer.write(chunk)


def load(path: Path) -> Frames:
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]
    if path.is_dir():
        return np.stack([iio.imread(frame) for frame in sorted(path.iterdir())])
    if path.suffix in LIBAV:
        return load_libav(path)
    with Image.open(path) as picture:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)])


def load_libav(path: Path | BinaryIO) -> Frames:
    """Decoded as a careful player does: colours interpolated, results rounded."""
    careful = Interpolation.BICUBIC | Interpolation.ACCURATE_RND
    careful |= Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
    with av.open(str(path) if isinstance(path, Path) else path) as container:
        frames = [frame.to_ndarray(format="rgb24", interpolation=careful) for frame in container.decode(video=0)]
    return np.stack(frames).astype(np.uint8)


def error(a: Frames, b: Frames) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(72, 136), (24, 40)])
def test_reads_back(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    frames = moving(9, *size)
    save(tmp_path / name, frames, chunks=(4, 4, 5))  # 4, 0, 1 and 4 frames
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    back = load(tmp_path / name)
    assert back.shape == frames.shape
    assert error(back, frames) <= SMOOTH_ERROR[name]
    # Each frame is nearest to itself, so none is missing, doubled or out of order.
    assert [int(np.argmin([error(one, other) for other in frames])) for one in back] == list(range(9))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128), (200, 100, 50)])
def test_plain_colours(tmp_path: Path, name: str, colour: tuple[int, int, int]) -> None:
    frames = np.full((3, 24, 40, 3), colour, np.uint8)
    save(tmp_path / name, frames)
    back = load(tmp_path / name)
    assert back.shape == frames.shape, "equal frames must not be merged"
    assert np.abs(back.astype(int) - frames).mean((0, 1, 2)).max() <= PLAIN_ERROR[name]


@pytest.mark.parametrize("name", NAMES)
def test_single_frame(tmp_path: Path, name: str) -> None:
    frames = moving(1)
    save(tmp_path / name, frames)
    back = load(tmp_path / name)
    assert back.shape == frames.shape
    assert error(back, frames) <= SMOOTH_ERROR[name]


@pytest.mark.parametrize("name", NAMES)
def test_views_and_other_strides(tmp_path: Path, name: str) -> None:
    wide = moving(4, 24, 80)
    frames = wide[::-1, :, ::2]
    save(tmp_path / name, frames)
    assert error(load(tmp_path / name), frames) <= 2 * SMOOTH_ERROR[name]


@pytest.mark.parametrize(
    ("fps", "exact"),
    [
        *RATES,
        (23.976, Fraction(2997, 125)),
        (24000 / 1001, Fraction(24000, 1001)),
        (Fraction(30000, 1001), Fraction(30000, 1001)),
    ],
)
@pytest.mark.parametrize("count", [1, 14])
@pytest.mark.parametrize("name", ["out.mp4", "out.mov"])
def test_rate_is_exact(tmp_path: Path, name: str, fps: float | Fraction, exact: Fraction, count: int) -> None:
    save(tmp_path / name, moving(count, 24, 40), fps=fps)
    with av.open(str(tmp_path / name)) as container:
        stream = container.streams.video[0]
        times = [(frame.pts or 0) * (frame.time_base or 0) for frame in container.decode(stream)]
        assert stream.average_rate == stream.base_rate == exact
        assert stream.duration is not None
        assert stream.time_base is not None
        assert stream.duration * stream.time_base == count / exact
        assert times == [index / exact for index in range(count)]


def test_mp4_is_what_players_expect(tmp_path: Path) -> None:
    save(tmp_path / "out.mp4", moving(3))
    with av.open(str(tmp_path / "out.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)
        assert container.metadata["encoder"] == "svd-trt"
    data = (tmp_path / "out.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "the index comes first, to play while loading"


@pytest.mark.parametrize(
    ("colour", "expected"),  # ITU-R BT.709 colour bars, eight bits
    [
        ((255, 255, 255), (235, 128, 128)),
        ((0, 0, 0), (16, 128, 128)),
        ((255, 0, 0), (63, 102, 240)),
        ((0, 255, 0), (173, 42, 26)),
        ((0, 0, 255), (32, 240, 118)),
        ((255, 255, 0), (219, 16, 138)),
    ],
)
def test_colour_bars(colour: tuple[int, int, int], expected: tuple[int, int, int]) -> None:
    planes = yuv420p(np.full((4, 6, 3), colour, np.uint8))
    assert planes.shape == (6, 6)
    flat = planes.reshape(-1)
    for plane, value in zip((flat[:24], flat[24:30], flat[30:]), expected, strict=True):
        assert set(plane.tolist()) == {value}


def test_colour_samples_are_means_of_four() -> None:
    frame = moving(1, 8, 12)[0]
    samples = yuv420p(frame).reshape(-1)[96:].reshape(2, 4, 6)
    for y, x in np.ndindex(4, 6):
        red, green, blue = frame[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].reshape(4, 3).mean(0)
        luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        exact = 128 + np.array([(blue - luma) / 1.8556, (red - luma) / 1.5748]) * 224 / 255
        assert np.abs(samples[:, y, x] - exact).max() <= 0.501


def test_mp4_colours_stay_in_place(tmp_path: Path) -> None:
    """A wrongly placed colour sample tints a steep slope; so does one that is rounded down."""
    frames = moving(5, 24, 40)
    save(tmp_path / "out.mp4", frames)
    assert np.abs((load(tmp_path / "out.mp4").astype(int) - frames).mean((0, 1, 2))).max() < 0.6


def test_mp4_through_imageio(tmp_path: Path) -> None:
    frames = np.full((3, 24, 40, 3), (200, 100, 50), np.uint8)
    save(tmp_path / "out.mp4", frames, fps=7.5)
    back = iio.imread(tmp_path / "out.mp4", plugin="pyav")
    assert back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).max() <= 2
    assert iio.immeta(tmp_path / "out.mp4", plugin="pyav")["fps"] == 7.5


def test_mp4_needs_even_sizes(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="even"):
        open_writer(tmp_path / "out.mp4", height=25, width=40, fps=7, metadata={})


@pytest.mark.parametrize(("fps", "exact"), RATES)
@pytest.mark.parametrize(("name", "unit"), [("out.gif", 100), ("out.webp", 1000)])
def test_durations_do_not_drift(tmp_path: Path, fps: float, exact: Fraction, name: str, unit: int) -> None:
    save(tmp_path / name, moving(14, 24, 40), fps=fps)
    ends = [0]
    with Image.open(tmp_path / name) as picture:
        assert picture.info["loop"] == 0
        for index in range(14):
            picture.seek(index)
            picture.load()
            ends.append(ends[-1] + round(picture.info["duration"] * unit / 1000))
    assert all(abs(end - index * unit / exact) <= Fraction(1, 2) for index, end in enumerate(ends))
    assert max(b - a for a, b in pairwise(ends)) - min(b - a for a, b in pairwise(ends)) <= 1


def test_gif_for_another_decoder(tmp_path: Path) -> None:
    frames = moving(5)
    save(tmp_path / "out.gif", frames, metadata={"note": "x" * 1000})
    with av.open(str(tmp_path / "out.gif")) as container:
        assert json.loads(container.metadata["comment"]) == {"note": "x" * 1000}
        back = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(np.uint8)
    assert back.shape == frames.shape
    assert error(back, frames) <= SMOOTH_ERROR["out.gif"]


def test_npy_is_a_plain_array(tmp_path: Path) -> None:
    frames = moving(11, 8, 16)
    save(tmp_path / "out.npy", frames, chunks=(3,))
    back = np.load(tmp_path / "out.npy", mmap_mode="r")
    assert isinstance(back, np.memmap)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, frames)


def test_png_names(tmp_path: Path) -> None:
    save(f"{tmp_path}/a.folder/", moving(3, 8, 8))
    assert sorted(entry.name for entry in (tmp_path / "a.folder").iterdir()) == [
        f"frame_000{index}.png" for index in range(3)
    ]


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_parameters(tmp_path: Path, name: str) -> None:
    parameters: dict[str, object] = {
        "seed": 2**31 + 5,
        "fps": 7,
        "noise": 0.02,
        "image": "Zoë ☕.png",
        "none": None,
        "note": "n" * 999,
    }
    save(tmp_path / name, moving(2, 24, 40), metadata=parameters)
    assert read_metadata(tmp_path / name) == parameters


def test_parameters_of_one_png(tmp_path: Path) -> None:
    save(tmp_path / "out", moving(2, 8, 8), metadata={"seed": 1})
    assert read_metadata(tmp_path / "out" / "frame_0001.png") == {"seed": 1}


def test_parameters_of_a_name_like_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save("take:1.mp4", moving(1, 8, 8), metadata={"seed": 1})
    assert read_metadata("take:1.mp4") == {"seed": 1}


def test_parameters_from_numpy_are_plain(tmp_path: Path) -> None:
    save(tmp_path / "out.gif", moving(1, 8, 8), metadata={"steps": np.int64(25), "scale": np.float32(0.5)})
    assert read_metadata(tmp_path / "out.gif") == {"steps": 25, "scale": 0.5}


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}])
def test_parameters_must_be_json(tmp_path: Path, value: object) -> None:
    with pytest.raises(ArgumentError, match="JSON"):
        open_writer(tmp_path / "out.mp4", height=8, width=8, fps=7, metadata={"value": value})


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_no_parameters(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / f"plain{suffix}")
    with pytest.raises(OutputError, match="holds no parameters"):
        read_metadata(tmp_path / f"plain{suffix}")


@pytest.mark.parametrize("name", ["damaged.mp4", "damaged.gif", "damaged.webp", "damaged.png"])
def test_parameters_of_damaged_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no video at all")
    with pytest.raises(OutputError, match="cannot read"):
        read_metadata(tmp_path / name)


def test_parameters_of_a_file_that_claims_billions_of_pixels(tmp_path: Path) -> None:
    save(tmp_path / "out.webp", moving(1, 16, 16), metadata={"seed": 1})
    content = (tmp_path / "out.webp").read_bytes()
    at = content.index(b"VP8X") + 12
    (tmp_path / "out.webp").write_bytes(content[:at] + b"\xff" * 6 + content[at + 6 :])
    with pytest.raises(OutputError, match="cannot read"):
        read_metadata(tmp_path / "out.webp")


@pytest.mark.parametrize("name", ["missing.mp4", "missing.gif"])
def test_parameters_of_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="No such file"):
        read_metadata(tmp_path / name)


def test_parameters_of_an_array_or_empty_folder(tmp_path: Path) -> None:
    save(tmp_path / "out.npy", moving(1, 8, 8), metadata={"seed": 1})
    with pytest.raises(OutputError, match="holds no parameters"):
        read_metadata(tmp_path / "out.npy")
    with pytest.raises(OutputError, match="no frames"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("name", [".mp4", ".mov", ".webm", ".mkv", ".gif"])
@pytest.mark.parametrize(
    ("fps", "exact"),
    [
        (Fraction(23976000000001, 10**12), Fraction(2997, 125)),
        (Fraction(24 * 10**400 + 1, 10**400), Fraction(24)),
        (Fraction(999999999, 1000000), Fraction(999999999, 1000000)),
    ],
)
def test_fractions_that_libav_cannot_hold_are_rounded(
    fps: Fraction, exact: Fraction, name: str, tmp_path: Path
) -> None:
    assert exact_rate(fps) == exact
    save(tmp_path / f"out{name}", moving(2, 24, 40), fps=fps)
    assert len(load_libav(tmp_path / f"out{name}")) == 2


HUGE = Fraction(10**5000)  # Python writes no number of so many digits


@pytest.mark.parametrize("fps", [0, -7, float("nan"), float("inf"), 1e6, 10**400, HUGE, 1 / HUGE])
def test_rates_that_are_none(tmp_path: Path, fps: float | Fraction) -> None:
    with pytest.raises(ArgumentError, match=r"fps must be from 0\.01 to 1000, got"):
        open_writer(tmp_path / "out.mp4", height=8, width=8, fps=fps, metadata={})


def test_sizes_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="at least 1"):
        open_writer(tmp_path / "out.mp4", height=0, width=8, fps=7, metadata={})


def test_every_format_is_described() -> None:
    assert [Path(name).suffix for name in NAMES if name != "out"] == [key for key in FORMATS if key.startswith(".")]
    described = [*FORMATS.values(), *STREAMS.values()]
    assert all(entry.description and "\n" not in entry.description for entry in described)
