"""Samplers, as tables of which the denoiser takes one row per step.

A sampler is a function from sigmas to coefficients: for each step, the preconditioning of the network and the
weights of a linear update ``x_next = a x + b denoised + c previous_denoised``. To add a sampler, write such a
function and add it to `SAMPLERS`: ``--sampler`` and ``sampler=`` take its name, and no network changes. Notation
follows Karras et al. 2022 (arXiv:2206.00364). The sigmas are from `svd_trt.runtime.schedules`.

A sampler in `NOISY` gets fresh noise of unit variance in the place of the previous denoised latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from svd_trt.engine.spec import COEFFICIENTS

__all__ = [
    "NOISY",
    "SAMPLERS",
    "ab2",
    "dpmpp_2m",
    "euler",
    "few_step_notes",
    "known_harm",
    "lcm",
    "noisy_steps",
    "precondition",
    "unic",
]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# With fewer steps, diffusers' DPM-Solver++ makes the last one by Euler's method.
_STEPS_FOR_A_FULL_LAST_STEP = 15

# DPM-Solver++ on the Karras schedule extrapolates too far if there are few steps. By step count: its error and Euler's
# to the true clips of examples/tiny, with 8 pictures.
_OVERSHOOT = {15: (0.030, 0.028), 12: (0.034, 0.028), 10: (0.045, 0.029), 8: (0.065, 0.030), 5: (0.085, 0.034)}


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
    second[1:] = (1 - ratio[1:]) * _quotient(np.where(np.isfinite(width[1:]), width[1:], 0), 2 * width[:-1])
    if sigmas[-1] == 0 or len(ratio) < _STEPS_FOR_A_FULL_LAST_STEP:
        second[-1] = 0
    return _table(sigmas, ratio, second)


def unic(sigmas: Floats) -> Floats:
    """Euler's method with the corrector UniC-1 (UniPC, arXiv:2302.04867), ``[steps, 7]``.

    Euler's step from s to t is made again when the denoised latents at its end are known: it then integrates their
    straight line in log(sigma) exactly, which adds ``k (denoised at t - denoised at s)`` with
    ``k = 1 - (1 - t / s) / log(s / t)``. The correction is a part of the next step, so it costs no evaluation. This is
    the paper's corrector with its coefficient solved for, in which B(h) cancels out. At order 1, diffusers'
    `UniPCMultistepScheduler` takes an approximation instead: half of log(s / t) with ``bh1``, half of 1 - t / s with
    ``bh2``. The last step ends in denoised latents that nothing corrects; if it ends at 0, it is Euler's.
    """
    ratio = _ratios(sigmas)
    width = -np.log(ratio[:-1])  # in log(sigma), of the steps that are corrected
    second = np.zeros_like(ratio)
    second[1:] = ratio[1:] * _quotient(width + np.expm1(-width), width)
    return _table(sigmas, ratio, second)


def ab2(sigmas: Floats) -> Floats:
    """Adams-Bashforth of second order for the denoised latents over sigma, exponential, ``[steps, 7]``.

    The probability flow ``dx/dsigma = (x - denoised) / sigma`` is solved exactly for denoised latents that go on in the
    straight line through this step's and the previous one's, as in DEIS (arXiv:2204.13902), which extrapolates the
    noise. From s to t that adds ``t (log(s / t) - (s / t - 1))`` times the slope of the line. The first step is
    Euler's, and so is the last one if it ends at 0.
    """
    ratio = _ratios(sigmas)
    sigma = sigmas.astype(np.float64)
    before, now, after = sigma[:-2], sigma[1:-1], sigma[2:]
    second = np.zeros_like(ratio)
    width = np.log(now / np.where(after > 0, after, now))
    second[1:] = np.where(after > 0, _quotient(now - after - after * width, before - now), 0)
    return _table(sigmas, ratio, second)


def _quotient(numerator: Doubles, denominator: Doubles) -> Doubles:
    """The quotient; 0 if the denominator is, because two levels are equal and there is no line through them."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


def lcm(sigmas: Floats) -> Floats:
    """Sampling of consistency models in several steps (arXiv:2303.01469, algorithm 1), ``[steps, 7]``.

    The next latents are the denoised ones with fresh noise of the next level, as AnimateLCM-SVD's scheduler makes them.
    """
    update = np.stack([np.zeros(len(sigmas) - 1), np.ones(len(sigmas) - 1), sigmas[1:]], axis=1)
    return np.hstack([precondition(sigmas[:-1]), update]).astype(np.float32)


def few_step_notes(sampler: str, steps: int, guidance: float) -> list[str]:
    """What to say of arguments that a few-step UNet was not made for; ``guidance`` is the largest scale."""
    if sampler != "lcm" or (steps <= 8 and guidance <= 1.5):
        return []
    return [
        f"sampler lcm is for few-step UNets (svd-trt build --unet), in 1 to 8 steps with guidance 1 to 1.5; "
        f"this video has {steps} steps and guidance up to {guidance:g}"
    ]


def noisy_steps(sampler: str, sigmas: Sequence[float]) -> int:
    """Of how many steps, the first ones, ``sampler`` takes fresh noise; a step that ends at 0 takes none."""
    return int(np.count_nonzero(sigmas[1:])) if sampler in NOISY else 0


def _ratios(sigmas: Floats) -> Doubles:
    """``sigma_next / sigma`` of each step."""
    return np.asarray(sigmas[1:].astype(np.float64) / sigmas[:-1], np.float64)


def _table(sigmas: Floats, ratio: Doubles, second: Doubles) -> Floats:
    """Rows of Euler's update, with ``second`` times the change of the denoised latents since the step before."""
    update = np.stack([ratio, 1 - ratio + second, -second], axis=1)
    table = np.hstack([precondition(sigmas[:-1]), update]).astype(np.float32)
    assert table.shape[1] == len(COEFFICIENTS)
    return table


SAMPLERS: Mapping[str, Callable[[Floats], Floats]] = {
    "euler": euler,
    "unic": unic,
    "dpmpp-2m": dpmpp_2m,
    "ab2": ab2,
    "lcm": lcm,
}

NOISY = ("lcm",)


def known_harm(sampler: str, schedule: str | None, steps: int) -> str | None:
    """A warning if videos of this combination were measured to be clearly worse than those of Euler's method.

    With one or two steps, DPM-Solver++ is Euler's method. ``schedule`` is None for levels of the caller's.
    """
    few = max(_OVERSHOOT)
    if (sampler, schedule) != ("dpmpp-2m", "karras") or not 2 < steps <= few:
        return None
    measured = max(count for count in _OVERSHOOT if count <= max(steps, min(_OVERSHOOT)))
    error, by_euler = _OVERSHOOT[measured]
    return (
        f"the sampler dpmpp-2m overshoots on the karras schedule with {steps} steps: on svd-trt's miniature, with "
        f"{measured} steps, its error is {error:.3f}, and euler's {by_euler:.3f}; --sampler unic, --schedule ays or "
        f"{few + 1} steps and more are better (sampler='unic', schedule='ays' in Python)"
    )
