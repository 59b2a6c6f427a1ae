"""Exact frame rates, and durations in the coarse units of image formats."""

from __future__ import annotations

import math
from fractions import Fraction

from svd_trt.errors import ArgumentError

_SLOWEST, _FASTEST = Fraction(1, 100), 1000


def exact_rate(fps: float | Fraction) -> Fraction:
    """Frames a second as the intended fraction: 7.5 is 15/2, 23.976 is 2997/125, 24000/1001 is itself.

    Raises:
        ArgumentError: not a number from 0.01 to 1000.
    """
    if not math.isfinite(fps) or not _SLOWEST <= fps <= _FASTEST:
        raise ArgumentError(f"fps must be from {float(_SLOWEST)} to {_FASTEST}, got {fps}")
    # 1001 is the largest denominator in use (NTSC), and large enough for the decimals that users write.
    return fps if isinstance(fps, Fraction) else Fraction(float(fps)).limit_denominator(1001)


def duration(index: int, fps: Fraction, unit: int) -> int:
    """How long frame ``index`` is shown, in whole ``1/unit`` seconds.

    The time at which a frame ends is rounded, not its duration, so rounding errors do not add up: at 7 frames a second
    and 100 units the durations are 14, 15, 14, 14, 14, 15, 14, and seven frames take exactly a second.
    """
    return _end(index + 1, fps, unit) - _end(index, fps, unit)


def _end(count: int, fps: Fraction, unit: int) -> int:
    return math.floor(count * unit / fps + Fraction(1, 2))
