"""A test picture, and how close two sets of frames are: shared by `svd-trt verify`, the benchmarks and the tests."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

__all__ = ["IDENTICAL_DB", "draw_picture", "psnr"]

IDENTICAL_DB = 200.0
"""PSNR of identical frames. The true value is infinite, which JSON cannot hold."""

_BLOCK = 24  # pixels
_PEAK = 255.0


def draw_picture(height: int, width: int) -> PIL.Image.Image:
    """Coloured blocks over a gradient, the same at every call: detail at several scales."""
    rng = np.random.default_rng(0)
    rows, columns = -(-height // _BLOCK), -(-width // _BLOCK)
    blocks = np.kron(rng.random((rows, columns, 3)), np.ones((_BLOCK, _BLOCK, 1)))[:height, :width]
    ramp = np.linspace(0, 1, width)[None, :, None]
    return PIL.Image.fromarray((255 * (0.7 * blocks + 0.3 * ramp)).astype(np.uint8))


def psnr(frames: npt.NDArray[Any], reference: npt.NDArray[Any]) -> float:
    """Peak signal-to-noise ratio in dB of uint8 frames of one shape; `IDENTICAL_DB` if they are equal."""
    error = float(np.mean((frames.astype(np.float64) - reference) ** 2))
    return IDENTICAL_DB if error == 0 else 10 * math.log10(_PEAK**2 / error)
