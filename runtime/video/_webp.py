"""Animated WebP, following the container specification (RIFF with VP8X, ANIM, ANMF and EXIF chunks).

Pillow compresses the pictures; this module writes the animation around them, because Pillow's ``save_all`` needs all
frames at once and drops frames that equal the previous one.
"""

from __future__ import annotations

import io
import struct

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from svd_trt.runtime.video._timing import duration
from svd_trt.runtime.video._writer import FileWriter

_UNITS = 1000  # WebP counts in milliseconds
_QUALITY = 90
_RIFF_HEADER_BYTES = 12
_HAS_EXIF, _HAS_ANIMATION = 0x08, 0x02
_DO_NOT_BLEND = 0x02
_ASCII_COMMENT = b"ASCII\x00\x00\x00"  # the character code that opens an EXIF UserComment


class WebpWriter(FileWriter):
    """Endless loop, lossy at quality 90; holds one frame. The parameters are in the EXIF UserComment."""

    suffix = ".webp"

    def _start(self) -> None:
        super()._start()
        self._file.write(_riff_header(0))
        flags = struct.pack("<I", _HAS_EXIF | _HAS_ANIMATION)
        self._file.write(_chunk(b"VP8X", flags + _uint24(self.spec.width - 1) + _uint24(self.spec.height - 1)))
        self._file.write(_chunk(b"ANIM", struct.pack("<IH", 0xFF000000, 0)))  # opaque black background, endless loop

    def _append(self, frame: NDArray[np.uint8]) -> None:
        height, width = frame.shape[:2]
        still = io.BytesIO()
        Image.fromarray(frame).save(still, format="WEBP", quality=_QUALITY)
        place = _uint24(0) + _uint24(0) + _uint24(width - 1) + _uint24(height - 1)
        shown = _uint24(duration(self._count, self.spec.fps, _UNITS)) + bytes([_DO_NOT_BLEND])
        self._file.write(_chunk(b"ANMF", place + shown + still.getvalue()[_RIFF_HEADER_BYTES:]))

    def _complete(self) -> None:
        self._file.write(_chunk(b"EXIF", _exif(self.spec.parameters)))
        size = self._file.tell()
        self._file.seek(0)
        self._file.write(_riff_header(size))


def user_comment(exif: Image.Exif) -> str | None:
    """The ASCII UserComment of ``exif``, which holds the parameters; None if there is none."""
    comment = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if not isinstance(comment, bytes) or not comment.startswith(_ASCII_COMMENT):
        return None
    return comment.removeprefix(_ASCII_COMMENT).decode("ascii", "replace")


def _exif(parameters: str) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = "svd-trt"
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.UserComment: _ASCII_COMMENT + parameters.encode("ascii")}
    # The prefix is for JPEG; WebP has the name of the chunk instead.
    return exif.tobytes().removeprefix(b"Exif\x00\x00")


def _riff_header(file_size: int) -> bytes:
    return struct.pack("<4sI4s", b"RIFF", max(file_size - 8, 0), b"WEBP")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack("<4sI", name, len(data)) + data + b"\x00" * (len(data) % 2)


def _uint24(value: int) -> bytes:
    return value.to_bytes(3, "little")
