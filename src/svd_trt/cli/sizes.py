"""Byte sizes on the command line, such as ``8GB`` and ``7.5 GiB``, and frame rates, such as ``24000/1001``."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import click

from svd_trt.errors import ArgumentError
from svd_trt.runtime.video import exact_rate
from svd_trt.units import shorten

__all__ = ["ByteSize", "FrameRate"]

_SIZE = re.compile(r"([+-]?)([0-9]{1,16}(?:\.[0-9]{1,16})?)\s*(?:([KMGT])(I?)B?|(B))?", re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}
_SMALLEST_BARE = 1_000_000  # a smaller number without a unit is probably missing its unit


class ByteSize(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """A number of bytes above 0. Units are decimal (GB is 10**9) or binary (GiB is 2**30); G is GB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes in ``value``; an int is returned unchanged."""
        if isinstance(value, int):
            return value
        text = str(value).strip()
        found = _SIZE.fullmatch(text)
        if found is None:
            self.fail(f"{text!r} is not a size such as 8GB, 7.5GB, 8GiB or 800MB", param, ctx)
        sign, digits, prefix, binary, unit = found.groups()
        factor = (1024 if binary else 1000) ** _POWERS[prefix.upper()] if prefix else 1
        size = int(Decimal(digits) * factor)
        if sign == "-" or size == 0:
            self.fail(f"{text} is not more than 0 bytes", param, ctx)
        if prefix is None and unit is None and size < _SMALLEST_BARE:
            self.fail(f"{text} bytes? write {digits}{'GB' if size < 1000 else 'MB'}", param, ctx)
        return size


class FrameRate(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """Frames a second: ``12``, ``23.976`` or ``24000/1001``."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Fraction:
        if isinstance(value, Fraction):
            return value
        try:
            return exact_rate(Fraction(value) if "/" in value else float(value))
        except (ValueError, ZeroDivisionError, ArgumentError):
            given = repr(shorten(value))
            self.fail(f"{given} is not a frame rate from 0.01 to 1000, such as 12, 23.976 or 24000/1001", param, ctx)
