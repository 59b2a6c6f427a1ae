"""``svd_trt_cli``, the plain C example, and the tests that CTest runs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest

from svd_trt import VideoPipeline
from svd_trt.export.fidelity import draw_picture
from svd_trt.runtime.video._yuv import BT601, yuv444p
from tests.cpp.conftest import build

FAST = ["--num-inference-steps", "2", "--num-frames", "3", "--seed", "42"]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.ppm"
    draw_picture(60, 80).save(path)
    return path


@pytest.fixture(scope="module")
def expected(small_bundle: Path, picture: Path) -> npt.NDArray[np.int64]:
    with VideoPipeline.open(small_bundle) as pipe:
        frames = pipe.stream(picture, num_inference_steps=2, num_frames=3, seed=42)
        return np.stack(list(frames)).astype(np.int64)


def run(cpp: Path, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run([cpp / "svd_trt_cli", *arguments], capture_output=True, check=False)
    assert done.returncode == code, done.stderr.decode()
    return done


def test_raw_frames_on_standard_output(
    cpp: Path, small_bundle: Path, picture: Path, expected: npt.NDArray[np.int64]
) -> None:
    done = run(cpp, small_bundle, picture, "-o", "-", "--quiet", *FAST)
    found = np.frombuffer(done.stdout, np.uint8).reshape(expected.shape)
    assert np.abs(found - expected).max() <= 1
    assert done.stderr == b""


def test_y4m_is_read_by_ffmpeg_with_the_right_colours(
    cpp: Path, small_bundle: Path, picture: Path, expected: npt.NDArray[np.int64], tmp_path: Path
) -> None:
    done = run(cpp, small_bundle, picture, "-o", tmp_path / "o.y4m", "--fps", "12", *FAST)
    assert done.stderr.decode() == f"wrote {tmp_path}/o.y4m: 3 frames of 32x32 at 12 fps, seed 42\n"
    assert [p.name for p in tmp_path.iterdir()] == ["o.y4m"]
    with av.open(str(tmp_path / "o.y4m")) as file:
        stream = file.streams.video[0]
        assert (stream.width, stream.height, float(stream.average_rate or 0)) == (32, 32, 12)
        planes = np.stack([frame.to_ndarray(format="yuv444p") for frame in file.decode(video=0)])
    # The condition fps changes the frames, so they are not `expected`.
    again = run(cpp, small_bundle, picture, "-o", "-", "-q", "--format", "raw", "--fps", "12", *FAST).stdout
    rgb = np.frombuffer(again, np.uint8).reshape(expected.shape)
    python = np.stack([yuv444p(frame, BT601) for frame in rgb])
    assert np.abs(planes.astype(int) - python).max() <= 1  # a value between two levels may be rounded to either
    assert (planes == python).mean() > 0.99


def test_several_videos_have_numbers(cpp: Path, small_bundle: Path, picture: Path, tmp_path: Path) -> None:
    run(cpp, small_bundle, picture, picture, "-o", tmp_path / "o.y4m", *FAST, "--num-videos-per-prompt=2")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"o-{i}.y4m" for i in range(4)]


def test_a_seed_for_each_video(cpp: Path, small_bundle: Path, picture: Path) -> None:
    fast = ["--num-inference-steps", "1", "--num-frames", "2", "-o", "-"]
    done = run(cpp, small_bundle, picture, picture, *fast, "--seed", "3,4")
    assert done.stderr.decode().count("seeds 3, 4\n") == 2
    alone = [run(cpp, small_bundle, picture, *fast, "--seed", seed).stdout for seed in ("3", "4")]
    assert done.stdout == b"".join(alone)
    assert alone[0] != alone[1]


@pytest.mark.parametrize(
    ("rate", "expected"),
    [("24000/1001", Fraction(24000, 1001)), ("23.976", Fraction(2997, 125)), ("60/2", Fraction(30))],
)
def test_the_rate_of_the_file_alone(
    cpp: Path, small_bundle: Path, picture: Path, expected: Fraction, rate: str, tmp_path: Path
) -> None:
    fast = ["--num-inference-steps", "1", "--num-frames", "2", "--seed", "1"]
    done = run(cpp, small_bundle, picture, "-o", tmp_path / "o.y4m", *fast, "--output-fps", rate)
    assert f"at {expected} fps, seed 1" in done.stderr.decode()
    with av.open(str(tmp_path / "o.y4m")) as file:
        assert file.streams.video[0].average_rate == expected
    run(cpp, small_bundle, picture, "-o", tmp_path / "plain.y4m", *fast)
    frames = [(tmp_path / name).read_bytes().partition(b"\n")[2] for name in ("o.y4m", "plain.y4m")]
    assert frames[0] == frames[1]  # the motion stays that of --fps


def test_the_self_test(cpp: Path, small_bundle: Path) -> None:
    done = run(cpp, small_bundle, "--self-test").stdout.decode()
    assert len(done.splitlines()) == 6
    assert all(line.endswith(" ok") for line in done.splitlines())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "name a bundle; svd_trt_cli --help shows all options"),
        (["B"], 2, "name a picture"),
        (["B", "P"], 2, "name an output with -o"),
        (["B", "P", "-o"], 2, "--output takes a value"),
        (["B", "P", "-o", "x", "--steps", "3"], 2, "there is no option --steps"),
        (["B", "P", "-o", "x", "--fps", "7x"], 2, "--fps takes a number, not '7x'"),
        (["B", "P", "-o", "x", "--seed", "-1"], 2, "--seed is from 0 to 2**64 - 1, not -1"),
        (["B", "P", "-o", "x", "--seed", str(2**64)], 2, "--seed takes a number"),
        (
            ["B", "P", "-o", "x", "--seed", "1,2"],
            1,
            "2 seeds were given for 1 video; give one for each video, or one for all",
        ),
        (["B", "P", "-o", "x", "--seed", "1,"], 2, "--seed takes a number, not ''"),
        (["B", "P", "-o", "x", "--output-fps", "0"], 2, "--output-fps is a frame rate from 0.01 to 1000, such as 12"),
        (["B", "P", "-o", "x", "--output-fps", "1/0"], 2, "--output-fps is a frame rate from 0.01 to 1000, such as 12"),
        (
            ["B", "P", "-o", "x", "--icc", "ignore"],
            2,
            "--icc is for pictures with a colour profile, and a PPM has none",
        ),
        (["B", "P", "P", "-o", "-", "--format", "y4m"], 2, "takes 2 videos one after the other only as --format raw"),
        (["B", "P", "-o", "P"], 1, "is also an input picture; choose another output"),
        (["B", "P", "-o", "B/new/../x.y4m"], 1, "is inside the bundle, which the next build replaces"),
        (["B", "P", "-o", "B"], 1, "is inside the bundle, which the next build replaces"),
        (["B", "P", "-o", "x", "--format", "mp4"], 2, "--format is raw or y4m, not 'mp4'"),
        (["B", "P", "-o", "x", "--device", "gpu"], 2, "--device is cpu, cuda or cuda:N, not 'gpu'"),
        (["B", "P", "-o", "x", "--fps", "0"], 1, "fps must be 1 to 1000, not 0"),
        (["B", "P", "-o", "x", "--decode-chunk-size", "0"], 1, "decode_chunk_size must be at least 1, not 0"),
        (["B", "B/manifest.json", "-o", "x"], 1, "is not a whole binary PPM of 8 bits"),
        (["B", "nowhere.ppm", "-o", "x"], 1, "nowhere.ppm: No such file or directory"),
        (["B", "P", "-o", "nowhere/x"], 1, "nowhere/x: No such file or directory"),
        (["nowhere", "P", "-o", "x"], 1, "there is no bundle at nowhere"),
        (["B", "P", "-o", "x", "--device", "cuda:1"], 1, "cannot use its cuda provider here"),
        (["B", "P", "-o", "x", "--provider", "tensorrt"], 1, "cannot use its tensorrt provider here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(cpp: Path, small_bundle: Path, picture: Path, arguments: list[str], code: int, message: str) -> None:
    before = picture.read_bytes()
    places = {"B": str(small_bundle), "P": str(picture), "B/manifest.json": str(small_bundle / "manifest.json")}
    places["B/new/../x.y4m"] = f"{small_bundle}/new/../x.y4m"
    done = run(cpp, *(places.get(a, a) for a in arguments), code=code)
    assert picture.read_bytes() == before
    assert message in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1


def test_interrupting_leaves_no_file(cpp: Path, small_bundle: Path, picture: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [cpp / "svd_trt_cli", small_bundle, picture, "-o", tmp_path / "o.raw", "--num-inference-steps", "1000"],
        stderr=subprocess.PIPE,
    )
    while not (tmp_path / "o.raw.part").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (130, b"interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_interrupting_while_the_bundle_is_hashed(cpp: Path, small_bundle: Path, picture: Path, tmp_path: Path) -> None:
    """Nothing cancels that, so the signal ends the process at once, also in the self-test."""
    bundle = tmp_path / "bundle"
    shutil.copytree(small_bundle, bundle)
    large = bundle / "large"
    with large.open("wb") as file:
        file.truncate(64 << 30)  # sparse; takes minutes to hash
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    manifest["golden"]["frames"] = {"path": "large", "sha256": "0" * 64, "size": 64 << 30}
    text = json.dumps(manifest).encode()
    (bundle / "manifest.json").write_bytes(text)
    (bundle / "manifest.json.sha256").write_text(f"{hashlib.sha256(text).hexdigest()}  manifest.json\n")
    for options, number in ((["--self-test"], signal.SIGINT), ([picture, "-o", tmp_path / "o.raw"], signal.SIGTERM)):
        process = subprocess.Popen([cpp / "svd_trt_cli", bundle, *options], stderr=subprocess.PIPE)
        while str(large) not in _opened(process.pid):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=10)
        assert (process.returncode, errors) == (128 + number, b"interrupted\n")


def _opened(pid: int) -> set[str]:
    """Files that a process has open."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # it was closed meanwhile
            found.add(str(link.readlink()))
    return found


