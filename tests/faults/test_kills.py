"""kill -9 at random moments: nothing half-written has its final name, and the next run succeeds and tidies up."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
import PIL.Image
import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.engine.manifest import read_manifest
from svd_trt.runtime.video import open_writer
from tests.faults.conftest import (
    Running,
    Start,
    assert_cache_whole,
    assert_whole,
    copy_links,
    entries_of,
    keys_of,
    wait_for_orphans,
    write_manifest_anew,
)

BUILD = (
    *("--height", "32", "--width", "32", "--frames", "2:3:6", "--decode-chunk", "1:3:6"),
    *("--backend", "tensorrt-rtx", "--no-golden-frames"),
)
INFER = ("--num-inference-steps", "2", "--num-frames", "6", "--seed", "7", "-q")
FRAMES = 6

# What the cache lacks, and how many builds are killed while they make it.
BUILDS = {"": 34, "image_encoder onnx": 8, "image_encoder plan": 8}
SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".gif", ".webp", ".apng", ".npy", "")
OUTPUTS = {**{f"out{suffix}": 5 for suffix in SUFFIXES}, "-": 5}


def kill_within(process: Running, seconds: float, rng: random.Random) -> bool:
    """Kill the process at a random moment of ``seconds``; False if it had ended."""
    time.sleep(rng.uniform(0, seconds))
    process.kill()
    return process.wait().returncode == -9


@pytest.mark.parametrize("lacking", BUILDS)
def test_killed_builds(
    lacking: str,
    start: Start,
    small_checkpoint: Path,
    small_bundle: Path,
    warm: Path,
    tmp_path: Path,
    rng: random.Random,
    seed: int,
    record_property: Any,
) -> None:
    def build(folder: Path) -> Running:
        return start("build", small_checkpoint, "-o", folder / "bundle", *BUILD, "--cache", folder / "cache", "-q")

    def prepare(name: str) -> Path:
        folder = tmp_path / name
        cache = copy_links(warm, folder / "cache")
        for key, form in keys_of(small_bundle).items():
            if form == lacking:
                shutil.rmtree(cache / key)
        return folder

    started = time.monotonic()
    build(prepare("whole")).wait().assert_done()
    duration = time.monotonic() - started
    hits = 0
    for number in range(10 * BUILDS[lacking]):
        folder = prepare(str(number))
        older = rng.random() < 0.5
        if older:
            old = write_older(small_bundle, folder / "bundle")
        hits += (hit := kill_within(build(folder), duration, rng))
        if older:
            assert hit or read_manifest(folder / "bundle") != old
            assert (folder / "bundle").exists(), "an older bundle is there until the new one replaces it"
        assert_whole(folder / "bundle")
        assert_cache_whole(folder / "cache", tidy=False)
        build(folder).wait().assert_done()
        assert read_manifest(folder / "bundle").networks == read_manifest(small_bundle).networks
        Bundle.open(folder / "bundle")
        assert entries_of(folder) == {"bundle", ".bundle.lock", "cache"}
        wait_for_orphans(folder)
        assert_cache_whole(folder / "cache", tidy=True)
        shutil.rmtree(folder)
        if hits == BUILDS[lacking]:
            break
    record_property("seed", seed)
    record_property("kills_of_build", hits)
    assert hits == BUILDS[lacking]


def write_older(bundle: Path, to: Path) -> Any:
    """A bundle that the build replaces: the same networks with another noise schedule."""
    copy_links(bundle, to)
    manifest = read_manifest(bundle)
    changed = msgspec.structs.replace(manifest, sampler=msgspec.structs.replace(manifest.sampler, sigma_max=300.0))
    write_manifest_anew(changed, to)
    return changed


@pytest.fixture(scope="module")
def pipe(small_bundle: Path) -> Iterator[VideoPipeline]:
    with VideoPipeline.open(small_bundle) as opened:
        yield opened


@pytest.mark.parametrize("name", OUTPUTS)
def test_killed_videos(
    name: str,
    start: Start,
    small_bundle: Path,
    picture_file: Path,
    tmp_path: Path,
    rng: random.Random,
    seed: int,
    record_property: Any,
    pipe: VideoPipeline,
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    output = folder / name if name != "-" else "-"

    def infer() -> Running:
        return start("infer", small_bundle, picture_file, "-o", output, *INFER)

    def infer_here() -> None:
        """What the command does, in this process, where the networks stay loaded."""
        stream = pipe.stream(str(picture_file), num_inference_steps=2, num_frames=FRAMES, seed=7)
        with open_writer(output, height=32, width=32, fps=7, metadata=stream.metadata) as writer:
            for frame in stream:
                writer.write(frame[None])

    started = time.monotonic()
    infer().wait().assert_done()
    duration = time.monotonic() - started
    finished = content_of(folder)
    hits = 0
    for number in range(10 * OUTPUTS[name]):
        before: dict[str, bytes] = finished
        if number % 2:
            before = {}
            empty(folder)
        hits += kill_within(infer(), duration, rng)
        visible = {path: content for path, content in content_of(folder).items() if not path.startswith(".svd-trt-")}
        assert visible in (before, finished), "an earlier video, none, or the whole new one"
        if name == "-" or number % 4 == 0:
            infer().wait().assert_done()
        else:
            infer_here()
        assert content_of(folder) == finished, "the next run removes what the killed one left"
        assert name == "-" or count_frames(folder / name) == FRAMES
        if hits == OUTPUTS[name]:
            break
    record_property("seed", seed)
    record_property("kills_of_infer", hits)
    assert hits == OUTPUTS[name]


def content_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): _content(p) for p in folder.rglob("*") if p.is_file()}


def _content(path: Path) -> bytes:
    """The content of a file; of Matroska, which has a random identifier, the frames."""
    if path.suffix not in (".webm", ".mkv") or path.name.startswith("."):
        return path.read_bytes()
    with av.open(str(path)) as file:
        return b"".join(frame.to_ndarray(format="rgb24").tobytes() for frame in file.decode(video=0))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def count_frames(path: Path) -> int:
    if path.is_dir():
        return len(list(path.iterdir()))
    if path.suffix == ".npy":
        return len(np.load(path))
    if path.suffix in (".mp4", ".mov", ".webm", ".mkv"):
        with av.open(str(path)) as file:
            return sum(1 for _ in file.decode(video=0))
    with PIL.Image.open(path) as picture:
        return int(getattr(picture, "n_frames", 1))


@pytest.mark.parametrize("name", ["out.mp4", "out"])
def test_what_a_running_process_writes_is_left_alone(
    name: str, start: Start, small_bundle: Path, picture_file: Path, tmp_path: Path
) -> None:
    """Two processes write into one folder: neither takes the other's unfinished file for a leftover."""
    with open_writer(tmp_path / name, height=32, width=32, fps=7, metadata={}) as writer:
        writer.write(np.zeros((1, 32, 32, 3), np.uint8))
        start("infer", small_bundle, picture_file, "-o", tmp_path / "other.gif", *INFER).wait().assert_done()
        writer.write(np.zeros((1, 32, 32, 3), np.uint8))
    assert count_frames(tmp_path / name) == 2
    assert entries_of(tmp_path) == {name, "other.gif"}
    assert os.path.lexists(tmp_path / name)
