"""``callback_on_step_end``, as in diffusers: it sees the latents after every step and may replace them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from svd_trt.errors import ArgumentError
from svd_trt.runtime.diffusers_call import check_tensor_inputs
from svd_trt.runtime.latents import float_array

__all__ = ["OnStepEnd", "StepCallback", "bind_callback"]

StepCallback: TypeAlias = Callable[[Any, int, float, dict[str, Any]], Mapping[str, Any] | None]
"""Called as ``callback(pipe, step, timestep, {"latents": array})``; returns None, or ``{"latents": array}`` to continue
with other latents ``[B, F, 4, h, w]``. An exception ends the run."""

OnStepEnd: TypeAlias = Callable[[int, float, npt.NDArray[np.float32]], npt.NDArray[np.float32] | None]
"""A `StepCallback` for the loop, which knows no pipeline: step, timestep and latents in, new latents or None out."""


def bind_callback(callback: StepCallback | None, pipe: object, names: Sequence[str]) -> OnStepEnd | None:
    """Bind ``callback`` to the pipeline that it is called with, and check what it returns.

    Args:
        callback: of the caller.
        pipe: its first argument.
        names: ``callback_on_step_end_tensor_inputs``.

    Raises:
        ArgumentError: ``callback`` is not a function; later, it returned something other than latents of the shape
            that it was given.
    """
    check_tensor_inputs(names)
    if callback is None:
        return None
    if not callable(callback):
        raise ArgumentError(f"callback_on_step_end must be a function, not {callback!r}")

    def on_step_end(step: int, timestep: float, latents: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
        answer = callback(pipe, step, timestep, {name: latents.copy() for name in names})
        if answer is not None and not isinstance(answer, Mapping):
            kind = type(answer).__name__
            raise ArgumentError(f'callback_on_step_end must return None or {{"latents": ...}}, not {kind}')
        changed = (answer or {}).get("latents")
        return None if changed is None else _checked(changed, latents.shape)

    return on_step_end


def _checked(changed: Any, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    replacement = float_array(changed, "the latents that callback_on_step_end returned")
    if replacement.shape != shape:
        raise ArgumentError(f"callback_on_step_end returned latents of shape {replacement.shape}, not {shape}")
    return replacement
