"""Disks that are full, read-only or gone: one line says so, nothing incomplete remains, and afterwards it works."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from svd_trt import Bundle, VideoPipeline, build_bundle
from svd_trt.engine.manifest import read_manifest
from svd_trt.engine.network_cache import NetworkCache
from svd_trt.errors import OutputError, SvdTrtError
from svd_trt.runtime.video import open_writer
from tests.conftest import SMALL
from tests.faults.conftest import (
    Start,
    assert_cache_whole,
    copy_links,
    entries_of,
    keys_of,
    small_disk,
)
from tests.faults.test_kills import BUILD, FRAMES, INFER, SUFFIXES, content_of, count_frames

PAGE = 4096
NAMES = [f"out{suffix}" for suffix in SUFFIXES]
FULL = ("No space left on device", "no space left")


@pytest.fixture
def frames() -> Any:
    """Frames that no format makes small, ``[F, H, W, 3]``."""
    return np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), np.uint8)


@pytest.mark.parametrize("older", [False, True], ids=["new", "replaces"])
@pytest.mark.parametrize("name", NAMES)
def test_videos_on_a_full_disk(name: str, older: bool, frames: Any, tmp_path: Path, record_property: Any) -> None:
    """The disk takes one page more each time, until the video fits."""
    folder = tmp_path / "disk"
    refused = 0
    with small_disk(folder, PAGE * (8 if older else 1)) as remount:
        if older:
            write_video(folder / name, np.zeros((1, 8, 8, 3), np.uint8))
        before = content_of(folder)
        for pages in range(8 if older else 1, 300):
            remount(f"size={PAGE * pages}")
            if (problem := problem_of(folder / name, frames)) is None:
                break
            assert "No space left on device; free some space" in problem
            assert content_of(folder) == before, "no part of the new video, and the older one unchanged"
            assert len(entries_of(folder)) == min(len(before), 1)
            refused += 1
        assert count_frames(folder / name) == len(frames)
        assert entries_of(folder) == {name}
    record_property("full_disks_of_videos", refused)
    assert refused > 0


def problem_of(path: Path, frames: Any) -> str | None:
    """What the refusal to write a video says; None if it was written."""
    try:
        write_video(path, frames)
    except OutputError as error:
        return str(error)
    return None


def write_video(path: Path, frames: Any) -> None:
    with open_writer(path, height=frames.shape[1], width=frames.shape[2], fps=7, metadata={}) as writer:
        for frame in frames:
            writer.write(frame[None])


@pytest.mark.parametrize("name", NAMES)
def test_commands_on_a_full_disk(
    name: str, start: Start, small_bundle: Path, picture_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "disk"
    with small_disk(folder, PAGE) as remount:
        (folder / "full").write_bytes(bytes(PAGE))
        command = ("infer", small_bundle, picture_file, "-o", folder / name, *INFER)
        start(*command).wait().assert_refused(*FULL)
        assert entries_of(folder) == {"full"}
        remount("size=4m")
        start(*command).wait().assert_done()
        assert count_frames(folder / name) == FRAMES


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_bundles_on_a_full_disk(
    start: Start,
    small_checkpoint: Path,
    small_bundle: Path,
    warm: Path,
    tmp_path: Path,
    rng: random.Random,
    record_property: Any,
) -> None:
    """The disk takes a random part of what a build writes, then all of it: the build resumes."""
    size = size_of(small_bundle)
    for number in range(6):
        folder = tmp_path / str(number)
        bundle = folder / "bundle"
        with small_disk(folder, int(size * rng.uniform(0.01, 0.95))) as remount:
            command = ("build", small_checkpoint, "-o", bundle, *BUILD, "--cache", warm, "-q", "--skip-checks")
            start(*command).wait().assert_refused(*FULL)
            assert not bundle.exists()
            remount(f"size={2 * size}")
            start(*command).wait().assert_done()
            Bundle.open(bundle)
            assert entries_of(folder) == {"bundle", ".bundle.lock"}
    record_property("full_disks_of_build", number + 1)


def test_caches_on_a_full_disk(small_bundle: Path, tmp_path: Path, rng: random.Random, record_property: Any) -> None:
    """The disk takes a random part of the networks that are added to the cache, then all of them."""
    size = size_of(small_bundle)
    networks = read_manifest(small_bundle).networks.values()
    entries: list[Any] = [form for network in networks for form in (network.onnx, network.plan) if form]

    def store_all(folder: Path) -> None:
        cache = NetworkCache(folder)
        for entry in entries:
            with cache.locked(entry.key):
                if cache.take(entry.key, type(entry), tmp_path / "taken") is None:
                    cache.store(entry, small_bundle)

    for number in range(25):
        folder = tmp_path / str(number)
        with small_disk(folder, int(size * rng.uniform(0.01, 0.95))) as remount:
            with pytest.raises(OutputError, match=r"cannot write to the cache .*No space left.*--cache"):
                store_all(folder)
            assert_cache_whole(folder, tidy=False)
            remount(f"size={2 * size}")
            store_all(folder)
            assert_cache_whole(folder, tidy=True)
            assert {entry.key for entry in entries} <= entries_of(folder)
    record_property("full_disks_of_cache", number + 1)


@pytest.mark.parametrize("missing", ["image_encoder onnx", "image_encoder plan"])
def test_exports_and_engines_on_a_full_disk(
    missing: str, start: Start, small_checkpoint: Path, small_bundle: Path, warm: Path, tmp_path: Path
) -> None:
    """torch and TensorRT write these files themselves, in processes of their own."""
    cache = copy_links(warm, tmp_path / "cache")
    for key, form in keys_of(small_bundle).items():
        if form == missing:
            shutil.rmtree(cache / key)
    others = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    with small_disk(tmp_path / "disk", others + 4 * PAGE) as remount:
        bundle = tmp_path / "disk" / "bundle"
        command = ("build", small_checkpoint, "-o", bundle, *BUILD, "--cache", cache, "-q", "--skip-checks")
        start(*command).wait().assert_refused(*FULL)
        assert not bundle.exists()
        remount("size=400m")
        start(*command).wait().assert_done()
        Bundle.open(bundle)
        assert entries_of(bundle.parent) == {"bundle", ".bundle.lock"}


@pytest.mark.parametrize("what", ["output", "bundle", "cache", "checkpoint"])
def test_read_only_folders(
    what: str, start: Start, small_checkpoint: Path, small_bundle: Path, warm: Path, picture_file: Path, tmp_path: Path
) -> None:
    """What is only read may be read-only; what has to be written is refused before the work."""
    folder = tmp_path / "disk"
    with small_disk(folder, 512 << 20) as remount:
        bundle = shutil.copytree(small_bundle, folder / "bundle")
        checkpoint = shutil.copytree(small_checkpoint, folder / small_checkpoint.name)
        cache = shutil.copytree(warm, folder / "cache")
        remount("ro")
        if what == "output":
            for name in NAMES:
                result = start("infer", small_bundle, picture_file, "-o", folder / name, *INFER).wait()
                result.assert_refused("Read-only file system")
            result = start("build", small_checkpoint, "-o", folder / "new", *BUILD, "--cache", warm, "-q").wait()
            result.assert_refused("Read-only file system")
        elif what == "bundle":
            start("infer", bundle, picture_file, "-o", tmp_path / "o.gif", *INFER).wait().assert_done()
            start("inspect", bundle, "--json").wait().assert_done()
        elif what == "cache":
            result = start("build", small_checkpoint, "-o", tmp_path / "b", *BUILD, "--cache", cache, "-q").wait()
            result.assert_refused("--cache")
            assert not (tmp_path / "b").exists()
        else:
            start("build", checkpoint, "-o", tmp_path / "b", *BUILD, "--cache", warm, "-q").wait().assert_done()


@pytest.mark.parametrize("name", NAMES)
def test_an_output_folder_that_vanishes(name: str, small_bundle: Path, picture_file: Path, tmp_path: Path) -> None:
    """The folder is removed between two frames, by somebody else; one line says so, and the next run works."""
    folder = tmp_path / "videos"
    folder.mkdir()
    with VideoPipeline.open(small_bundle) as pipe:
        stream = pipe.stream(str(picture_file), num_frames=FRAMES, num_inference_steps=1, seed=7)
        shape = {"height": 32, "width": 32, "fps": 7, "metadata": {}}

        def write_into_nothing() -> None:
            with open_writer(folder / name, **shape) as writer:
                for number, frame in enumerate(stream):
                    if number == 3:
                        shutil.rmtree(folder)
                    writer.write(frame[None])

        with pytest.raises(SvdTrtError, match="No such file"):
            write_into_nothing()
        assert not folder.exists()
        folder.mkdir()
        with open_writer(folder / name, **shape) as writer:
            for frame in pipe.stream(str(picture_file), num_frames=FRAMES, num_inference_steps=1, seed=7):
                writer.write(frame[None])
    assert count_frames(folder / name) == FRAMES


@pytest.mark.parametrize("what", ["bundle", "cache", "checkpoint"])
def test_a_folder_that_vanishes_during_a_build(
    what: str, small_checkpoint: Path, small_bundle: Path, warm: Path, tmp_path: Path
) -> None:
    places = {"bundle": tmp_path / "out", "cache": tmp_path / "cache", "checkpoint": tmp_path / small_checkpoint.name}
    places["bundle"].mkdir()
    shutil.copytree(small_checkpoint, places["checkpoint"])
    copy_links(warm, places["cache"])
    for key, form in keys_of(small_bundle).items():
        if form == "image_encoder onnx":
            shutil.rmtree(places["cache"] / key)

    def vanish(stage: str, done: float, total: float) -> None:
        if stage == "image_encoder: exporting to ONNX" and not done:
            shutil.rmtree(places[what])

    options = replace(SMALL, cache=places["cache"])
    bundle = places["bundle"] / "bundle"
    if what == "cache":  # it is made again
        build_bundle(places["checkpoint"], bundle, options, vanish)
        assert_cache_whole(places["cache"], tidy=True)
    else:
        with pytest.raises(SvdTrtError) as caught:
            build_bundle(places["checkpoint"], bundle, options, vanish)
        assert len(str(caught.value).splitlines()) == 1
        assert not bundle.exists()
        if what == "checkpoint":
            shutil.copytree(small_checkpoint, places["checkpoint"])
        build_bundle(places["checkpoint"], bundle, options)
    Bundle.open(bundle)
    assert entries_of(places["bundle"]) == {"bundle", ".bundle.lock"}


def test_a_bundle_that_vanishes_while_it_is_open(small_bundle: Path, picture: PIL.Image.Image, tmp_path: Path) -> None:
    """Networks that are loaded go on; one that is not loaded yet is an error that names the bundle."""
    bundle = shutil.copytree(small_bundle, tmp_path / "bundle")
    with VideoPipeline.open(bundle) as run:
        run(picture, num_frames=2, num_inference_steps=1)
        shutil.rmtree(bundle)
        run(picture, num_frames=2, num_inference_steps=1)
    bundle = shutil.copytree(small_bundle, tmp_path / "bundle")
    with VideoPipeline.open(bundle) as run:
        run.executor.load("image_encoder")
        shutil.rmtree(bundle)
        with pytest.raises(SvdTrtError, match=str(bundle)):
            run(picture, num_frames=2, num_inference_steps=1)
