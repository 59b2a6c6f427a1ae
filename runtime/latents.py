"""Latents that a caller gives: arrays of numpy, of torch and of other libraries, or lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from svd_trt.errors import ArgumentError
from svd_trt.runtime.arrays import is_array, to_numpy

__all__ = ["checked_latents", "float_array"]


def float_array(values: Any, what: str) -> npt.NDArray[np.float32]:
    """Convert ``values`` to float32; see `svd_trt.runtime.arrays.to_numpy` for what they may be.

    Raises:
        ArgumentError: ``values``, which is called ``what``, is not an array of numbers.
    """
    try:
        return np.ascontiguousarray(_on_host(values, what), np.float32)
    except ArgumentError:
        raise
    except (TypeError, ValueError):
        raise ArgumentError(f"{what} must be an array of numbers") from None


def checked_latents(values: Any, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Convert the latents that a generation starts from, of ``shape`` ``[B, F, C, h, w]``, to float32.

    Raises:
        ArgumentError: they are not finite numbers of this shape.
    """
    checked = float_array(values, "latents")
    if checked.shape != shape or not np.isfinite(checked).all():
        raise ArgumentError(f"latents must be finite and of shape {shape}, not {checked.shape}")
    return checked


def _on_host(values: Any, what: str) -> Any:
    """Arrays in host memory; anything else as it is."""
    if isinstance(values, list | tuple):
        return [_on_host(value, what) for value in values]
    return to_numpy(values, what) if is_array(values) else values
