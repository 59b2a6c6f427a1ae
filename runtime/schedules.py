"""Noise schedules: functions from a number of steps to the noise levels of a run.

Notation follows Karras et al. 2022 (arXiv:2206.00364).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from svd_trt.engine.manifest import SamplerInfo
from svd_trt.errors import ArgumentError
from svd_trt.units import shorten

__all__ = [
    "LCM_LEVELS",
    "SCHEDULES",
    "adds_one",
    "ays_sigmas",
    "checkpoint_sigmas",
    "custom_sigmas",
    "exponential_sigmas",
    "initial_std",
    "karras_sigmas",
    "lcm_sigmas",
]

Floats = npt.NDArray[np.float32]

_LARGEST_SIGMA = 1e6

# Align Your Steps' levels for SVD, for 10 steps.
_AYS = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)

LCM_LEVELS = 40
"""Levels that AnimateLCM-SVD was distilled on, which are the most steps of ``lcm``."""


def checkpoint_sigmas(info: SamplerInfo, steps: int) -> Floats:
    """The noise levels ``[steps + 1]`` that the checkpoint's scheduler configuration asks for.

    Raises:
        ArgumentError: the schedule is made of the levels of training, and there are fewer of them than ``steps``.
    """
    spaced = _spaced_sigmas(info, steps) if info.training_sigmas else np.empty(0)
    if info.schedule == "training":
        sigmas = spaced
    else:
        low = float(spaced[-1]) if info.sigma_min is None else info.sigma_min
        high = float(spaced[0]) if info.sigma_max is None else info.sigma_max
        if info.schedule == "karras":
            sigmas = karras_sigmas(low, high, info.rho, steps)
        else:
            sigmas = exponential_sigmas(low, high, steps)
    last = sigmas[-1] if info.final_sigma is None else info.final_sigma
    return np.append(sigmas, last).astype(np.float32)


def karras_sigmas(low: float, high: float, rho: float, steps: int) -> npt.NDArray[np.float64]:
    """Noise levels ``[steps]`` from ``high`` to ``low`` (eq. 5)."""
    ramp = np.linspace(0, 1, steps)
    first, last = high ** (1 / rho), low ** (1 / rho)
    return np.asarray((first + ramp * (last - first)) ** rho, np.float64)


def lcm_sigmas(steps: int) -> Floats:
    """The noise levels ``[steps + 1]`` that AnimateLCM-SVD's scheduler takes; the last is 0.

    They are every ``40 // steps``-th of the 40 levels of Karras et al. that the model was distilled on, so 1 step is at
    the highest level, and the lowest of few steps is far above that of the whole schedule.

    Raises:
        ArgumentError: there are fewer levels than ``steps``.
    """
    if steps > LCM_LEVELS:
        raise ArgumentError(
            f"num_inference_steps must be at most {LCM_LEVELS} with the sampler lcm, not {steps}; "
            "a few-step UNet needs 1 to 8"
        )
    levels = karras_sigmas(0.002, 700.0, 7.0, LCM_LEVELS)
    return np.append(levels[:: LCM_LEVELS // steps][:steps], 0).astype(np.float32)


def exponential_sigmas(low: float, high: float, steps: int) -> npt.NDArray[np.float64]:
    """Noise levels ``[steps]`` from ``high`` to ``low``, each the same part of the one before."""
    return np.asarray(np.exp(np.linspace(np.log(high), np.log(low), steps)), np.float64)


def ays_sigmas(steps: int) -> Floats:
    """The noise levels ``[steps + 1]`` of Align Your Steps for SVD (arXiv:2404.14507).

    For other counts than 10, the logarithms of the levels are interpolated, as the authors do. The last level is 0.
    """
    places = np.linspace(0, len(_AYS) - 1, steps + 1)
    sigmas = np.exp(np.interp(places, np.arange(len(_AYS)), np.log(_AYS)))
    return np.append(sigmas[:-1], 0).astype(np.float32)


def _spaced_sigmas(info: SamplerInfo, steps: int) -> npt.NDArray[np.float64]:
    """``steps`` of the levels of training, spaced as in diffusers (table 2 of arXiv:2305.08891); the highest first."""
    levels = len(info.training_sigmas)
    if steps > levels:
        raise ArgumentError(
            f"num_inference_steps must be at most {levels}, the levels of the checkpoint's noise schedule, not {steps}"
        )
    # diffusers rounds in these places and to these types, and a rounded step is another noise level.
    if info.timestep_spacing == "leading":
        times = (np.arange(steps) * (levels // steps))[::-1].astype(np.float32) + info.steps_offset
    elif info.timestep_spacing == "trailing":
        times = np.arange(levels, 0, -levels / steps).round()[:steps].astype(np.float32) - 1
    else:
        times = np.linspace(0, levels - 1, steps, dtype=np.float32)[::-1]
    return np.interp(times, np.arange(levels), info.training_sigmas)


def custom_sigmas(values: Sequence[float]) -> Floats:
    """Check the caller's noise levels, ``[steps + 1]``; the last is the level of the finished video, normally 0.

    Raises:
        ArgumentError: there are fewer than two, or they do not decrease, are negative or not finite.
    """
    try:
        given = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        given = np.empty(0)
    if given.ndim != 1 or len(given) < 2:
        raise ArgumentError("sigmas needs at least two numbers, such as 700, 10, 0")
    if not (given <= _LARGEST_SIGMA).all() or given[-1] < 0:
        raise ArgumentError(f"sigmas must be between 0 and {_LARGEST_SIGMA:g} and decrease")
    sigmas = given.astype(np.float32)
    if (np.diff(sigmas) >= 0).any():
        raise ArgumentError(f"sigmas must decrease, and {shorten(', '.join(f'{v:g}' for v in given))} do not")
    return sigmas


def adds_one(info: SamplerInfo) -> bool:
    """True if sampling starts from a standard deviation of sqrt(sigma^2 + 1), and not sigma."""
    return info.timestep_spacing not in ("linspace", "trailing")


def initial_std(info: SamplerInfo, sigmas: Floats) -> float:
    """Standard deviation of the noise that sampling starts from (diffusers' ``init_noise_sigma``)."""
    highest = sigmas.max()
    return float(np.sqrt(highest**2 + 1)) if adds_one(info) else float(highest)


SCHEDULES: Mapping[str, Callable[[SamplerInfo, int], Floats]] = {
    "karras": lambda info, steps: checkpoint_sigmas(msgspec.structs.replace(info, schedule="karras"), steps),
    "exponential": lambda info, steps: checkpoint_sigmas(msgspec.structs.replace(info, schedule="exponential"), steps),
    "ays": lambda _, steps: ays_sigmas(steps),
}
"""Noise levels ``[steps + 1]`` by name. The first two go over the range that the checkpoint's configuration gives."""
