"""The C++ runtime makes the frames that Python makes: within one level, because the cosine of the noise may differ."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import PIL.Image
import pytest

from svd_trt import ArgumentError, Bundle, VideoPipeline
from svd_trt.engine.manifest import read_manifest, write_manifest
from svd_trt.engine.spec import Range, network_specs
from svd_trt.export.fidelity import draw_picture
from svd_trt.runtime.quality_presets import QUALITIES
from tests.cpp.library import Library, RefusedError, opened

LIBRARY = "libsvd_trt.so"
FAST: dict[str, Any] = {"num_inference_steps": 2, "num_frames": 3, "seed": 42}


@pytest.fixture(scope="module")
def dynamic(cpp: Path, dynamic_bundle: Bundle) -> Iterator[Library]:
    with opened(cpp / LIBRARY, dynamic_bundle.path) as library:
        yield library


@pytest.fixture(scope="module")
def small(cpp: Path, small_bundle: Path) -> Iterator[Library]:
    with opened(cpp / LIBRARY, small_bundle) as library:
        yield library


@pytest.fixture(scope="module")
def tiny(cpp: Path, tiny_bundle: Bundle) -> Iterator[Library]:
    with opened(cpp / LIBRARY, tiny_bundle.path) as library:
        yield library


@pytest.fixture(scope="module")
def shallow(cpp: Path, shallow_bundle: Bundle) -> Iterator[Library]:
    with opened(cpp / LIBRARY, shallow_bundle.path) as library:
        yield library


@pytest.fixture(scope="module")
def shallow_pipe(shallow_bundle: Bundle) -> Iterator[VideoPipeline]:
    with VideoPipeline.open(shallow_bundle) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def small_pipe(small_bundle: Path) -> Iterator[VideoPipeline]:
    with VideoPipeline.open(small_bundle) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def tiny_pipe(tiny_bundle: Bundle) -> Iterator[VideoPipeline]:
    with VideoPipeline.open(tiny_bundle) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def split_bundle(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small bundle for one branch at a time."""
    return with_branches(small_bundle, tmp_path_factory.mktemp("split") / "bundle", Range(1, 1, 1))


def with_branches(bundle: Path, path: Path, branches: Range) -> Path:
    """Copy a bundle for other branches. Its graph takes one or two, so only the manifest changes."""
    shutil.copytree(bundle, path)
    manifest = read_manifest(path)
    ranges = msgspec.structs.replace(manifest.ranges, branches=branches)
    specs = network_specs(manifest.model, ranges)
    networks = {n: msgspec.structs.replace(e, spec=specs[n], plan=None) for n, e in manifest.networks.items()}
    write_manifest(msgspec.structs.replace(manifest, ranges=ranges, networks=networks, tensorrt=None), path)
    return path


