"""Samplers, as tables of which the denoiser takes one row per step.

A sampler is a function from sigmas to coefficients: for each step, the preconditioning of the network and the
weights of a linear update ``x_next = a x + b denoised + c previous_denoised``. To add a sampler, write such a
function and add it to `SAMPLERS`: ``--sampler`` and ``sampler=`` take its name, and no network changes. Notation
follows Karras et al. 2022 (arXiv:2206.00364). The sigmas are from `svd_trt.runtime.schedules`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from svd_trt.engine.spec import COEFFICIENTS

__all__ = ["SAMPLERS", "dpmpp_2m", "euler", "precondition"]

Floats = npt.NDArray[np.float32]

# With fewer steps, diffusers' DPM-Solver++ makes the last one by Euler's method.
_STEPS_FOR_A_FULL_LAST_STEP = 15


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
    ratio = _ratios(sigmas)
    return _table(sigmas, ratio, np.zeros_like(ratio))


def dpmpp_2m(sigmas: Floats) -> Floats:
    """DPM-Solver++ of second order, multistep, midpoint (arXiv:2211.01095, algorithm 2), ``[steps, 7]``.

    The denoised latents are extrapolated from this step's and the previous one's. The first step has no previous one
    and is Euler's; so is the last one if it ends at 0, or if there are few steps, as in diffusers.
    """
    ratio = _ratios(sigmas)
    with np.errstate(divide="ignore"):
        width = -np.log(ratio)  # of the steps, in log(sigma)
    second = np.zeros_like(ratio)
    second[1:] = (1 - ratio[1:]) * np.where(np.isfinite(width[1:]), width[1:], 0) / (2 * width[:-1])
    if sigmas[-1] == 0 or len(ratio) < _STEPS_FOR_A_FULL_LAST_STEP:
        second[-1] = 0
    return _table(sigmas, ratio, second)


def _ratios(sigmas: Floats) -> npt.NDArray[np.float64]:
    """``sigma_next / sigma`` of each step."""
    return np.asarray(sigmas[1:].astype(np.float64) / sigmas[:-1], np.float64)


def _table(sigmas: Floats, ratio: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> Floats:
    """Rows of Euler's update, with ``second`` times the change of the denoised latents since the step before."""
    update = np.stack([ratio, 1 - ratio + second, -second], axis=1)
    table = np.hstack([precondition(sigmas[:-1]), update]).astype(np.float32)
    assert table.shape[1] == len(COEFFICIENTS)
    return table


SAMPLERS: Mapping[str, Callable[[Floats], Floats]] = {"euler": euler, "dpmpp-2m": dpmpp_2m}