def test_the_example_in_plain_c(cpp: Path, small_bundle: Path, tmp_path: Path) -> None:
    subprocess.run([cpp / "svd_trt_plain_c", small_bundle, tmp_path], check=True, capture_output=True)
    frames = [np.asarray(PIL.Image.open(path)) for path in sorted(tmp_path.iterdir())]
    assert len(frames) == 3
    assert all(frame.shape == (32, 32, 3) and frame.std() > 1 for frame in frames)


def test_only_the_interface_is_exported(cpp: Path) -> None:
    listed = subprocess.run(
        ["nm", "--dynamic", "--defined-only", "--format=posix", cpp / "libsvd_trt.so"],
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.split()[0] for line in listed.stdout.splitlines()}
    header = (Path(__file__).parents[2] / "runtime" / "cpp" / "include" / "svd_trt.h").read_text()
    assert names == {name for name in names if name.startswith("svd_trt_") and name in header}
    assert len(names) == len(re.findall("^SVD_TRT_API", header, re.MULTILINE))


def ctest(folder: Path, bundle: Path, *options: str) -> None:
    environment = os.environ | {"SVD_TRT_TEST_BUNDLE": str(bundle)}
    command = ["ctest", "--test-dir", str(folder), "--output-on-failure", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "100% tests passed" in done.stdout


def test_ctest(cpp: Path, small_bundle: Path) -> None:
    """Every bad input, threads that cancel, and the parts by themselves."""
    ctest(cpp, small_bundle, "--label-exclude", "long")


@pytest.mark.slow
def test_200_videos_without_growth(cpp: Path, small_bundle: Path) -> None:
    ctest(cpp, small_bundle, "--label-regex", "long")


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_sanitizers(small_bundle: Path, sanitize: str) -> None:
    ctest(build(f"sanitize-{sanitize.partition(',')[0]}", sanitize), small_bundle, "--label-exclude", "long")
