"""Bundles of the trained miniature in fp32 and fp16, against diffusers and the true clips."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from svd_trt import BuildOptions, VideoPipeline, build_bundle
from svd_trt.export.fidelity import psnr
from svd_trt.runtime.quality_presets import QUALITIES
from svd_trt.runtime.schedules import ays_sigmas
from tests.conftest import BACKEND, Once, build_tiny
from tests.runtime.textbook import TEXTBOOK

TINY = Path(__file__).parent.parent.parent / "examples" / "tiny"
PICTURES = 6

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def score() -> Any:
    """The module ``examples/tiny/score.py``, whose imports need its folder on the path."""
    sys.path.insert(0, str(TINY))
    try:
        import score

        yield score
    finally:
        sys.path.remove(str(TINY))


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def bundle(request: pytest.FixtureRequest, once: Any, cache: Path) -> tuple[str, Path]:
    backend = BACKEND if request.param == "fp16" else "onnxruntime"  # the networks of each are others
    return request.param, build_tiny(once, cache, request.param, backend)


@pytest.fixture(scope="module")
def diffusers() -> Any:
    import torch
    from diffusers import StableVideoDiffusionPipeline

    pipeline = StableVideoDiffusionPipeline.from_pretrained(TINY / "checkpoint", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_checkpoint_is_small() -> None:
    assert sum(p.stat().st_size for p in (TINY / "checkpoint").rglob("*") if p.is_file()) <= 12e6


def test_frames_match_diffusers_and_the_true_clip(
    bundle: tuple[str, Path], score: Any, diffusers: Any, record_property: Any
) -> None:
    """The pictures are held out from training. The reference is diffusers in fp32."""
    import torch
    import world

    precision, path = bundle
    by_diffusers = score.diffusers_generator(diffusers)
    closeness, angles, errors, repeats = [], [], [], []
    with score.bundle_generator(path) as by_bundle:
        for index, seed in enumerate(world.held_out_seeds(PICTURES)):
            scene = world.make_scene(seed, score.NUM_FRAMES)
            truth = world.draw_clip(scene, score.NUM_FRAMES, score.SIZE, score.SIZE)
            base = score.Settings(fps=scene.fps, motion_bucket_id=scene.motion_bucket_id, seed=index)
            picture = PIL.Image.fromarray(truth[0])
            ours = by_bundle(picture, base)
            with torch.no_grad():
                closeness.append(psnr(ours, by_diffusers(picture, base)))
            angles.append(score.angle_to_nose(ours, scene))
            errors.append(score.rms(ours, truth))
            repeats.append(score.rms(np.repeat(truth[:1], score.NUM_FRAMES, axis=0), truth))
    record_property(f"{precision}_worst_psnr_db", min(closeness))
    record_property(f"{precision}_within_30_degrees", float(np.mean(np.array(angles) <= 30)))
    record_property(f"{precision}_error_to_repeat", float(np.mean(errors) / np.mean(repeats)))
    assert min(closeness) >= {"fp32": 50, "fp16": 35}[precision]
    assert np.mean(np.array(angles) <= 30) >= 0.8
    assert np.mean(errors) < 0.7 * np.mean(repeats)


@pytest.mark.parametrize("sampler", TEXTBOOK)
def test_samplers_of_second_order_make_the_videos_of_the_textbook(
    sampler: str, once: Any, cache: Path, score: Any, diffusers: Any, record_property: Any
) -> None:
    """diffusers' pipeline makes the other video, with the sampler as its paper derives it, on Align Your Steps."""
    import torch
    import world

    scene = world.make_scene(next(world.held_out_seeds(1)), score.NUM_FRAMES)
    picture = PIL.Image.fromarray(world.draw_clip(scene, 1, score.SIZE, score.SIZE)[0])
    shared = {"fps": scene.fps, "motion_bucket_id": scene.motion_bucket_id, "num_frames": score.NUM_FRAMES}
    with VideoPipeline.open(build_tiny(once, cache, "fp32")) as pipe:
        ours = pipe(
            picture, seed=1, output_type="np", schedule="ays", num_inference_steps=8, sampler=sampler, **shared
        ).frames[0]
    own = diffusers.scheduler
    diffusers.scheduler = TEXTBOOK[sampler].from_config(own.config)
    try:
        theirs = diffusers(
            picture,
            generator=torch.manual_seed(1),
            output_type="np",
            height=score.SIZE,
            width=score.SIZE,
            sigmas=ays_sigmas(8).tolist(),
            decode_chunk_size=score.NUM_FRAMES,
            **shared,
        ).frames[0]
    finally:
        diffusers.scheduler = own
    value = psnr(ours, (theirs * 255).round().astype(np.uint8))
    record_property("psnr_db", value)
    assert value >= 75


