"""Noise schedules and samplers, as tables of which the denoiser takes one row per step.

A sampler is a function from sigmas to coefficients: for each step, the preconditioning of the network and the
weights of a linear update ``x_next = a x + b denoised + c previous_denoised``. To add a sampler, write such a
function and add it to `SAMPLERS`: ``--sampler`` and ``sampler=`` take its name, and no network changes. Notation
follows Karras et al. 2022 (arXiv:2206.00364).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from svd_trt.engine.manifest import SamplerInfo
from svd_trt.engine.spec import COEFFICIENTS
from svd_trt.errors import ArgumentError
from svd_trt.units import shorten

__all__ = ["SAMPLERS", "adds_one", "custom_sigmas", "euler", "initial_std", "karras_sigmas", "precondition"]

Floats = npt.NDArray[np.float32]

_LARGEST_SIGMA = 1e6


def karras_sigmas(info: SamplerInfo, steps: int) -> Floats:
    """Noise levels ``[steps + 1]`` from sigma_max to sigma_min, then 0 (eq. 5)."""
    ramp = np.linspace(0, 1, steps)
    low, high = info.sigma_min ** (1 / info.rho), info.sigma_max ** (1 / info.rho)
    sigmas = (high + ramp * (low - high)) ** info.rho
    return np.append(sigmas, 0.0).astype(np.float32)


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


def precondition(sigmas: Floats) -> Floats:
    """``[S, 4]``: c_in, c_noise, c_skip, c_out at each level for v-prediction with data of unit variance (table 1).

    c_noise is ``0.25 ln(sigma)``, the continuous timestep that SVD's UNet takes.
    """
    sigma = sigmas.astype(np.float64)
    root = np.sqrt(sigma**2 + 1)
    table = np.stack([1 / root, 0.25 * np.log(sigma), 1 / root**2, -sigma / root], axis=1)
    return table.astype(np.float32)


def euler(sigmas: Floats) -> Floats:
    """Euler's method on the probability flow (algorithm 2 without churn and correction), ``[steps, 7]``.

    ``x + (x - denoised) / sigma * (sigma_next - sigma)`` with ratio ``r = sigma_next / sigma`` is
    ``r x + (1 - r) denoised``.
    """
    ratio = (sigmas[1:].astype(np.float64) / sigmas[:-1]).reshape(-1, 1)
    update = np.hstack([ratio, 1 - ratio, np.zeros_like(ratio)])
    table = np.hstack([precondition(sigmas[:-1]), update]).astype(np.float32)
    assert table.shape[1] == len(COEFFICIENTS)
    return table


SAMPLERS: Mapping[str, Callable[[Floats], Floats]] = {"euler": euler}
