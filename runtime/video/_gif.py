"""Animated GIF (GIF89a).

Pillow makes palettes and compresses single pictures; this module writes the animation around them. Pillow's own
``save_all`` needs all frames at once, drops frames that equal the previous one, and rounds each duration down to a
multiple of 10 ms, so that 7 frames a second become faster.
"""

from __future__ import annotations

import io
import math
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from svd_trt.runtime.video._timing import duration
from svd_trt.runtime.video._writer import FileWriter

_UNITS = 100  # a GIF counts in hundredths of a second
_SIGNATURE_BYTES = 13  # "GIF89a" and the logical screen descriptor
_DESCRIPTOR_BYTES = 10
_LOCAL_PALETTE = 0x80
# The palette is chosen from about this many pixels of a frame: it is as good, and takes a tenth of the time.
_SAMPLE_PIXELS = 1 << 15


class GifWriter(FileWriter):
    """Endless loop, 256 colours chosen for each frame, dithered; holds one frame.

    Browsers show a frame for at least 20 ms, so they play more than 50 frames a second too slowly.
    """

    suffix = ".gif"

    def _start(self) -> None:
        super()._start()
        self._file.write(struct.pack("<6sHHBBB", b"GIF89a", self.spec.width, self.spec.height, 0x70, 0, 0))
        self._file.write(b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")  # repeat forever
        self._file.write(b"\x21\xfe" + _sub_blocks(self.spec.parameters.encode("ascii")))

    def _append(self, frame: NDArray[np.uint8]) -> None:
        delay = duration(self._count, self.spec.fps, _UNITS)
        self._file.write(struct.pack("<BBBBHBB", 0x21, 0xF9, 4, 0, delay, 0, 0))
        self._file.write(_image_block(_quantized(frame)))

    def _complete(self) -> None:
        self._file.write(b"\x3b")


def _quantized(frame: NDArray[np.uint8]) -> Image.Image:
    """``frame`` ``[H, W, 3]`` in the 256 colours that suit it best, dithered."""
    step = max(1, math.isqrt(frame.shape[0] * frame.shape[1] // _SAMPLE_PIXELS))
    # Every n-th pixel and not a smaller picture: averaging would lose the most saturated colours.
    sample = Image.fromarray(np.ascontiguousarray(frame[::step, ::step]))
    palette = sample.quantize(256, Image.Quantize.MEDIANCUT, kmeans=1)
    return Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def _image_block(picture: Image.Image) -> bytes:
    """The image block of ``picture`` saved as a GIF, with the global palette turned into a local one."""
    buffer = io.BytesIO()
    picture.save(buffer, format="GIF", interlace=0)
    data = buffer.getvalue()
    size_bits = data[10] & 0x07
    palette_end = _SIGNATURE_BYTES + 3 * (2 << size_bits)
    descriptor_end = palette_end + _DESCRIPTOR_BYTES
    assert data[palette_end] == 0x2C, "in a GIF of one picture without comment or delay, the image follows the palette"
    descriptor = data[palette_end : descriptor_end - 1] + bytes([_LOCAL_PALETTE | size_bits])
    return descriptor + data[_SIGNATURE_BYTES:palette_end] + data[descriptor_end:-1]  # without the trailer


def _sub_blocks(data: bytes) -> bytes:
    """``data`` as GIF sub-blocks of at most 255 bytes, with the terminator."""
    parts = (data[start : start + 255] for start in range(0, len(data), 255))
    return b"".join(bytes([len(part)]) + part for part in parts) + b"\x00"
