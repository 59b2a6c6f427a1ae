"""RGB to the colours of video: BT.709, limited range, one colour sample for four pixels.

This does not use libswscale: its matrix, its rounding and its position of colour samples differ between the versions
that PyAV has shipped, and some of them ignore the requested matrix.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_RED, _BLUE = 0.2126, 0.0722  # ITU-R BT.709-6, item 3.2
_LUMA = np.array([_RED, 1 - _RED - _BLUE, _BLUE])
_BLUE_DIFFERENCE = (np.array([0, 0, 1]) - _LUMA) / (2 * (1 - _BLUE))
_RED_DIFFERENCE = (np.array([1, 0, 0]) - _LUMA) / (2 * (1 - _RED))
# Item 3.4, eight bits: luma takes 16..235, colour differences take 16..240 around 128.
_TO_LUMA = (_LUMA * 219 / 255).astype(np.float32)
_TO_COLOUR = (np.stack([_BLUE_DIFFERENCE, _RED_DIFFERENCE]) * 224 / 255).astype(np.float32)
_HALF = np.float32(0.5)  # the conversion to uint8 truncates


def yuv420p(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``frame``, uint8 RGB ``[H, W, 3]`` with even H and W, as the planes of yuv420p, uint8 ``[H * 3 / 2, W]``.

    A colour sample is the mean of a square of four pixels, so its position is their centre (chroma location "center").
    """
    height, width, _ = frame.shape
    pixels = height * width
    planes = np.empty(pixels * 3 // 2, np.uint8)
    planes[:pixels] = frame.reshape(-1, 3).astype(np.float32) @ _TO_LUMA + (16 + _HALF)
    # Sums of four as uint16: exact, and smaller than floats.
    rows = frame[0::2].astype(np.uint16) + frame[1::2]  # [H/2, W, 3]
    squares = (rows[:, 0::2] + rows[:, 1::2]).reshape(-1, 3).astype(np.float32)  # [H/2 * W/2, 3]
    planes[pixels:] = (_TO_COLOUR / 4 @ squares.T + (128 + _HALF)).reshape(-1)
    return planes.reshape(height * 3 // 2, width)
