"""Tables of sigmas and coefficients against diffusers' schedulers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.schedulers import AysSchedules

from svd_trt.engine.manifest import SamplerInfo
from svd_trt.errors import ArgumentError
from svd_trt.runtime.samplers import SAMPLERS, ab2, dpmpp_2m, euler, unic
from svd_trt.runtime.schedules import SCHEDULES, ays_sigmas, checkpoint_sigmas, custom_sigmas, initial_std
from tests.runtime.textbook import share

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


@pytest.mark.parametrize("steps", [1, 2, 8, 25])
@pytest.mark.parametrize("name", ["karras", "exponential"])
@pytest.mark.parametrize("own", ["karras", "exponential", "training"])
def test_named_schedules_are_diffusers(name: str, own: str, steps: int) -> None:
    """Whatever the schedule of the checkpoint is; without a range, it is that of the levels of training."""
    config: dict[str, Any] = {"sigma_min": 0.002, "sigma_max": 700.0} if own != "training" else {}
    theirs = EulerDiscreteScheduler(
        use_karras_sigmas=name == "karras",
        use_exponential_sigmas=name == "exponential",
        timestep_type="continuous",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        **config,
    )
    levels = ((1 - theirs.alphas_cumprod) / theirs.alphas_cumprod) ** 0.5
    trained = {} if config else {"training_sigmas": tuple(map(float, levels))}
    bounds = {"sigma_min": None, "sigma_max": None} | config
    info = SamplerInfo(rho=7.0, timestep_spacing="trailing", schedule=own, **bounds, **trained)  # type: ignore[arg-type]
    theirs.set_timesteps(steps)
    np.testing.assert_allclose(SCHEDULES[name](info, steps), theirs.sigmas.numpy(), rtol=1e-6)


def test_align_your_steps() -> None:
    published = AysSchedules["StableDiffusionVideoSigmas"]
    np.testing.assert_allclose(ays_sigmas(10), published, rtol=1e-6)
    assert SCHEDULES["ays"](INFO, 10).tolist() == ays_sigmas(10).tolist()
    # Between two published levels a and b, a part p of the way: a^(1 - p) b^p. The lowest one is 0.002.
    a, b, c = published[6], published[7], published[9]
    np.testing.assert_allclose(ays_sigmas(8)[[4, 5]], [published[5], a**0.75 * b**0.25], rtol=1e-6)
    np.testing.assert_allclose(ays_sigmas(5), [*published[::2][:5], 0], rtol=1e-6)
    np.testing.assert_allclose(ays_sigmas(20)[[18, 19, 20]], [c, (c * 0.002) ** 0.5, 0], rtol=1e-6)
    assert ays_sigmas(1).tolist() == [700, 0]


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


def levels_to_try() -> list[npt.NDArray[np.float32]]:
    """Schedules that end at 0 and above, with steps of all widths."""
    wide, uneven = np.geomspace(1e5, 1e-3, 4), np.sort(np.random.default_rng(1).uniform(0.01, 90, 30))[::-1]
    full = [checkpoint_sigmas(INFO, steps) for steps in (2, 5, 25, 300)] + [ays_sigmas(steps) for steps in (3, 8, 16)]
    ends = [levels[:-1] for levels in full if len(levels) > 3]
    return [*full, *ends, wide.astype(np.float32), uneven.astype(np.float32)]


@pytest.mark.parametrize("sigmas", levels_to_try(), ids=len)
def test_unic_and_ab2_integrate_straight_lines(sigmas: npt.NDArray[np.float32]) -> None:
    """The coefficients, to 1e-6, are those that quadrature gives."""
    corrected, goes_on = [0.0], [0.0]  # added to Euler's step, times the change of the denoised latents
    for before, now, end in np.stack([sigmas[:-2], sigmas[1:-1], sigmas[2:]], axis=1).astype(np.float64):
        corrected.append(share(before, now, before, now, np.log) * end / now)
        goes_on.append(share(before, now, now, end, lambda sigma: sigma) - (1 - end / now) if end > 0 else 0)
    ratio = sigmas[1:].astype(np.float64) / sigmas[:-1]
    for table, added in ((unic(sigmas), np.array(corrected)), (ab2(sigmas), np.array(goes_on))):
        wanted = np.stack([ratio, 1 - ratio + added, -added], axis=1)
        np.testing.assert_allclose(table[:, 4:], wanted, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(table[:, :4], euler(sigmas)[:, :4])


@pytest.mark.parametrize("solver", ["bh1", "bh2"])
def test_unic_is_diffusers_but_for_its_approximate_weight(solver: str) -> None:
    """With the weight that diffusers takes at order 1, the table makes the steps of `UniPCMultistepScheduler`."""
    generator = torch.Generator().manual_seed(0)
    theirs = UniPCMultistepScheduler(solver_order=1, solver_type=solver, prediction_type="sample")
    sigmas = ays_sigmas(7)[:-1]  # diffusers' bh1 is not a number where it ends at 0
    theirs.set_timesteps(6)
    theirs.sigmas = torch.from_numpy(sigmas)
    table = unic(sigmas).astype(np.float64)
    shorter = sigmas[1:-1] / sigmas[:-2]
    approximate = -np.log(shorter) / 2 if solver == "bh1" else (1 - shorter) / 2
    second = np.append(0, table[1:, 4] * approximate)
    assert np.abs(second + table[:, 6]).max() > 0.01
    table[:, 5] += second + table[:, 6]
    table[:, 6] = -second
    latents = torch.randn(2, 3, 4, 6, 8, generator=generator) * 700
    before = torch.zeros_like(latents)
    for i, (a, b, c) in enumerate(table[:, 4:]):
        denoised = torch.randn(latents.shape, generator=generator)
        scale = (1 + sigmas[i] ** 2) ** -0.5, (1 + sigmas[i + 1] ** 2) ** -0.5  # theirs have the variance 1 throughout
        following = theirs.step(denoised, theirs.timesteps[i], latents * scale[0]).prev_sample / scale[1]
        torch.testing.assert_close(a * latents + b * denoised + c * before, following, rtol=2e-5, atol=5e-5)
        latents, before = following, denoised


SOLVERS = sorted(set(SAMPLERS) - {"lcm"})  # of the probability flow; lcm jumps to its end, and adds noise


def test_orders_of_convergence() -> None:
    """Data of the variance 1/4 have a flow that is known: x is proportional to sqrt(1/4 + sigma^2)."""
    errors: dict[str, list[float]] = {}
    for name in SOLVERS:
        make = SAMPLERS[name]
        for steps in (64, 128):
            sigmas = checkpoint_sigmas(INFO, steps)[:-1]
            x, before = 1.0, 0.0
            for sigma, (a, b, c) in zip(sigmas, make(sigmas)[:, 4:].astype(float), strict=False):
                denoised = x / 4 / (1 / 4 + float(sigma) ** 2)
                x, before = a * x + b * denoised + c * before, denoised
            exact = np.sqrt((1 / 4 + float(sigmas[-1]) ** 2) / (1 / 4 + float(sigmas[0]) ** 2))
            errors.setdefault(name, []).append(abs(x - exact))
    rates = {name: coarse / fine for name, (coarse, fine) in errors.items()}
    assert 1.8 < rates.pop("euler") < 2.2
    assert all(3.4 < rate < 4.6 for rate in rates.values()), rates


def test_equal_levels_change_nothing() -> None:
    """diffusers' plain sigmas at 1000 steps begin with the highest level twice, and then nothing has a slope."""
    sigmas = np.array([3, 3, 1, 0.5, 0.5], np.float32)
    for name in SOLVERS:
        table = SAMPLERS[name](sigmas)
        assert np.isfinite(table).all()
        np.testing.assert_array_equal(table[:2], euler(sigmas)[:2])
        assert table[3, 4] == 1
        assert table[3, 5] == -table[3, 6]


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
