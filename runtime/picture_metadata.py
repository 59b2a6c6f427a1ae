"""Metadata beside the pixels of a picture: the orientation, and files without what keeps a decoder from their pixels.

Damaged metadata is common: editors, phones and cameras write wrong types, cut texts and old checksums. Nothing of it
but the orientation says what the pixels are, so none of it may refuse them.
"""

from __future__ import annotations

import io
import numbers
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import PIL.ExifTags
import PIL.Image

__all__ = ["can_be_stripped", "stripped", "upright"]

_Kept: TypeAlias = frozenset[Literal["exif", "icc"]]

_METHODS: dict[Any, PIL.Image.Transpose] = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """``image`` turned as its EXIF or XMP orientation says, with the pixels of ``PIL.ImageOps.exif_transpose``.

    That function also writes the EXIF data again, which fails on data that PIL reads and cannot write. The result is
    ``image`` itself if nothing has to be turned. Its metadata still has the orientation.
    """
    image.load()  # a TIFF file is turned here, and then has no orientation
    orientation = _orientation(image)
    # Not a number: a wrong type, which PIL takes for no orientation too.
    method = _METHODS.get(orientation) if isinstance(orientation, numbers.Real) else None
    return image if method is None else image.transpose(method)


def _orientation(image: PIL.Image.Image) -> Any:
    try:
        orientation = image.getexif().get(PIL.ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data raises nearly anything
        orientation = None
    if orientation is not None:
        return orientation
    # PIL looks into XMP data too, but not after damaged EXIF data.
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    text = xmp.encode("utf-8", "replace") if isinstance(xmp, str) else xmp
    found = re.search(rb'tiff:Orientation(?:="|>)([0-9])', text) if isinstance(text, bytes) else None
    return int(found[1]) if found else 1


def can_be_stripped(start: bytes) -> bool:
    """Whether `stripped` knows the format of a file that begins with ``start``, at least 12 bytes."""
    return _rewriter(start) is not None


def stripped(data: bytes) -> Iterator[bytes]:
    """Copies of the PNG, JPEG, TIFF or WebP file ``data`` with less metadata: only EXIF and ICC, only EXIF, none.

    Pixels, palettes and transparency stay. A file of another format, or one that cannot be taken apart, has no copies.
    """
    rewrite = _rewriter(data)
    if rewrite is None:
        return
    kinds: tuple[_Kept, ...] = (frozenset({"exif", "icc"}), frozenset({"exif"}), frozenset())
    for kept in kinds:
        try:
            yield rewrite(data, kept)
        except (struct.error, IndexError, ValueError):
            return


def _rewriter(data: bytes) -> Callable[[bytes, _Kept], bytes] | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg
    if data.startswith((b"II*\0", b"MM\0*")):
        return _tiff
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp
    return None


def _png(data: bytes, kept: _Kept) -> bytes:
    """Keep the critical chunks and the transparency; write the checksums of metadata again."""
    metadata = {b"eXIf": "exif", b"iCCP": "icc"}
    result, start = io.BytesIO(), 8
    result.write(data[:8])
    while start + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if name[:1].isupper() or name == b"tRNS":
            result.write(data[start:end])
        elif metadata.get(name) in kept:
            body = data[start + 4 : end - 4]
            result.write(struct.pack(">I", length) + body + struct.pack(">I", zlib.crc32(body)))
        if name == b"IEND":
            break
        start = end
    return result.getvalue()


def _jpeg(data: bytes, kept: _Kept) -> bytes:
    """Keep what a decoder needs: tables, frames and scans, and the two segments that say how colours are coded."""
    result, start = io.BytesIO(), 2
    result.write(data[:2])
    while data[start] == 0xFF:
        marker = data[start + 1]
        if marker == 0xFF:  # padding
            start += 1
            continue
        if marker == 0xDA:  # a scan: pixels until the end
            break
        (length,) = struct.unpack_from(">H", data, start + 2)
        body, end = data[start + 4 : start + 2 + length], start + 2 + length
        if _keeps(marker, body, kept):
            result.write(data[start:end])
        start = end
    result.write(data[start:])
    return result.getvalue()


def _keeps(marker: int, body: bytes, kept: _Kept) -> bool:
    if body.startswith(b"Exif\0\0") and marker == 0xE1:
        return "exif" in kept
    if body.startswith(b"ICC_PROFILE\0") and marker == 0xE2:
        return "icc" in kept
    if marker == 0xE0:
        return body.startswith(b"JFIF\0") and len(body) >= 14  # libjpeg takes no notice of shorter ones
    if marker == 0xEE:
        return body.startswith(b"Adobe") and len(body) >= 12  # the same
    return not (0xE0 <= marker <= 0xEF or marker == 0xFE)


# The tags that say how a TIFF file's pixels are stored, and the orientation.
_TIFF_PIXELS = frozenset(range(254, 260)) | {
    262,
    266,
    273,
    274,
    277,
    278,
    279,
    284,
    292,
    293,
    317,
    320,
    *range(322, 326),
}
_TIFF_PIXELS |= {330, 338, 339, 347, *range(512, 522), 529, 530, 532}
_TIFF_ICC = 34675
_TIFF_ORIENTATION = 274


def _tiff(data: bytes, kept: _Kept) -> bytes:
    """Take the tags that are not about pixels out of the first directory; everything else keeps its place."""
    order = "<" if data.startswith(b"II") else ">"
    (directory,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, directory)
    entries = [data[at : at + 12] for at in range(directory + 2, directory + 2 + 12 * count, 12)]
    tags = _TIFF_PIXELS | ({_TIFF_ICC} if "icc" in kept else set())
    if "exif" not in kept:
        tags -= {_TIFF_ORIENTATION}
    entries = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in tags]
    block = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)  # no further directory
    return data[:directory] + block + data[directory + len(block) :]


def _webp(data: bytes, kept: _Kept) -> bytes:
    """Keep the chunks with pixels, and correct the flags of the header."""
    metadata = {b"EXIF": "exif", b"ICCP": "icc"}
    chunks, start, flags = [], 12, 0x12  # animation and alpha
    while start + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, start)
        end = start + 8 + length + length % 2
        if metadata.get(name) in kept:
            flags |= 0x08 if name == b"EXIF" else 0x20
        if name in (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF") or metadata.get(name) in kept:
            chunks.append(data[start:end])
        start = end
    body = b"".join(
        chunk[:8] + bytes([chunk[8] & flags]) + chunk[9:] if chunk.startswith(b"VP8X") else chunk for chunk in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
