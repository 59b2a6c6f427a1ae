"""Many processes on one bundle, one cache and one output; a bundle that is replaced while it is open."""

from __future__ import annotations

import itertools
import shutil
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import PIL.Image
import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.engine.manifest import read_manifest
from svd_trt.engine.staging import Staging
from svd_trt.errors import BundleError
from tests.faults.conftest import (
    Start,
    assert_cache_whole,
    copy_links,
    entries_of,
    keys_of,
    write_manifest_anew,
)
from tests.faults.test_kills import BUILD, FRAMES, INFER, count_frames

PROCESSES = 20


def test_many_processes_run_one_bundle(
    start: Start, small_bundle: Path, picture_file: Path, tmp_path: Path, record_property: Any
) -> None:
    outputs = [tmp_path / f"{number}.npy" for number in range(PROCESSES)]
    running = [start("infer", small_bundle, picture_file, "-o", output, *INFER) for output in outputs]
    for process in running:
        process.wait().assert_done()
    first, *others = map(np.load, outputs)
    assert len(first) == FRAMES
    for other in others:
        np.testing.assert_array_equal(other, first)
    assert entries_of(tmp_path) == {output.name for output in outputs}
    record_property("processes_on_one_bundle", len(running))


@pytest.mark.parametrize("name", ["out.mp4", "out"])
def test_many_processes_write_one_output(
    name: str, start: Start, small_bundle: Path, picture_file: Path, tmp_path: Path
) -> None:
    """One of the videos remains, and it is whole."""
    running = [start("infer", small_bundle, picture_file, "-o", tmp_path / name, *INFER) for _ in range(PROCESSES)]
    for process in running:
        process.wait().assert_done()
    assert entries_of(tmp_path) == {name}
    assert count_frames(tmp_path / name) == FRAMES


@pytest.mark.parametrize("targets", ["one target", "many targets"])
def test_many_builds_share_a_cache(
    targets: str,
    start: Start,
    small_checkpoint: Path,
    small_bundle: Path,
    warm: Path,
    tmp_path: Path,
    record_property: Any,
) -> None:
    """All of them lack one network, which is exported once."""
    cache = copy_links(warm, tmp_path / "cache")
    for key, form in keys_of(small_bundle).items():
        if form == "image_encoder onnx":
            shutil.rmtree(cache / key)
    names = ["bundle"] * PROCESSES if targets == "one target" else [f"b{number}" for number in range(PROCESSES)]
    running = [
        start("build", small_checkpoint, "-o", tmp_path / "out" / name, *BUILD, "--cache", cache, "--json")
        for name in names
    ]
    results = [process.wait() for process in running]
    for result in results:
        result.assert_done()
    stages = [stage for result in results for stage in msgspec.json.decode(result.stdout)["stages"]]
    made = [stage for stage in stages if not stage["reused"]]
    assert [(stage["network"], stage["kind"]) for stage in made] == [("image_encoder", "onnx")]
    for name in set(names):
        Bundle.open(tmp_path / "out" / name)
    assert entries_of(tmp_path / "out") == {n for name in names for n in (name, f".{name}.lock")}
    assert_cache_whole(cache, tidy=True)
    record_property(f"builds_of_{targets.replace(' ', '_')}", len(running))


def republish(bundle: Path, sigma: float) -> None:
    """What a build does at its end: replace the bundle by one with another noise schedule."""
    with Staging(bundle) as staging:
        shutil.rmtree(staging.path)
        copy_links(bundle, staging.path)
        manifest = read_manifest(bundle)
        sampler = msgspec.structs.replace(manifest.sampler, sigma_max=sigma)
        changed = msgspec.structs.replace(manifest, sampler=sampler)
        write_manifest_anew(changed, staging.path)
        staging.publish(changed)


def test_a_bundle_that_is_replaced_while_it_is_open(
    small_bundle: Path, picture: PIL.Image.Image, tmp_path: Path
) -> None:
    """Loaded networks stay those of the old bundle, and no network of the new one is mixed with them."""
    bundle = copy_links(small_bundle, tmp_path / "bundle")
    with VideoPipeline.open(bundle) as pipe, VideoPipeline.open(bundle) as later:
        before = pipe(picture, num_frames=2, num_inference_steps=2, seed=1, output_type="np").frames
        later.executor.load("image_encoder")
        republish(bundle, 300.0)
        after = pipe(picture, num_frames=2, num_inference_steps=2, seed=1, output_type="np").frames
        np.testing.assert_array_equal(before, after)
        with pytest.raises(BundleError, match="was rebuilt while it was open; open it again"):
            later(picture, num_frames=2, num_inference_steps=2)
    with VideoPipeline.open(bundle) as pipe:
        new = pipe(picture, num_frames=2, num_inference_steps=2, seed=1, output_type="np").frames
    assert not np.array_equal(new, before)


def test_videos_while_the_bundle_is_replaced_again_and_again(
    start: Start, small_bundle: Path, picture_file: Path, tmp_path: Path, record_property: Any
) -> None:
    """Each video is that of one of the two bundles, or is refused because the bundle changed under it."""
    bundle = copy_links(small_bundle, tmp_path / "bundle")
    sigmas = (700.0, 300.0)
    expected = []
    for sigma in sigmas:
        republish(bundle, sigma)
        start("infer", bundle, picture_file, "-o", tmp_path / "expected.npy", *INFER).wait().assert_done()
        expected.append(np.load(tmp_path / "expected.npy"))
    ended, replaced = threading.Event(), 0

    def replace() -> None:
        nonlocal replaced
        for sigma in itertools.cycle(sigmas):
            if ended.is_set():
                return
            republish(bundle, sigma)
            replaced += 1

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        done = refused = 0
        for number in range(20):
            output = tmp_path / f"{number}.npy"
            result = start("infer", bundle, picture_file, "-o", output, *INFER).wait()
            if result.returncode:
                result.assert_refused("was rebuilt while it was open", "altered since it was built")
                assert not output.exists()
                refused += 1
            else:
                assert any(np.array_equal(np.load(output), frames) for frames in expected)
                done += 1
    finally:
        ended.set()
        thread.join()
    assert replaced > 20
    record_property("videos_while_replaced", done)
    record_property("refused_while_replaced", refused)
    Bundle.open(bundle)
