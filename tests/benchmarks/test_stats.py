"""Figures out of rounds, on numbers whose answer is known."""

from __future__ import annotations

import pytest

from svd_trt.benchmarks.schema import Measure
from svd_trt.benchmarks.stats import fit_line, fit_power, measure, ratios


def test_median_and_range() -> None:
    assert measure([3.0, 1.0, 10.0]) == Measure(3.0, 1.0, 10.0)
    assert measure([2.0]) == Measure(2.0, 2.0, 2.0)


def test_drift_cancels_within_a_round() -> None:
    """The machine becomes four times slower, and one stays twice as fast as the other."""
    assert ratios([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == Measure(2.0, 2.0, 2.0)


def test_fits() -> None:
    assert fit_line([1, 2, 4], [5.0, 7.0, 11.0]) == pytest.approx((2, 3))
    assert fit_power([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0]) == pytest.approx(2)
