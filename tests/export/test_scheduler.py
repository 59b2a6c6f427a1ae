"""Scheduler configurations: the noise levels that diffusers' own objects make of them, and refusals with a remedy."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest

from svd_trt.errors import ArgumentError, CheckpointError
from svd_trt.export import scheduler
from svd_trt.export.presets import SCHEDULER
from svd_trt.export.scheduler import make_scheduler, read_scheduler
from svd_trt.runtime.samplers import precondition
from svd_trt.runtime.schedules import checkpoint_sigmas, initial_std

EDM = {"sigma_data": 1.0, "rho": 7.0}
PLAIN = {"use_karras_sigmas": False}
NO_BOUNDS = {"sigma_min": None, "sigma_max": None}
OWN_BETAS = {"trained_betas": [0.01 + i / 1000 for i in range(100)], "num_train_timesteps": 100}
STEPS = (1, 2, 5, 25)
NOT_FINITE = (float("nan"), float("inf"), 10**400)  # what Python's JSON reader makes of NaN, Infinity and 1000...

EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "published": ("EulerDiscreteScheduler", {}),
    "plain leading": ("EulerDiscreteScheduler", PLAIN),
    "plain leading, no offset": ("EulerDiscreteScheduler", {**PLAIN, "steps_offset": 0}),
    "plain trailing": ("EulerDiscreteScheduler", {**PLAIN, "timestep_spacing": "trailing"}),
    "plain linspace": ("EulerDiscreteScheduler", {**PLAIN, "timestep_spacing": "linspace"}),
    "plain, linear betas": ("EulerDiscreteScheduler", {**PLAIN, "beta_schedule": "linear"}),
    "plain, cosine": ("EulerDiscreteScheduler", {**PLAIN, "beta_schedule": "squaredcos_cap_v2"}),
    "plain, own betas": ("EulerDiscreteScheduler", {**PLAIN, **OWN_BETAS}),
    "plain, zero terminal SNR": (
        "EulerDiscreteScheduler",
        {**PLAIN, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "plain, sigma_min last": ("EulerDiscreteScheduler", {**PLAIN, "final_sigmas_type": "sigma_min"}),
    "Karras trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "Karras, zero terminal SNR": ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True}),
    "Karras, sigma_min last": ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
    "Karras, no bounds": ("EulerDiscreteScheduler", NO_BOUNDS),
    "Karras, one bound": ("EulerDiscreteScheduler", {"sigma_max": None, "timestep_spacing": "linspace"}),
    "exponential": ("EulerDiscreteScheduler", {**PLAIN, "use_exponential_sigmas": True}),
    "exponential, no bounds": ("EulerDiscreteScheduler", {**PLAIN, "use_exponential_sigmas": True, **NO_BOUNDS}),
    "EDM": ("EDMEulerScheduler", EDM),
    "EDM, its own bounds": ("EDMEulerScheduler", {**EDM, "sigma_min": ..., "sigma_max": ...}),
    "EDM, rho 5": ("EDMEulerScheduler", {**EDM, "rho": 5.0}),
    "EDM, exponential": ("EDMEulerScheduler", {**EDM, "sigma_schedule": "exponential"}),
    "EDM, sigma_min last": ("EDMEulerScheduler", {**EDM, "final_sigmas_type": "sigma_min"}),
    "EDM DPM": ("EDMDPMSolverMultistepScheduler", EDM),
    "EDM DPM, exponential": ("EDMDPMSolverMultistepScheduler", {**EDM, "sigma_schedule": "exponential"}),
    "EDM DPM, sigma_min last": ("EDMDPMSolverMultistepScheduler", {**EDM, "final_sigmas_type": "sigma_min"}),
}


def configuration(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The published configuration with changes; ... leaves a key out."""
    found = SCHEDULER | changes | {"_class_name": kind}
    return {key: value for key, value in found.items() if value is not ...}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("case", EXACT)
def test_the_noise_levels_are_those_of_diffusers(case: str, steps: int) -> None:
    kind, changes = EXACT[case]
    config = configuration(kind, changes)
    theirs = getattr(diffusers, kind).from_config(config)
    theirs.set_timesteps(steps)
    if kind != "EulerDiscreteScheduler" and "exponential" in case and steps == 1:
        pytest.skip("diffusers begins at the lowest level here, and not at the highest as for all other counts")
    info = read_scheduler("svd", config)
    sigmas = checkpoint_sigmas(info, steps)
    # This class computes in single precision, where a power of 7 costs most of a digit.
    tolerance = 4e-6 if kind == "EDMDPMSolverMultistepScheduler" else 1e-6
    np.testing.assert_allclose(sigmas, theirs.sigmas.numpy(), rtol=tolerance, atol=0)
    assert initial_std(info, sigmas) == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    np.testing.assert_allclose(precondition(sigmas[:-1])[:, 1], theirs.timesteps.numpy(), rtol=1e-5, atol=1e-6)
    assert type(make_scheduler(config)) is type(theirs)


def test_the_published_schedule_needs_nothing_else() -> None:
    """A bundle of a published checkpoint has no table of levels, and bundles written before there were any open."""
    info = read_scheduler("svd", SCHEDULER)
    assert (info.training_sigmas, info.schedule, info.solver, info.final_sigma) == ((), "karras", "euler", 0.0)


