"""Exact frame rates, and durations in the coarse units of image formats."""

from __future__ import annotations

import math
import reprlib
from fractions import Fraction

from svd_trt.errors import ArgumentError

_SLOWEST, _FASTEST = Fraction(1, 100), 1000
# libav takes numerators and denominators below 2**31; at 1000 frames a second, this is about half of that.
_FINEST = 1_000_000


def exact_rate(fps: float | Fraction) -> Fraction:
    """Frames a second as the intended fraction: 7.5 is 15/2, 23.976 is 2997/125, 24000/1001 is itself.

    Of a fraction with a denominator above a million, the nearest one without.

    Raises:
        ArgumentError: not a number from 0.01 to 1000.
    """
    try:
        exact = fps if isinstance(fps, Fraction) else Fraction(float(fps))
    except (ValueError, OverflowError):  # NaN, infinity, or a whole number that is larger than any float
        exact = Fraction(0)
    if not _SLOWEST <= exact <= _FASTEST:
        raise ArgumentError(f"fps must be from {float(_SLOWEST)} to {_FASTEST}, got {reprlib.repr(fps)}")
    # 1001 is the largest denominator in use (NTSC), and large enough for the decimals that users write.
    return exact.limit_denominator(_FINEST if isinstance(fps, Fraction) else 1001)


def duration(index: int, fps: Fraction, unit: int) -> int:
    """How long frame ``index`` is shown, in whole ``1/unit`` seconds.

    The time at which a frame ends is rounded, not its duration, so rounding errors do not add up: at 7 frames a second
    and 100 units the durations are 14, 15, 14, 14, 14, 15, 14, and seven frames take exactly a second.
    """
    return _end(index + 1, fps, unit) - _end(index, fps, unit)


def _end(count: int, fps: Fraction, unit: int) -> int:
    return math.floor(count * unit / fps + Fraction(1, 2))
