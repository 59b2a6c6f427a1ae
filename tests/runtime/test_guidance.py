"""Guidance that is limited to an interval of noise levels, and its shapes over the frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler

from svd_trt import Bundle, VideoPipeline
from svd_trt.errors import ArgumentError
from svd_trt.export.fidelity import psnr
from svd_trt.runtime.guidance import GuidanceShape, guidance_scales, guided_steps, largest_scale
from svd_trt.runtime.parameters import Parameters
from svd_trt.runtime.settings import memory_request

OPTIONS: dict[str, Any] = {"num_frames": 5, "num_inference_steps": 6, "height": 48, "width": 64}


@pytest.mark.parametrize(
    ("shape", "frames", "expected"),
    [
        ("linear", 5, [1, 1.5, 2, 2.5, 3]),
        ("constant", 3, [3, 3, 3]),
        ("triangular", 5, [1, 2, 3, 2, 1]),
        ("triangular", 4, [1, 7 / 3, 7 / 3, 1]),
        ("triangular", 1, [1]),
        ("linear", 1, [1]),
        ("constant", 1, [3]),
    ],
)
def test_scales_of_the_frames(shape: GuidanceShape, frames: int, expected: list[float]) -> None:
    scales = guidance_scales(shape, 1.0, 3.0, frames)
    assert scales.dtype == np.float32
    np.testing.assert_allclose(scales, expected, rtol=1e-6)


@pytest.mark.parametrize("frames", [2, 8, 14, 25])
def test_the_triangle_is_the_wave_of_comfyui(frames: int) -> None:
    """Its node computes a triangle wave over the frames: twice the distance to the nearest whole number."""
    at = torch.linspace(0, 1, frames)
    wave = 2 * (at - (at + 0.5).floor()).abs()
    np.testing.assert_allclose(guidance_scales("triangular", 1.5, 4.0, frames), 1.5 + 2.5 * wave, rtol=1e-6)


def test_linear_scales_are_those_of_diffusers_to_the_bit() -> None:
    for frames in (1, 2, 14, 25):
        theirs = np.linspace(1.0, 3.0, frames, dtype=np.float32)
        np.testing.assert_array_equal(guidance_scales("linear", 1.0, 3.0, frames), theirs)


def test_a_step_is_guided_from_above_the_low_level_up_to_the_high_one() -> None:
    """The interval of the paper is open below and closed above. The last level is the end, and no step starts there."""
    sigmas = (700.0, 50.0, 5.0, 0.5, 0.0)
    assert guided_steps(sigmas, 3, (0, 50)) == (False, True, True, True)
    assert guided_steps(sigmas, 3, (0.5, 50)) == (False, True, True, False)
    assert guided_steps(sigmas, 3, (0.49, 49.9)) == (False, False, True, True)
    assert guided_steps(sigmas, 3, None) == (True,) * 4
    assert guided_steps(sigmas, 1, (0, 50)) == (False,) * 4, "guidance is off"
    assert guided_steps((float(np.float32(0.1)), 0.0), 3, (0, 0.1)) == (True,), "levels are float32"


def test_an_interval_without_a_step_is_refused_unless_guidance_is_off() -> None:
    with pytest.raises(ArgumentError, match=r"above 800 and up to 900, .* levels from 700 down to 0\.002"):
        guided_steps((700.0, 10.0, 0.002, 0.0), 3, (800, 900))
    assert guided_steps((700.0, 10.0, 0.0), 1, (800, 900)) == (False, False)


@pytest.mark.parametrize(
    "interval",
    [(50, 0), (5, 5), (-1, 5), (float("nan"), 5), (0, float("nan")), (0, float("inf")), (5,), (1, 2, 3), (), "5", 7],
)
def test_intervals_that_are_none(interval: Any) -> None:
    with pytest.raises(ArgumentError, match=r"guidance_interval must be two noise levels .*, the lower one first"):
        Parameters(guidance_interval=interval)


def test_what_decides_whether_there_is_guidance() -> None:
    assert largest_scale("constant", 3, 1) == 1, "the scale of all frames"
    assert largest_scale("linear", 3, 1) == largest_scale("triangular", 3, 1) == 3


def test_the_planner_hears_of_both_kinds_of_steps(dynamic_bundle: Bundle) -> None:
    def kinds(**arguments: Any) -> tuple[bool, bool]:
        request = memory_request(Parameters(**arguments), dynamic_bundle.manifest, 1)
        return request.guided, request.guided_in_part

    assert kinds() == (True, False)
    assert kinds(guidance_interval=(0, 50)) == (True, True)
    assert kinds(guidance_interval=(0, 700)) == (True, False), "every step is in the interval"
    assert kinds(guidance_interval=(0, 50), max_guidance_scale=1.0) == (False, False)
    assert kinds(min_guidance_scale=3.0, max_guidance_scale=1.0) == (True, False)
    assert kinds(min_guidance_scale=3.0, max_guidance_scale=1.0, guidance_shape="constant") == (False, False)


# Frames, against diffusers whose guidance is changed before each step.


@contextmanager
def guidance_by_sigma(reference: Any, scales: Any, interval: tuple[float, float]) -> Iterator[None]:
    """Let diffusers take the ``scales`` of the frames in the interval, and 1 outside it.

    diffusers drops the unconditional branch if no scale is above 1, and that halves its inputs, so 1 is a little more.
    """
    scheduler = reference.scheduler
    scale_model_input = scheduler.scale_model_input

    def before_a_step(sample: Any, timestep: Any) -> Any:
        scaled = scale_model_input(sample, timestep)
        inside = interval[0] < float(scheduler.sigmas[scheduler.step_index]) <= interval[1]
        weights = torch.as_tensor(scales) if inside else torch.full((len(scales),), 1 + 2**-23)
        reference._guidance_scale = weights.reshape(1, -1, 1, 1, 1)
        return scaled

    scheduler.scale_model_input = before_a_step
    try:
        yield
    finally:
        del scheduler.scale_model_input


def frames_of(reference: Any, image: PIL.Image.Image) -> Any:
    frames = reference(image, generator=torch.manual_seed(42), output_type="np", **OPTIONS).frames
    return (frames * 255).round().astype(np.uint8)


@pytest.mark.parametrize(
    ("shape", "interval"), [("linear", (0.3, 20.0)), ("constant", (10.0, 700.0)), ("triangular", (0.0, 10.0))]
)
def test_frames_equal_diffusers(
    shape: GuidanceShape,
    interval: tuple[float, float],
    dynamic_pipe: VideoPipeline,
    reference: Any,
    picture: PIL.Image.Image,
    record_property: Any,
) -> None:
    scales = {"linear": [2, 3.5, 5, 6.5, 8], "constant": [8] * 5, "triangular": [2, 5, 8, 5, 2]}[shape]
    with guidance_by_sigma(reference, np.float32(scales), interval):
        theirs = frames_of(reference, picture)
    arguments: dict[str, Any] = {"min_guidance_scale": 2.0, "max_guidance_scale": 8.0, "seed": 42, "output_type": "np"}
    arguments |= OPTIONS
    ours = dynamic_pipe(picture, guidance_shape=shape, guidance_interval=interval, **arguments).frames
    others = dynamic_pipe(picture, guidance_shape=shape, **arguments).frames
    record_property("psnr_db", psnr(ours, theirs))
    record_property("psnr_db_of_all_steps_guided", psnr(others, theirs))
    assert psnr(ours, theirs) >= 50
    assert psnr(others, theirs) < 45, "guidance in every step must differ for this to show anything"


def test_a_multistep_sampler_goes_on_over_the_change(
    dynamic_pipe: VideoPipeline, reference: Any, picture: PIL.Image.Image
) -> None:
    """The denoised latents of a step with one branch are those that a step with two extrapolates from, and back."""
    euler, interval = reference.scheduler, (0.1, 50.0)
    reference.scheduler = EDMDPMSolverMultistepScheduler(
        sigma_min=0.002, sigma_max=700.0, sigma_data=1.0, prediction_type="v_prediction"
    )
    try:
        with guidance_by_sigma(reference, np.linspace(1, 3, 5, dtype=np.float32), interval):
            theirs = frames_of(reference, picture)
    finally:
        reference.scheduler = euler
    ours = dynamic_pipe(
        picture, sampler="dpmpp-2m", guidance_interval=interval, seed=42, output_type="np", **OPTIONS
    ).frames
    assert psnr(ours, theirs) >= 50


def test_the_settings_say_what_was_taken(small_bundle: Path, picture: PIL.Image.Image) -> None:
    with VideoPipeline.open(small_bundle) as pipe:
        video = pipe(picture, num_inference_steps=2, guidance_interval=[0, 50], guidance_shape="triangular", seed=1)
        assert video.parameters.as_dict()["guidance_interval"] == [0.0, 50.0]
        assert video.metadata["guidance_shape"] == "triangular"
        assert pipe(picture, num_inference_steps=1, seed=1).metadata["guidance_interval"] is None
