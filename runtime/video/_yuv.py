"""RGB to the colours of video: BT.709 or BT.601, limited range, one colour sample for each pixel or for four.

This does not use libswscale: its matrix, its rounding and its position of colour samples differ between the versions
that PyAV has shipped, and some of them ignore the requested matrix.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from svd_trt.errors import ArgumentError

_HALF = np.float32(0.5)  # the conversion to uint8 truncates


def require_even(name: str, height: int, width: int) -> None:
    """Check that a colour sample for four pixels divides a frame.

    Raises:
        ArgumentError: it does not; the message begins with ``name``.
    """
    if height % 2 or width % 2:
        raise ArgumentError(f"{name} needs an even height and width, got {height}x{width}")


class Matrix(NamedTuple):
    """From RGB in 0..255 to luma ``[3]`` and two colour differences ``[2, 3]`` of limited range, without offsets."""

    luma: NDArray[np.float32]
    colour: NDArray[np.float32]


def _matrix(red: float, blue: float) -> Matrix:
    luma = np.array([red, 1 - red - blue, blue])
    blue_difference = (np.array([0, 0, 1]) - luma) / (2 * (1 - blue))
    red_difference = (np.array([1, 0, 0]) - luma) / (2 * (1 - red))
    # Eight bits: luma takes 16..235, colour differences take 16..240 around 128.
    colour = np.stack([blue_difference, red_difference]) * 224 / 255
    return Matrix((luma * 219 / 255).astype(np.float32), colour.astype(np.float32))


BT709 = _matrix(0.2126, 0.0722)  # ITU-R BT.709-6, items 3.2 and 3.4
BT601 = _matrix(0.299, 0.114)  # ITU-R BT.601-7, 2.5.1


def yuv420p(frame: NDArray[np.uint8], matrix: Matrix = BT709) -> NDArray[np.uint8]:
    """``frame``, uint8 RGB ``[H, W, 3]`` with even H and W, as the planes of yuv420p, uint8 ``[H * 3 / 2, W]``.

    A colour sample is the mean of a square of four pixels, so its position is their centre (chroma location "center").
    """
    height, width, _ = frame.shape
    pixels = height * width
    planes = np.empty(pixels * 3 // 2, np.uint8)
    planes[:pixels] = frame.reshape(-1, 3).astype(np.float32) @ matrix.luma + (16 + _HALF)
    # Sums of four as uint16: exact, and smaller than floats.
    rows = frame[0::2].astype(np.uint16) + frame[1::2]  # [H/2, W, 3]
    squares = (rows[:, 0::2] + rows[:, 1::2]).reshape(-1, 3).astype(np.float32)  # [H/2 * W/2, 3]
    planes[pixels:] = (matrix.colour / 4 @ squares.T + (128 + _HALF)).reshape(-1)
    return planes.reshape(height * 3 // 2, width)


def yuv444p(frame: NDArray[np.uint8], matrix: Matrix = BT709) -> NDArray[np.uint8]:
    """``frame``, uint8 RGB ``[H, W, 3]``, as the planes of yuv444p, uint8 ``[3, H, W]``."""
    height, width, _ = frame.shape
    pixels = frame.reshape(-1, 3).astype(np.float32)
    planes = np.empty((3, height * width), np.uint8)
    planes[0] = pixels @ matrix.luma + (16 + _HALF)
    planes[1:] = matrix.colour @ pixels.T + (128 + _HALF)
    return planes.reshape(3, height, width)
