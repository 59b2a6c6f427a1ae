"""How sizes, counts and durations are written."""

from __future__ import annotations

import pytest

from svd_trt.units import format_bytes, format_count, format_seconds, round_up_bytes


@pytest.mark.parametrize(
    ("size", "down", "up"),
    [
        (None, "-", "-"),
        (0, "0 bytes", "0 bytes"),
        (999, "999 bytes", "999 bytes"),
        (1000, "1 kB", "1 kB"),
        (382_336, "382.33 kB", "382.34 kB"),
        (800_000_000, "800 MB", "800 MB"),
        (999_999_999, "999.99 MB", "1 GB"),
        (4_936_000_000, "4.93 GB", "4.94 GB"),
        (8 * 10**9, "8 GB", "8 GB"),
        (12_340_000_000_000, "12340 GB", "12340 GB"),
        (1.5, "1 bytes", "2 bytes"),
    ],
)
def test_sizes(size: float | None, down: str, up: str) -> None:
    assert format_bytes(size) == down
    assert format_bytes(size, round_up=True) == up


@pytest.mark.parametrize("size", [1, 999, 1001, 123_456, 999_999_999, 4_931_111_111])
def test_a_size_rounded_up_is_enough(size: int) -> None:
    shown = round_up_bytes(size)
    assert size <= shown <= size * 1.01
    assert format_bytes(shown) == format_bytes(shown, round_up=True) == format_bytes(size, round_up=True)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (91_400, "91.4 k"), (632e6, "632 M"), (1.39e9, "1.39 G")],
)
def test_counts(count: float, text: str) -> None:
    assert format_count(int(count)) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0387, "0.039 s"), (3.21, "3.2 s"), (59.9, "59.9 s"), (125.7, "2 min 05 s")]
)
def test_durations(value: float, text: str) -> None:
    assert format_seconds(value) == text
