"""From rounds to figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from svd_trt.benchmarks.schema import Measure

__all__ = ["fit_line", "fit_power", "measure", "ratios"]


def measure(values: Sequence[float]) -> Measure:
    """Median and range; of at least one value."""
    return Measure(statistics.median(values), min(values), max(values))


def ratios(baseline: Sequence[float], other: Sequence[float]) -> Measure:
    """Baseline over other, round by round, and only then the median: a machine's drift cancels within a round."""
    return measure([a / b for a, b in zip(baseline, other, strict=True)])


def fit_line(at: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept by least squares; of at least two different places."""
    slope, intercept = np.polyfit(at, values, 1)
    return float(slope), float(intercept)


def fit_power(at: Sequence[float], values: Sequence[float]) -> float:
    """Exponent of the power law through positive points: 1 is proportional, 2 quadratic."""
    return fit_line([math.log(a) for a in at], [math.log(v) for v in values])[0]
