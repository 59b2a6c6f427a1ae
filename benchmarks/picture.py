"""A picture for whoever gives none."""

from __future__ import annotations

import numpy as np
import PIL.Image

__all__ = ["draw_picture"]


def draw_picture(height: int, width: int) -> PIL.Image.Image:
    """Coloured blocks over a gradient, the same every time: detail at several scales."""
    rng = np.random.default_rng(0)
    rows, columns = -(-height // 24), -(-width // 24)
    blocks = np.kron(rng.random((rows, columns, 3)), np.ones((24, 24, 1)))[:height, :width]
    ramp = np.linspace(0, 1, width)[None, :, None]
    return PIL.Image.fromarray((255 * (0.7 * blocks + 0.3 * ramp)).astype(np.uint8))