# Sizes are height and width; pictures are landscape, portrait, larger and smaller than the frames.
FP32 = {
    "defaults": ((144, 192), {}),
    "portrait": ((200, 90), {}),
    "enlarged": ((17, 31), {}),
    "one pixel high": ((1, 50), {}),
    "frames of another size": ((144, 192), {"height": 136, "width": 48}),
    "one chunk for each frame": ((144, 192), {"decode_chunk_size": 1}),
    "a shorter last chunk": ((144, 192), {"decode_chunk_size": 2, "num_frames": 5}),
    "no guidance": ((144, 192), {"min_guidance_scale": 1.0, "max_guidance_scale": 1.0}),
    "guidance that falls": ((144, 192), {"min_guidance_scale": 4.0, "max_guidance_scale": -1.0}),
    "guidance in the last steps": ((144, 192), {"guidance_interval": (0, 50), "num_inference_steps": 4}),
    "guidance in the middle": (
        (144, 192),
        {"guidance_interval": (0.1, 200), "num_inference_steps": 6, "sampler": "dpmpp-2m", "num_videos_per_prompt": 3},
    ),
    "constant guidance": ((144, 192), {"guidance_shape": "constant", "guidance_interval": (1, 700)}),
    "triangular guidance": ((144, 192), {"guidance_shape": "triangular", "num_frames": 5}),
    "a seed over 32 bits": ((144, 192), {"seed": 2**63 + 12345}),
    "conditions": ((144, 192), {"fps": 24, "motion_bucket_id": 3, "noise_aug_strength": 0.5}),
    "one step": ((144, 192), {"num_inference_steps": 1}),
    "an odd number of steps": ((144, 192), {"num_inference_steps": 5, "num_frames": 2}),
    "own sigmas": ((144, 192), {"sigmas": (300.0, 20.0, 2.0, 0.01)}),
    "DPM-Solver++": ((144, 192), {"sampler": "dpmpp-2m", "num_inference_steps": 4}),
    "UniC": ((144, 192), {"sampler": "unic", "num_inference_steps": 4}),
    "Adams-Bashforth": ((144, 192), {"sampler": "ab2", "schedule": "ays", "num_inference_steps": 16}),
    "Adams-Bashforth that ends above 0": ((144, 192), {"sampler": "ab2", "sigmas": (700.0, 9.0, 2.0, 0.1)}),
    "exponential": ((144, 192), {"schedule": "exponential", "num_inference_steps": 4}),
    "Align Your Steps": ((144, 192), {"schedule": "ays", "sampler": "dpmpp_2m", "num_inference_steps": 7}),
    **{name: ((144, 192), {"quality": name, "num_inference_steps": None}) for name in QUALITIES},
    "what is given wins": (
        (144, 192),
        {"quality": "fast", "schedule": "karras", "sampler": "euler", "guidance_interval": (0, 1000)},
    ),
    "sigmas and a preset": ((144, 192), {"quality": "standard", "sigmas": (300.0, 20.0, 2.0, 0.01)}),
    "few steps": ((144, 192), {"sampler": "lcm", "num_inference_steps": 4}),
    "one of few steps": ((144, 192), {"sampler": "lcm", "num_inference_steps": 1}),
    "fresh noise at own sigmas": ((144, 192), {"sampler": "lcm", "sigmas": (300.0, 20.0, 0.5)}),
    "crop": ((200, 90), {"resize_mode": "crop"}),
    "pad": ((90, 200), {"resize_mode": "pad", "background": "#ff8000"}),
}


@pytest.mark.parametrize("case", FP32)
def test_fp32(dynamic: Library, dynamic_pipe: VideoPipeline, case: str, record_property: Any) -> None:
    size, arguments = FP32[case]
    compare(dynamic, dynamic_pipe, [draw_picture(*size)], FAST | arguments, record_property)


FP16 = {
    "defaults": {},
    "a chunk over the end of a video": {"num_videos_per_prompt": 3, "decode_chunk_size": 2},
    "a seed over 32 bits": {"seed": 2**32 + 7},
    "a seed for each video": {"seed": [3, 2**40 + 1], "num_videos_per_prompt": 2},
    "no guidance": {"max_guidance_scale": 0.5},
    "few steps of several videos": {"sampler": "lcm", "num_videos_per_prompt": 3},
}


@pytest.mark.parametrize("case", FP16)
def test_fp16(small: Library, small_pipe: VideoPipeline, case: str, record_property: Any) -> None:
    compare(small, small_pipe, [draw_picture(60, 80)], FAST | FP16[case], record_property)


@pytest.mark.parametrize("arguments", [{"num_frames": 8}, {"num_frames": 5, "decode_chunk_size": 4}])
def test_the_trained_miniature(
    tiny: Library, tiny_pipe: VideoPipeline, arguments: dict[str, Any], record_property: Any
) -> None:
    compare(tiny, tiny_pipe, [draw_picture(60, 80)], FAST | arguments, record_property)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"deep_every": 2},
        {"deep_every": 3, "num_videos_per_prompt": 2},
        {"deep_every": 9, "max_guidance_scale": 1.0},
        {"deep_every": 2, "num_inference_steps": 8, "guidance_interval": (0.1, 300.0)},
    ],
    ids=str,
)
def test_shallow_steps(
    shallow: Library, shallow_pipe: VideoPipeline, arguments: dict[str, Any], record_property: Any
) -> None:
    arguments = FAST | {"num_inference_steps": 5} | arguments
    compare(shallow, shallow_pipe, [draw_picture(60, 80)], arguments, record_property)


def test_several_pictures_and_videos(dynamic: Library, dynamic_pipe: VideoPipeline, record_property: Any) -> None:
    """Two pictures with two videos each, in groups of two."""
    pictures = [draw_picture(144, 192), draw_picture(80, 60)]
    compare(dynamic, dynamic_pipe, pictures, FAST | {"num_videos_per_prompt": 2}, record_property)
    seeds = {"seed": [5, 6, 7, 8]}  # each draws a video's latents, and the first two the noise of a picture
    compare(dynamic, dynamic_pipe, pictures, FAST | {"num_videos_per_prompt": 2} | seeds, record_property)


