"""Latents that a caller gives: numpy arrays, lists, or tensors of torch, which is not imported for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from svd_trt.errors import ArgumentError

__all__ = ["checked_latents", "float_array"]


def float_array(values: Any, what: str) -> npt.NDArray[np.float32]:
    """Convert ``values`` to float32; also tensors of torch on any device, of any float type, with a gradient.

    Raises:
        ArgumentError: ``values``, which is called ``what``, is not an array of numbers.
    """
    try:
        return np.ascontiguousarray(_on_host(values), np.float32)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError is torch's
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


def _on_host(values: Any) -> Any:
    """A tensor of torch without its gradient, in host memory and in a type that numpy has; anything else as it is."""
    if isinstance(values, list | tuple):
        return [_on_host(value) for value in values]
    if type(values).__module__.partition(".")[0] != "torch":
        return values
    return values.detach().cpu().float().numpy()
