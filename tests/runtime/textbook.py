"""Samplers of second order as their papers derive them: states that are corrected, and integrals of straight lines.

Nothing here is a table of coefficients. Integrals are sums of Gauss and Legendre over sub-intervals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from diffusers import EulerDiscreteScheduler

Line = Callable[[Any], Any]
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(48)


def integral(function: Line, low: float, high: float) -> float:
    """Of a smooth function of an array."""
    edges = np.linspace(low, high, 9)
    middles, halves = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    return float((function(middles[:, None] + halves[:, None] * _NODES) @ _WEIGHTS) @ halves)


def share(before: float, now: float, start: float, end: float, axis: Line) -> float:
    """The weight of the denoised latents at the level ``now`` in the exact flow from ``start`` to ``end``.

    The denoised latents are those of the straight line over ``axis(sigma)`` that has values at ``before`` and ``now``.
    The flow from s to t is ``x(t) = (t / s) x(s) + t (integral of exp(l) denoised dl)`` over ``l = -log(sigma)``.
    """

    def part(level: Any) -> Any:
        sigma = np.exp(-level)
        return np.exp(level) * (axis(sigma) - axis(before)) / (axis(now) - axis(before))

    return end * integral(part, -np.log(start), -np.log(end))


class Textbook(EulerDiscreteScheduler):  # type: ignore[misc]  # diffusers has no types
    """The scheduler of diffusers for Euler's method, whose steps are made by `update` instead."""

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas)
        self.history: list[tuple[Any, Any]] = []  # the state that a step started from, and its denoised latents

    def step(self, prediction: Any, timestep: Any, sample: Any, *_: Any, **__: Any) -> Any:
        if self.step_index is None:
            self._init_step_index(timestep)
        levels = [float(sigma) for sigma in self.sigmas[: self.step_index + 2]]
        result = super().step(prediction, timestep, sample)
        result.prev_sample = self.update(levels, sample, result.pred_original_sample)
        return result

    def update(self, levels: list[float], sample: Any, denoised: Any) -> Any:
        """The next latents; the last two of ``levels`` are the step's."""
        raise NotImplementedError


class PredictorCorrector(Textbook):
    """UniPC at order 1: a state is predicted by Euler's method, and made again when its denoised latents are known."""

    def update(self, levels: list[float], sample: Any, denoised: Any) -> Any:
        now, end = levels[-2:]
        if self.history:
            before = levels[-3]
            state, old = self.history[-1]
            weight = share(before, now, before, now, np.log)
            sample = now / before * state + (1 - now / before - weight) * old + weight * denoised
        self.history.append((sample, denoised))
        return end / now * sample + (1 - end / now) * denoised


class AdamsBashforth(Textbook):
    """The line through this step's and the last step's denoised latents over sigma goes on; to 0, Euler's method."""

    def update(self, levels: list[float], sample: Any, denoised: Any) -> Any:
        now, end = levels[-2:]
        total = 1 - end / now
        weight = share(levels[-3], now, now, end, lambda sigma: sigma) if self.history and end > 0 else total
        old = self.history[-1][1] if self.history else denoised
        self.history.append((sample, denoised))
        return end / now * sample + weight * denoised + (total - weight) * old


TEXTBOOK: dict[str, type[Textbook]] = {"unic": PredictorCorrector, "ab2": AdamsBashforth}
