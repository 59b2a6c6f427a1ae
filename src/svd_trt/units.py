"""How sizes, counts, durations and texts of the user are written, in messages and tables alike."""

from __future__ import annotations

import math

__all__ = ["format_bytes", "format_count", "format_seconds", "round_up_bytes", "shorten"]

_LONGEST_TEXT = 300  # characters; most paths are shorter
_BYTES = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes"))


def format_bytes(size: float | None, *, round_up: bool = False) -> str:
    """``8 GB``, ``4.93 GB``, ``800 MB``: at most two decimals, rounded down unless ``round_up``; ``-`` for None.

    A size that the reader has to provide is rounded up, so that the figure shown is enough.
    """
    if size is None:
        return "-"
    size = round_up_bytes(size) if round_up else math.floor(size)
    factor, unit = _unit(size)
    hundredths = size * 100 // factor
    return f"{hundredths / 100:.2f}".rstrip("0").rstrip(".") + f" {unit}"


def round_up_bytes(size: float) -> int:
    """The number of bytes that `format_bytes` shows when it rounds ``size`` up."""
    whole = math.ceil(size)
    step = max(_unit(whole)[0] // 100, 1)
    return -(-whole // step) * step


def format_count(count: int) -> str:
    """``632 M``, ``1.39 G``, ``150 T``: three digits and a factor of a thousand."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * factor:
            return f"{count / factor:.3g} {letter}"
    return str(count)


def format_seconds(value: float) -> str:
    """``0.04 s``, ``3.2 s``, ``2 min 05 s``."""
    if value >= 60:
        return f"{int(value) // 60} min {int(value) % 60:02d} s"
    return f"{value:.2g} s" if value < 1 else f"{value:.1f} s"


def shorten(text: str) -> str:
    """``text`` for a message: if it is very long, such as a ``data:`` URL, its start and its end."""
    return text if len(text) <= _LONGEST_TEXT else f"{text[:80]}… ({len(text):,} characters) …{text[-40:]}"


def _unit(size: int) -> tuple[int, str]:
    return next(unit for unit in _BYTES if size >= unit[0] or unit[0] == 1)