def test_presets_are_close_to_50_steps(once: Any, cache: Path, score: Any, record_property: Any) -> None:
    """The targets of the documents, on few pictures: errors to the true clip relative to those of 50 steps."""
    import world

    errors: dict[str, list[float]] = {}
    closeness: dict[str, list[float]] = {}
    angles = []
    with VideoPipeline.open(build_tiny(once, cache, "fp32")) as pipe:
        for seed in world.held_out_seeds(PICTURES):
            scene = world.make_scene(seed, score.NUM_FRAMES)
            truth = world.draw_clip(scene, score.NUM_FRAMES, score.SIZE, score.SIZE)
            shared = {"fps": scene.fps, "motion_bucket_id": scene.motion_bucket_id, "seed": seed % 1000}
            make = partial(pipe, PIL.Image.fromarray(truth[0]), output_type="np", **shared)
            limit = make(num_inference_steps=50).frames[0]
            errors.setdefault("limit", []).append(score.rms(limit, truth))
            for name in QUALITIES:
                frames = make(quality=name).frames[0]
                errors.setdefault(name, []).append(score.rms(frames, truth))
                closeness.setdefault(name, []).append(score.psnr(frames, limit))
            angles.append(score.angle_to_nose(frames, scene))  # of the last one, the draft
    worse = {name: float(np.mean(values) / np.mean(errors["limit"])) for name, values in errors.items()}
    db = {name: float(np.mean(values)) for name, values in closeness.items()}
    record_property("error_to_50_steps", " ".join(f"{name} {value:.3f}" for name, value in worse.items()))
    record_property("psnr_db", " ".join(f"{name} {value:.1f}" for name, value in db.items()))
    assert max(worse[name] for name in ("best", "standard", "fast")) <= 1.02
    assert worse["draft"] <= 1.07
    assert all(db[name] >= least for name, least in {"best": 57, "standard": 52, "fast": 50, "draft": 43}.items())
    assert np.mean(np.array(angles) <= 30) >= 0.95


def test_motion_grows_with_the_bucket(bundle: tuple[str, Path], score: Any, record_property: Any) -> None:
    import world

    precision, path = bundle
    moved: dict[int, list[float]] = {bucket: [] for bucket in score.BUCKETS}
    with score.bundle_generator(path) as generate:
        for seed in world.held_out_seeds(3):
            base = score.Settings(fps=7, motion_bucket_id=127, seed=seed % 1000)
            scene = world.make_scene(seed, score.NUM_FRAMES, fps=7, motion_bucket_id=max(score.BUCKETS))
            picture = PIL.Image.fromarray(world.draw_clip(scene, 1, score.SIZE, score.SIZE)[0])
            for bucket in score.BUCKETS:
                clip = generate(picture, replace(base, motion_bucket_id=bucket))
                moved[bucket].append(float(np.hypot(*score.track(clip, scene))))
    means = [float(np.mean(values)) for values in moved.values()]
    record_property(f"{precision}_pixels_per_frame", " ".join(f"{m:.2f}" for m in means))
    assert means == sorted(means)
    assert means[-1] > 2 * means[0]


@pytest.fixture(scope="module")
def shallow_pipe(once: Once, cache: Path) -> Iterator[VideoPipeline]:
    options = BuildOptions(height=32, width=32, frames="2:8:8", shallow_steps=True, backend="onnxruntime", cache=cache)
    path = once("tiny-shallow", lambda path: build_bundle(TINY / "checkpoint", path, options))
    with VideoPipeline.open(path) as pipe:
        yield pipe


@pytest.mark.parametrize(("every", "least"), [(2, 50), (3, 50), (5, 45)])
def test_shallow_steps_are_close_to_whole_ones(
    every: int, least: float, shallow_pipe: VideoPipeline, record_property: Any
) -> None:
    """With 25 steps: what shallow steps cost in fidelity."""
    rocket = PIL.Image.open(TINY / "picture.png")
    arguments: dict[str, Any] = {"num_frames": 8, "seed": 1, "output_type": "np"}
    whole = shallow_pipe(rocket, **arguments).frames
    found = shallow_pipe(rocket, deep_every=every, **arguments).frames
    value = psnr(found, whole)
    record_property("psnr_db", value)
    assert least <= value < 90
