"""Formats of standard output: real programs in real pipes read them without options, frame by frame."""

from __future__ import annotations

import io
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from svd_trt.errors import ArgumentError, OutputError
from svd_trt.runtime.video import STREAMS, check_output, open_writer
from svd_trt.runtime.video._yuv import BT601, yuv420p, yuv444p
from tests.runtime.test_video import Frames, load_libav, moving

HEADED = [name for name in STREAMS if name != "raw"]
# Largest error in levels of 255; the 4:2:0 formats lose colours of single pixels.
WORST = {"y4m": 2, "mkv": 0}

WRITE = """
import sys
from fractions import Fraction
import numpy as np
from svd_trt.runtime.video import open_writer
frames = np.load(sys.argv[1])
height, width = frames.shape[1:3]
with open_writer("-", height=height, width=width, fps=Fraction(24000, 1001), metadata={"seed": 1},
                 stream=sys.argv[2]) as writer:
    for frame in frames:
        writer.write(frame[None])
        sys.stderr.write("written\\n")
        sys.stderr.flush()
        sys.stdin.readline()
    if sys.argv[3:]:
        raise KeyboardInterrupt
"""


def write(path: Path, frames: Frames, name: str, *more: str) -> subprocess.Popen[bytes]:
    np.save(path, frames)
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", WRITE, str(path), name, *more], stdin=pipe, stdout=pipe, stderr=pipe)


def written(folder: Path, frames: Frames, name: str) -> bytes:
    process = write(folder / "frames.npy", frames, name)
    output, errors = process.communicate(b"\n" * len(frames), timeout=60)
    assert process.returncode == 0, errors
    return output


@pytest.mark.parametrize("name", HEADED)
def test_decoders_need_no_options(tmp_path: Path, name: str) -> None:
    frames = moving(5)
    content = written(tmp_path, frames, name)
    with av.open(io.BytesIO(content)) as container:
        assert container.streams.video[0].average_rate == Fraction(24000, 1001)
    back = load_libav(io.BytesIO(content))
    assert back.shape == frames.shape
    difference = np.abs(back.astype(int) - frames)
    assert difference.mean() < 2
    if name in WORST:
        assert difference.max() <= WORST[name]


def test_lossless_streams_keep_noise(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 24, 40, 3), np.uint8)
    assert (load_libav(io.BytesIO(written(tmp_path, frames, "mkv"))) == frames).all()


@pytest.mark.parametrize("name", list(STREAMS))
def test_frames_leave_as_they_are_written(tmp_path: Path, name: str) -> None:
    """With frame 3 written and the process waiting, a reader has at least two frames, of which it can decode one."""
    frames = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), np.uint8)
    process = write(tmp_path / "frames.npy", frames, name)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    for _ in range(3):
        process.stderr.readline()
        process.stdin.write(b"\n")
        process.stdin.flush()
    process.stderr.readline()  # the fourth frame is written too
    got = process.stdout.read1(1 << 20)
    process.kill()
    process.communicate()
    assert len(got) > len(written(tmp_path, frames, name)) / 3


@pytest.mark.parametrize(("name", "convert", "colours"), [("y4m", yuv444p, b"C444"), ("y4m420", yuv420p, b"C420jpeg")])
def test_y4m_to_the_byte(tmp_path: Path, name: str, convert: object, colours: bytes) -> None:
    frames = moving(2, 24, 40)
    header = b"YUV4MPEG2 W40 H24 F24000:1001 Ip A1:1 " + colours + b" XCOLORRANGE=LIMITED\n"
    planes = [b"FRAME\n" + convert(frame, BT601).tobytes() for frame in frames]  # type: ignore[operator]
    assert written(tmp_path, frames, name) == header + b"".join(planes)


def test_full_colour_of_plain_pictures() -> None:
    """ITU-R BT.709: black, white and red in limited range."""
    frame = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0]]], np.uint8)
    assert yuv444p(frame).reshape(3, 3).T.tolist() == [[16, 128, 128], [235, 128, 128], [63, 102, 240]]


def test_the_reader_goes_away(tmp_path: Path) -> None:
    for name in STREAMS:
        process = write(tmp_path / "frames.npy", moving(40, 120, 160), name)
        assert process.stdout is not None
        process.stdout.close()
        _, errors = process.communicate(b"\n" * 40, timeout=60)
        assert process.returncode != 0
        assert b"the reader closed the pipe" in errors, name


def test_an_interrupted_stream_has_no_end(tmp_path: Path) -> None:
    """The index behind the last frame, which a reader would take for the end of a whole, short video."""
    frames = moving(5)
    assert b"mfra" in written(tmp_path, frames, "mp4")
    process = write(tmp_path / "frames.npy", frames, "mp4", "interrupt")
    output, errors = process.communicate(b"\n" * len(frames), timeout=60)
    assert b"KeyboardInterrupt" in errors
    assert b"moof" in output
    assert b"mfra" not in output


def test_unknown_names_and_odd_sizes() -> None:
    with pytest.raises(ArgumentError, match="choose one of raw, y4m"):
        check_output("-", "avi")
    for name in ("y4m420", "mp4"):
        with pytest.raises((ArgumentError, OutputError), match="even height and width"):
            open_writer("-", height=23, width=40, fps=7, metadata={}, stream=name)
