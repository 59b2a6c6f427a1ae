"""Frames against the pipeline of diffusers with the same checkpoint, picture, seed and arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler

from svd_trt import VideoPipeline
from svd_trt.export.fidelity import psnr
from tests.conftest import load_diffusers

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "fewest-frames": {"num_frames": 2},
    "odd-frames": {"num_frames": 5},
    "most-frames": {"num_frames": 9},
    "chunk-1": {"num_frames": 3, "decode_chunk_size": 1},
    "chunk-leaves-1": {"num_frames": 7, "decode_chunk_size": 3},
    "chunk-over-videos": {"num_frames": 3, "num_videos_per_prompt": 2, "decode_chunk_size": 4},
    "three-videos": {"num_frames": 2, "num_videos_per_prompt": 3},
    "not-multiple-of-64": {"height": 104, "width": 136},
    "odd-latents": {"height": 72, "width": 88},
    "portrait": {"height": 136, "width": 72},
    "smallest": {"height": 40, "width": 48},
    "widest": {"height": 64, "width": 160},
    "no-guidance": {"max_guidance_scale": 1.0},
    "constant-guidance": {"min_guidance_scale": 2.5, "max_guidance_scale": 2.5},
    "steep-guidance": {"min_guidance_scale": 0.0, "max_guidance_scale": 8.0},
    "slow": {"fps": 1},
    "fast": {"fps": 30},
    "still": {"motion_bucket_id": 1},
    "wild": {"motion_bucket_id": 255},
    "no-noise": {"noise_aug_strength": 0.0},
    "much-noise": {"noise_aug_strength": 1.0},
    "one-step": {"num_inference_steps": 1},
    "25-steps": {"num_inference_steps": 25, "num_frames": 3},
    "custom-sigmas": {"sigmas": [700.0, 60.0, 5.0, 0.4, 0.0]},
    "custom-sigmas-end": {"sigmas": [80.0, 9.0, 0.3]},
    "seed-past-32-bits": {"seed": 2**63 + 11},
}


def both(
    pipe: VideoPipeline, reference: Any, image: Any, **arguments: Any
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    options = {"num_frames": 4, "num_inference_steps": 4, "height": 72, "width": 96, "seed": 42} | arguments
    ours = pipe(image, output_type="np", **options).frames  # type: ignore[arg-type]
    seed = options.pop("seed")
    theirs = reference(image, generator=torch.manual_seed(seed), output_type="np", **options).frames
    return ours, (theirs * 255).round().astype(np.uint8)


@pytest.mark.parametrize("case", CASES)
def test_fp32_frames_equal_diffusers(
    case: str, dynamic_pipe: VideoPipeline, reference: Any, picture: PIL.Image.Image, record_property: Any
) -> None:
    ours, theirs = both(dynamic_pipe, reference, picture, **CASES[case])
    assert ours.shape == theirs.shape
    assert theirs.std() > 5, "flat frames would match any other flat frames"
    value = psnr(ours, theirs)
    record_property("psnr_db", value)
    assert value >= 50


@pytest.mark.parametrize("steps", [4, 16])
def test_the_dpm_solver_equals_diffusers(
    steps: int, dynamic_pipe: VideoPipeline, reference: Any, picture: PIL.Image.Image
) -> None:
    """The sampler that a bundle of an EDMDPMSolverMultistepScheduler has by default, with guidance, in every step."""
    euler = reference.scheduler
    reference.scheduler = EDMDPMSolverMultistepScheduler(
        sigma_min=0.002, sigma_max=700.0, sigma_data=1.0, prediction_type="v_prediction"
    )
    options: dict[str, Any] = {"num_frames": 3, "num_inference_steps": steps, "height": 72, "width": 96}
    try:
        theirs = reference(picture, generator=torch.manual_seed(42), output_type="np", **options).frames
    finally:
        reference.scheduler = euler
    theirs = (theirs * 255).round().astype(np.uint8)
    ours, by_euler = (
        dynamic_pipe(picture, seed=42, output_type="np", sampler=sampler, **options).frames
        for sampler in ("dpmpp-2m", "euler")
    )
    assert psnr(ours, theirs) >= 50
    assert psnr(by_euler, theirs) < 45, "the samplers must differ for this to show anything"


def test_several_pictures_equal_diffusers(
    dynamic_pipe: VideoPipeline, reference: Any, picture: PIL.Image.Image
) -> None:
    pictures = [picture, picture.transpose(PIL.Image.Transpose.ROTATE_180)]
    ours, theirs = both(dynamic_pipe, reference, pictures, num_frames=3)
    assert ours.shape[0] == 2
    assert psnr(ours[0], ours[1]) < 40
    assert psnr(ours, theirs) >= 50


def test_latents_argument_and_output_equal_diffusers(
    dynamic_pipe: VideoPipeline, reference: Any, picture: PIL.Image.Image
) -> None:
    start = np.random.default_rng(1).standard_normal((1, 3, 4, 9, 12)).astype(np.float32)
    options: dict[str, Any] = {"num_frames": 3, "num_inference_steps": 3, "height": 72, "width": 96}
    ours = dynamic_pipe(picture, latents=start, seed=5, output_type="latent", **options).frames
    theirs = reference(
        picture, latents=torch.from_numpy(start), generator=torch.manual_seed(5), output_type="latent", **options
    ).frames.numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_callback_changes_latents_as_in_diffusers(
    dynamic_pipe: VideoPipeline, reference: Any, picture: PIL.Image.Image
) -> None:
    seen: list[tuple[int, float]] = []

    def halve(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, float(timestep)))
        return {"latents": values["latents"] * 0.5}

    ours, theirs = both(dynamic_pipe, reference, picture, num_frames=3, callback_on_step_end=halve)
    assert psnr(ours, theirs) >= 50
    assert [step for step, _ in seen] == [0, 1, 2, 3] * 2
    np.testing.assert_allclose([t for _, t in seen[:4]], [t for _, t in seen[4:]], rtol=1e-6)


@pytest.fixture(scope="module")
def half_reference(small_checkpoint: Path) -> Any:
    """The pipeline of diffusers with the small checkpoint, in fp16 on the CPU."""
    return load_diffusers(small_checkpoint, dtype=torch.float16)


@pytest.mark.parametrize("arguments", [{}, {"num_frames": 5, "decode_chunk_size": 2, "max_guidance_scale": 1.0}])
def test_fp16_bundle_is_as_close_to_fp32_as_diffusers_in_fp16(
    arguments: dict[str, Any],
    small_bundle: Path,
    small_reference: Any,
    half_reference: Any,
    picture: PIL.Image.Image,
    record_property: Any,
) -> None:
    # An fp16 pipeline draws its noise in half precision and the reference in single, so the test passes latents.
    options: dict[str, Any] = {"num_frames": 4, "num_inference_steps": 3, "height": 32, "width": 32} | arguments
    start = np.random.default_rng(2).standard_normal((1, options["num_frames"], 4, 16, 16)).astype(np.float32)
    with VideoPipeline.open(small_bundle) as pipe:
        ours = pipe(picture, latents=start, seed=3, output_type="np", **options).frames
    exact, half = (
        (
            reference(
                picture,
                latents=torch.from_numpy(start).to(reference.dtype),
                generator=torch.manual_seed(3),
                output_type="np",
                **options,
            ).frames
            * 255
        )
        .round()
        .astype(np.uint8)
        for reference in (small_reference, half_reference)
    )
    value, theirs = psnr(ours, exact), psnr(half, exact)
    record_property("psnr_db", value)
    record_property("diffusers_fp16_psnr_db", theirs)
    assert value >= theirs - 3


def test_fp16_bundle_draws_the_noise_of_an_fp16_pipeline(
    small_bundle: Path, half_reference: Any, picture: PIL.Image.Image, record_property: Any
) -> None:
    """Both sides draw in half precision from the same seed. Noise of another precision or order gives another video."""
    with VideoPipeline.open(small_bundle) as pipe:
        arguments: dict[str, Any] = {"num_frames": 3, "num_inference_steps": 2, "height": 32, "width": 32}
        ours, theirs = both(pipe, half_reference, picture, **arguments)
        other = pipe(picture, output_type="np", seed=43, **arguments).frames  # type: ignore[arg-type]
    value = psnr(ours, theirs)
    record_property("psnr_db", value)
    assert value >= 35
    assert psnr(other, theirs) < value - 6
