"""Classifier-free guidance: how strong it is in each frame, and which steps have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from svd_trt.errors import ArgumentError
from svd_trt.units import shorten

__all__ = ["GUIDANCE_SHAPES", "GuidanceShape", "checked_interval", "guidance_scales", "guided_steps", "largest_scale"]

GuidanceShape: TypeAlias = Literal["linear", "constant", "triangular"]
GUIDANCE_SHAPES: tuple[GuidanceShape, ...] = get_args(GuidanceShape)

_OFF_UP_TO = 1  # as in diffusers: a scale of 1 or less in every frame is the conditional prediction alone
_LARGEST_SIGMA = 1e6


def guidance_scales(shape: GuidanceShape, low: float, high: float, frames: int) -> npt.NDArray[np.float32]:
    """The guidance scale of each frame, ``[frames]``, between the scales ``low`` and ``high``.

    ``linear`` goes from ``low`` to ``high``, as in SVD's pipeline. ``constant`` is ``high``. ``triangular`` goes from
    ``low`` to ``high`` in the middle and back again, as ComfyUI's node VideoTriangleCFGGuidance does.
    """
    if shape == "constant":
        return np.full(frames, high, np.float32)
    if shape == "linear":
        return np.linspace(low, high, frames, dtype=np.float32)
    rise = 1 - np.abs(2 * np.linspace(0, 1, frames) - 1)
    return (low + rise * (high - low)).astype(np.float32)


def largest_scale(shape: GuidanceShape, low: float, high: float) -> float:
    """The scale that decides whether a video has guidance at all: the largest that the shape may reach."""
    return high if shape == "constant" else max(low, high)


def guided_steps(sigmas: Sequence[float], largest: float, interval: tuple[float, float] | None) -> tuple[bool, ...]:
    """Whether each step of ``sigmas``, ``[S + 1]``, has guidance: S values.

    A step from a noise level with ``low < sigma <= high`` has it (equation 6 of Kynkäänniemi et al. 2024,
    arXiv:2404.07724). Without an interval all steps have it, and none if the ``largest`` scale is 1 or less.

    Raises:
        ArgumentError: there is guidance, and no step is in the interval.
    """
    levels = sigmas[:-1]
    if largest <= _OFF_UP_TO:
        return (False,) * len(levels)
    if interval is None:
        return (True,) * len(levels)
    low, high = np.asarray(interval, np.float32).tolist()  # as the levels are: 0.1 in float32 is above 0.1
    found = tuple(low < sigma <= high for sigma in levels)
    if not any(found):
        raise ArgumentError(
            f"no step has a noise level above {interval[0]:g} and up to {interval[1]:g}, so there would be no "
            f"guidance; the steps start at levels from {levels[0]:g} down to {levels[-1]:g}: give a guidance_interval "
            "with some of them"
        )
    return found


def checked_interval(values: Sequence[float]) -> tuple[float, float]:
    """The caller's interval of noise levels.

    Raises:
        ArgumentError: it is not two numbers from 0 to 1e6, or the second is not the larger one.
    """
    try:
        low, high = map(float, values)
        fits = 0 <= low < high <= _LARGEST_SIGMA
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits or isinstance(values, str | bytes):
        raise ArgumentError(
            "guidance_interval must be two noise levels from 0 to 1e+06, the lower one first, such as 0,50, "
            f"not {_echo(values)}"
        )
    return low, high


def _echo(values: Any) -> str:
    try:
        return shorten(", ".join(f"{value:g}" for value in values) or "an empty list")
    except (TypeError, ValueError):
        return shorten(repr(values))