@pytest.mark.parametrize("exponential", [False, True])
def test_dpm_keeps_levels_and_solver(exponential: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers would give SVD's UNet whole numbers as time steps; the levels are those of its object."""
    config = configuration(
        "DPMSolverMultistepScheduler",
        {"use_karras_sigmas": not exponential, "use_exponential_sigmas": exponential},
    )
    messages = list[str]()
    monkeypatch.setattr(scheduler._log, "warning", lambda text, *values: messages.append(text % values))
    info = read_scheduler("svd", config)
    assert info.solver == "dpmpp-2m"
    assert "time steps that it was not trained with" in messages.pop()
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(config)
    reference = make_scheduler(config)
    for steps in (1, 2, 5, 25):
        theirs.set_timesteps(steps)
        np.testing.assert_allclose(checkpoint_sigmas(info, steps), theirs.sigmas.numpy(), rtol=1e-6, atol=0)
        assert (theirs.timesteps.numpy() == theirs.timesteps.numpy().round()).all()
        if steps > 1 or not exponential:
            reference.set_timesteps(steps)
            np.testing.assert_allclose(checkpoint_sigmas(info, steps), reference.sigmas.numpy(), rtol=4e-6, atol=0)


@pytest.mark.parametrize("order", [1, 2])
def test_the_solver_follows_its_order(order: int) -> None:
    config = configuration("EDMDPMSolverMultistepScheduler", {**EDM, "solver_order": order})
    assert read_scheduler("svd", config).solver == ("euler" if order == 1 else "dpmpp-2m")


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("DDIMScheduler", {}, "is DDIMScheduler.*EulerDiscreteScheduler.*model_index.json"),
        (
            "EulerDiscreteScheduler",
            {"prediction_type": "epsilon"},
            'prediction_type is "epsilon"; set "v_prediction" in',
        ),
        ("EulerDiscreteScheduler", {"prediction_type": ...}, 'prediction_type is "epsilon"'),
        ("EulerDiscreteScheduler", {"timestep_type": "discrete"}, 'timestep_type is "discrete"; set "continuous" in'),
        (
            "EulerDiscreteScheduler",
            {"use_exponential_sigmas": True},
            "use_karras_sigmas and use_exponential_sigmas.*keep one",
        ),
        ("EulerDiscreteScheduler", {**PLAIN, "use_beta_sigmas": True}, "use_beta_sigmas.*set it to false"),
        (
            "EulerDiscreteScheduler",
            {"sigma_min": 800.0},
            "0 < sigma_min < sigma_max, and has 800.0 and 700.0; set 0.002",
        ),
        ("EulerDiscreteScheduler", {"sigma_min": "low"}, "0 < sigma_min < sigma_max"),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "one"}, 'final_sigmas_type is "one"; set "zero"'),
        ("EulerDiscreteScheduler", {"timestep_spacing": "odd"}, 'timestep_spacing is "odd"; set "leading"'),
        ("EulerDiscreteScheduler", {**PLAIN, "interpolation_type": "log_linear"}, 'interpolation_type.*set "linear"'),
        (
            "EulerDiscreteScheduler",
            {**PLAIN, "beta_schedule": "odd"},
            "cannot read the scheduler's betas.*use_karras_sigmas",
        ),
        ("EulerDiscreteScheduler", {**PLAIN, "beta_end": 3.0}, "betas give no noise schedule.*use_karras_sigmas"),
        ("EulerDiscreteScheduler", {**PLAIN, **OWN_BETAS, "num_train_timesteps": 1000}, "num_train_timesteps to 100"),
        ("EulerDiscreteScheduler", {**PLAIN, "steps_offset": "one"}, 'steps_offset is "one"'),
        ("EDMEulerScheduler", {}, "sigma_data is 0.5; set 1.0 in scheduler/scheduler_config.json"),
        (
            "EDMEulerScheduler",
            {**EDM, "sigma_schedule": "odd"},
            'sigma_schedule is "odd"; set "karras" or "exponential" in',
        ),
        ("EDMEulerScheduler", {**EDM, "rho": 0}, "rho is 0; set 7.0"),
        *(("EDMEulerScheduler", {**EDM, "rho": value}, "rho is .*; set 7.0") for value in NOT_FINITE),
        *(
            (kind, {**EDM, key: value}, "0 < sigma_min < sigma_max, and has .* as published")
            for kind in ("EulerDiscreteScheduler", "EDMEulerScheduler")
            for key in ("sigma_min", "sigma_max")
            for value in NOT_FINITE
        ),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas is true; set false in scheduler/"),
        ("EDMDPMSolverMultistepScheduler", {**EDM, "solver_order": 3}, "solver_order is 3; set 1 or 2"),
        ("EDMDPMSolverMultistepScheduler", {**EDM, "algorithm_type": "sde-dpmsolver++"}, 'set "dpmsolver\\+\\+" in'),
        ("EDMDPMSolverMultistepScheduler", {**EDM, "solver_type": "heun"}, 'solver_type is "heun"; set "midpoint"'),
        ("DPMSolverMultistepScheduler", PLAIN, "not those that SVD was trained with; set use_karras_sigmas true"),
        ("DPMSolverMultistepScheduler", NO_BOUNDS, "not those that SVD was trained with"),
        (
            "DPMSolverMultistepScheduler",
            {"final_sigmas_type": "sigma_min"},
            'final_sigmas_type is "sigma_min"; set "zero"',
        ),
    ],
)
def test_other_schedulers_are_refused_with_a_remedy(kind: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        read_scheduler("svd", configuration(kind, changes))


def test_more_steps_than_levels() -> None:
    info = read_scheduler("svd", configuration(*EXACT["plain, own betas"]))
    assert len(checkpoint_sigmas(info, 100)) == 101
    with pytest.raises(ArgumentError, match="at most 100, the levels of the checkpoint's noise schedule, not 101"):
        checkpoint_sigmas(info, 101)
