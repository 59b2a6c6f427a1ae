"""Tables of sigmas and coefficients against diffusers' schedulers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EulerDiscreteScheduler

from svd_trt.engine.manifest import SamplerInfo
from svd_trt.errors import ArgumentError
from svd_trt.runtime.samplers import SAMPLERS, dpmpp_2m, euler
from svd_trt.runtime.schedules import checkpoint_sigmas, custom_sigmas, initial_std

INFO = SamplerInfo(sigma_min=0.002, sigma_max=700.0, rho=7.0, timestep_spacing="leading")


def scheduler(spacing: str = "leading") -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_spacing=spacing,
        steps_offset=1,
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25, 100, 1000])
def test_karras_sigmas(steps: int) -> None:
    theirs = scheduler()
    theirs.set_timesteps(steps)
    np.testing.assert_array_equal(checkpoint_sigmas(INFO, steps), theirs.sigmas.numpy())


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_initial_std(spacing: str) -> None:
    theirs = scheduler(spacing)
    theirs.set_timesteps(10)
    info = SamplerInfo(sigma_min=0.002, sigma_max=700.0, rho=7.0, timestep_spacing=spacing)
    assert initial_std(info, checkpoint_sigmas(info, 10)) == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)


def test_euler_steps_are_diffusers() -> None:
    """Every step of a run, with predictions drawn at random: input, timestep, denoised and next latents."""
    generator = torch.Generator().manual_seed(0)
    theirs = scheduler()
    theirs.set_timesteps(12)
    table = euler(checkpoint_sigmas(INFO, 12))
    latents = torch.randn(2, 3, 4, 6, 8, generator=generator) * theirs.init_noise_sigma
    for (c_in, c_noise, c_skip, c_out, a, b, c), timestep in zip(table, theirs.timesteps, strict=True):
        prediction = torch.randn(latents.shape, generator=generator)
        scaled = theirs.scale_model_input(latents, timestep)
        step = theirs.step(prediction, timestep, latents)
        torch.testing.assert_close(latents * c_in, scaled, rtol=2e-6, atol=1e-6)
        assert c_noise == pytest.approx(float(timestep), rel=1e-5, abs=1e-6)
        denoised = c_skip * latents + c_out * prediction
        torch.testing.assert_close(denoised, step.pred_original_sample, rtol=1e-5, atol=1e-5)
        assert c == 0
        torch.testing.assert_close(a * latents + b * denoised, step.prev_sample, rtol=1e-5, atol=2e-5)
        latents = step.prev_sample


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [1, 2, 14, 15, 20])
def test_dpmpp_2m_steps_are_diffusers(steps: int, final: str) -> None:
    """Every step of a run, with predictions drawn at random; from 15 steps on, the last may be of second order."""
    generator = torch.Generator().manual_seed(0)
    theirs = EDMDPMSolverMultistepScheduler(
        sigma_min=0.002, sigma_max=700.0, sigma_data=1.0, prediction_type="v_prediction", final_sigmas_type=final
    )
    theirs.set_timesteps(steps)
    table = dpmpp_2m(theirs.sigmas.numpy())
    latents = torch.randn(2, 3, 4, 6, 8, generator=generator) * theirs.init_noise_sigma
    before = torch.zeros_like(latents)
    for (c_in, c_noise, c_skip, c_out, a, b, c), timestep in zip(table, theirs.timesteps, strict=True):
        prediction = torch.randn(latents.shape, generator=generator)
        torch.testing.assert_close(latents * c_in, theirs.scale_model_input(latents, timestep), rtol=2e-6, atol=1e-6)
        assert c_noise == pytest.approx(float(timestep), rel=1e-5, abs=1e-6)
        denoised = c_skip * latents + c_out * prediction
        following = theirs.step(prediction, timestep, latents).prev_sample
        torch.testing.assert_close(a * latents + b * denoised + c * before, following, rtol=1e-5, atol=3e-5)
        latents, before = following, denoised


def test_last_step_is_the_denoised_latents() -> None:
    for make in SAMPLERS.values():
        assert list(make(checkpoint_sigmas(INFO, 5))[-1, 4:]) == [0, 1, 0]


@pytest.mark.parametrize(
    "values",
    [
        [],
        [1],
        [1, 1, 0],
        [1, 2],
        [3, 2, -1],
        [float("inf"), 0],
        [[2, 1]],
        [1e30, 1, 0],
        [float("nan"), 0],
        5,
        "700,1,0",
        ["a"],
    ],
)
def test_bad_sigmas(values: Any) -> None:
    with pytest.raises(ArgumentError):
        custom_sigmas(values)


def test_every_sampler_gives_a_row_a_step() -> None:
    for make in SAMPLERS.values():
        assert make(checkpoint_sigmas(INFO, 7)).shape == (7, 7)
