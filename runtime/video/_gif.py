"""Animated GIF (GIF89a).

Pillow makes palettes and compresses single pictures; the animation around them is written here. Pillow's own
``save_all`` wants every frame at once, drops frames that equal the one before, and cuts lengths down to 10 ms each,
which makes 7 frames a second drift.
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
# Colours are chosen from about this many pixels of a frame: the choice is as good, and takes a tenth of the time.
_SAMPLE_PIXELS = 1 << 15


class GifWriter(FileWriter):
    """Endless loop, 256 colours chosen for each frame, dithered; holds one frame.

    Browsers show a frame for at least 20 ms, so more than 50 frames a second play too slowly there.
    """

    suffix = ".gif"

    def _start(self) -> None:
        super()._start()
        self._file.write(struct.pack("<6sHHBBB", b"GIF89a", self.spec.width, self.spec.height, 0x70, 0, 0))
        self._file.write(b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")  # repeat for ever
        self._file.write(b"\x21\xfe" + _sub_blocks(self.spec.parameters.encode("ascii")))

    def _append(self, frame: NDArray[np.uint8]) -> None:
        delay = duration(self._count, self.spec.fps, _UNITS)
        self._file.write(struct.pack("<BBBBHBB", 0x21, 0xF9, 4, 0, delay, 0, 0))
        self._file.write(_image_block(_quantized(frame)))

    def _complete(self) -> None:
        self._file.write(b"\x3b")


def _quantized(frame: NDArray[np.uint8]) -> Image.Image:
    """``frame`` ``[H, W, 3]`` in 256 colours of its own, with the rest made up by dithering."""
    step = max(1, math.isqrt(frame.shape[0] * frame.shape[1] // _SAMPLE_PIXELS))
    # Every n-th pixel rather than a smaller picture: averaging would lose the most saturated colours.
    sample = Image.fromarray(np.ascontiguousarray(frame[::step, ::step]))
    palette = sample.quantize(256, Image.Quantize.MEDIANCUT, kmeans=1)
    return Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)


def _image_block(picture: Image.Image) -> bytes:
    """The image of a one-picture GIF, with its global palette made a local one."""
    buffer = io.BytesIO()
    picture.save(buffer, format="GIF", interlace=0)
    data = buffer.getvalue()
    size_bits = data[10] & 0x07
    palette_end = _SIGNATURE_BYTES + 3 * (2 << size_bits)
    descriptor_end = palette_end + _DESCRIPTOR_BYTES
    assert data[palette_end] == 0x2C, "a still without comment or delay: its palette is followed by its image"
    descriptor = data[palette_end : descriptor_end - 1] + bytes([_LOCAL_PALETTE | size_bits])
    return descriptor + data[_SIGNATURE_BYTES:palette_end] + data[descriptor_end:-1]  # without the trailer


def _sub_blocks(data: bytes) -> bytes:
    """``data`` in the lengths of at most 255 that GIF extensions are cut into."""
    parts = (data[start : start + 255] for start in range(0, len(data), 255))
    return b"".join(bytes([len(part)]) + part for part in parts) + b"\x00"