def test_latents(dynamic: Library, dynamic_pipe: VideoPipeline) -> None:
    picture = draw_picture(144, 192)
    expected = dynamic_pipe(picture, output_type="latent", **FAST).frames
    found = dynamic.latents([picture], **FAST)
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-3)


def test_split_guidance(cpp: Path, split_bundle: Path, record_property: Any) -> None:
    """The denoiser of this bundle takes one branch, so a step is two passes."""
    with opened(cpp / LIBRARY, split_bundle) as library, VideoPipeline.open(split_bundle) as pipe:
        compare(library, pipe, [draw_picture(60, 80)], FAST, record_property)
        compare(library, pipe, [draw_picture(60, 80)], FAST | {"max_guidance_scale": 1.0}, record_property)
        in_part = FAST | {"num_inference_steps": 4, "guidance_interval": (0.1, 200)}
        compare(library, pipe, [draw_picture(60, 80)], in_part, record_property)


def test_a_bundle_for_both_branches_takes_an_interval_of_all_steps_alone(
    cpp: Path, small_bundle: Path, tmp_path: Path
) -> None:
    path = with_branches(small_bundle, tmp_path / "bundle", Range(2, 2, 2))
    picture = draw_picture(60, 80)
    with opened(cpp / LIBRARY, path) as library, VideoPipeline.open(path) as pipe:
        assert library.frames([picture], **FAST, guidance_interval=(0, 700)).std() > 1
        with pytest.raises(ArgumentError, match="without --branches 2") as expected:
            pipe.stream(picture, **FAST, guidance_interval=(0, 50))
        with pytest.raises(RefusedError) as found:
            library.frames([picture], **FAST, guidance_interval=(0, 50))
    assert str(found.value) == str(expected.value)


def compare(
    library: Library,
    pipe: VideoPipeline,
    pictures: list[PIL.Image.Image],
    arguments: dict[str, Any],
    record_property: Any,
) -> None:
    expected = np.stack(list(pipe.stream(pictures, **arguments)))
    found = library.frames(pictures, **arguments)
    assert found.shape == expected.shape
    difference = int(np.abs(found.astype(int) - expected).max())
    record_property("levels", difference)
    assert difference <= 1
    assert expected.std() > 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_frames": 10},
        {"height": 44},
        {"width": 168},
        {"decode_chunk_size": -1},
        {"num_inference_steps": -1},
        {"num_inference_steps": 1001, "quality": "draft"},
        {"schedule": "linear"},
        {"schedule": "ays", "sigmas": (1.0, 0.0)},
        {"quality": "ultra"},
        {"num_videos_per_prompt": 1001},
        {"noise_aug_strength": -0.5},
        {"max_guidance_scale": 101},
        {"guidance_interval": (50.0, 0.0)},
        {"guidance_interval": (2.0, 2.0)},
        {"guidance_interval": (0.0, float("nan"))},
        {"guidance_interval": (0.0, 2e6)},
        {"guidance_interval": (800.0, 900.0)},
        {"guidance_shape": "square"},
        {"sigmas": (1.0, 2.0)},
        {"sigmas": (1.0,)},
        {"sigmas": tuple(range(200))},
        {"seed": []},
        {"seed": [1, 2], "num_videos_per_prompt": 3},
        {"fps": 0},
        {"deep_every": -1},
        {"deep_every": 1001},
        {"deep_every": 3},
        {"sampler": "dpm_2"},
        {"sampler": "lcm", "num_inference_steps": 41},
    ],
    ids=str,
)
def test_refusals_have_the_words_of_python(
    dynamic: Library, dynamic_pipe: VideoPipeline, arguments: dict[str, Any]
) -> None:
    picture = draw_picture(144, 192)
    with pytest.raises(ArgumentError) as expected:
        dynamic_pipe.stream(picture, **arguments)
    with pytest.raises(RefusedError) as found:
        dynamic.frames([picture], **arguments)
    words = str(expected.value).partition(", or go on after")[0]  # by extend, which is in Python only
    assert str(found.value) == words
