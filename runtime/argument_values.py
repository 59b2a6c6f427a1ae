"""Single values of arguments, checked: a colour, a word of several, seeds, numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.ImageColor

from svd_trt.errors import ArgumentError
from svd_trt.runtime.picture_colours import Colour
from svd_trt.units import shorten

__all__ = ["choice_of", "colour_of", "number_of", "seeds_of"]


def colour_of(text: str) -> Colour:
    """Red, green and blue of ``text``, a colour in the notation of CSS.

    Raises:
        ArgumentError: it is not one, or has an alpha.
    """
    try:
        colour: tuple[int, ...] = PIL.ImageColor.getrgb(text)
    except (ValueError, AttributeError, TypeError):  # the last two if it is no text
        colour = ()
    if len(colour) != 3:
        raise ArgumentError(
            f"background must be an opaque colour such as white, #ff8000 or rgb(255,128,0), not {_echo(text)}"
        )
    red, green, blue = colour
    return red, green, blue


def _echo(value: Any) -> str:
    return shorten(repr(value))


def choice_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of ``choices``, which may be written with underscores."""
    found = value.replace("_", "-") if isinstance(value, str) else value
    if found not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(choices)}, not {_echo(value)}")
    return str(found)


def seeds_of(value: Any, limits: Mapping[str, Any]) -> int | tuple[int, ...]:
    """One seed, or several."""
    if hasattr(value, "get_state") or hasattr(value, "bit_generator"):
        raise ArgumentError("seed must be a whole number; pass a generator of torch as generator=")
    if not isinstance(value, list | tuple | range | np.ndarray) or np.ndim(value) == 0:
        return int(number_of("seed", value, int, limits))
    if len(value) == 0:
        raise ArgumentError("seed is an empty list; give one seed, or one for each video")
    seeds = tuple(int(number_of("each seed", seed, int, limits)) for seed in value)
    return seeds[0] if len(seeds) == 1 else seeds


def number_of(name: str, value: Any, kind: type, limits: Mapping[str, Any]) -> Any:
    """``value`` as a ``kind``, int or float, if that is exact, finite and within ``min`` and ``max`` of ``limits``."""
    low, high = limits["min"], limits["max"]
    try:
        number = kind(value)
        exact = number == value and math.isfinite(number)
    except (TypeError, ValueError, OverflowError):
        exact = False
    if not exact or isinstance(value, bool | str):
        raise ArgumentError(f"{name} must be {'a number' if kind is float else 'a whole number'}, not {_echo(value)}")
    if (low is not None and number < low) or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"{low} to {high}"
        raise ArgumentError(f"{name} must be {bounds}, not {_echo(value)}")
    return number
