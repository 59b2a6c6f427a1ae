"""Opening a picture: a path, a ``file://`` or ``data:`` URL or a binary stream becomes a decoded PIL image."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import unquote_to_bytes

import PIL.features
import PIL.Image
import PIL.JpegImagePlugin

from svd_trt.errors import ImageError, MissingDependencyError
from svd_trt.runtime.picture_metadata import can_be_stripped, stripped, upright
from svd_trt.units import format_bytes, format_count, shorten

__all__ = ["LONGEST_SIDE", "local_path", "most_pixels", "open_picture", "readable", "require_size"]

LONGEST_SIDE = 131_072
"""Most pixels along a side: the matrix that resizes an axis grows with it, also for a picture one pixel high."""

_LARGEST_STREAM = 256_000_000  # bytes that are read from a pipe or copied to repair a file
_MAGIC = 16  # bytes that tell the format
_HEIF = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))
_AVIF = frozenset((b"avif", b"avis"))

Warn = Callable[[str], None]


def open_picture(source: str | os.PathLike[str] | IO[bytes], name: str, warn: Warn) -> PIL.Image.Image:
    """Decode the picture ``source``, the right way up, in its own mode and with its colour profile.

    A JPEG file with more pixels than `most_pixels` is decoded at half, a quarter or an eighth of its size, and ``warn``
    gets a sentence that says so. Metadata that is damaged is left out.

    Args:
        source: a path, a ``file://`` or ``data:`` URL, or a stream that is open for reading bytes.
        name: what messages call it.
        warn: receives one sentence for each thing that the caller should know.

    Raises:
        ImageError: it is missing, not a picture, damaged, or too large.
        MissingDependencyError: it is a HEIC picture, and pillow-heif is not installed.
    """
    with readable(name):
        if not isinstance(source, str | os.PathLike):
            return _decode(_seekable(source, name), name, warn)
        text = os.fsdecode(source)
        if _scheme(text) == "data":
            return _decode(io.BytesIO(_data_of(text, name)), name, warn)
        path = local_path(text)
        if path is None:
            raise ImageError(f"cannot read {name}: it is a URL; download it and pass the file")
        with path.open("rb") as file:
            return _decode(_seekable(file, name), name, warn)


def local_path(text: str) -> Path | None:
    """The file that ``text``, a path or a ``file://`` URL, names on this machine; None for URLs of other kinds.

    Raises:
        ImageError: the URL names a file of another machine, or what cannot be a file's name.
    """
    scheme = _scheme(text)
    if scheme != "file":
        return None if scheme else Path(text)
    place = re.split("[?#]", text, maxsplit=1)[0][len("file:") :]
    host, slash, path = place[2:].partition("/") if place.startswith("//") else ("", "/", place[1:])
    if host.lower() not in ("", "localhost"):
        raise ImageError(
            f"cannot read {shorten(text)!r}: {shorten(host)!r} is another machine; "
            "write file:///folder/picture.png for a file of this one"
        )
    name = unquote_to_bytes(slash + path)
    if b"\0" in name:
        raise ImageError(f"cannot read {shorten(text)!r}: no file has %00 in its name; check the URL")
    return Path(os.fsdecode(name))


def most_pixels() -> int | None:
    """Pixels that a picture may have: twice ``PIL.Image.MAX_IMAGE_PIXELS``, 179 million; None for no limit."""
    limit = PIL.Image.MAX_IMAGE_PIXELS
    return None if limit is None else 2 * limit


def require_size(size: tuple[int, int], name: str) -> None:
    """Check the width and height of a picture before its pixels need memory.

    Raises:
        ImageError: there are none, or a side is longer than `LONGEST_SIDE`.
    """
    if 0 in size:
        raise ImageError(f"cannot read {name} of size {size}: pass one that is not empty")
    if max(size) > LONGEST_SIDE:
        raise ImageError(
            f"cannot read {name}: it has {size[0]:,}x{size[1]:,} pixels, and no side may have over {LONGEST_SIDE:,}; "
            "crop it"
        )


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn every exception of PIL into an `ImageError`, and suppress its warnings."""
    try:
        with warnings.catch_warnings():
            # PIL warns about defects that it works around (damaged metadata, palettes with transparency) and about
            # pictures of half the pixels that it refuses. Nothing of it is for the user to correct.
            warnings.simplefilter("ignore")
            yield
    except (ImageError, MissingDependencyError, MemoryError):
        raise
    except Exception as error:  # on damaged files PIL's decoders raise nearly anything, struct.error included
        raise ImageError(f"cannot read {name}: {_reason(error)}") from error


def _scheme(text: str) -> str:
    """The scheme of a URL in lower case; empty for a path, a colon in a name included."""
    found = re.match(r"(?i)(data):|(file):/|([a-z][a-z0-9+.-]*)://", text)
    return found[found.lastindex or 0].lower() if found else ""


def _data_of(url: str, name: str) -> bytes:
    """The bytes in a ``data:`` URL (RFC 2397)."""
    head, comma, body = url.partition(",")
    if not comma:
        raise ImageError(f"cannot read {name}: a data URL has a comma before its data; copy all of it")
    data = unquote_to_bytes(body)
    if not head.lower().endswith(";base64"):
        return data
    # Both alphabets of base64, broken lines, and no padding are all in use.
    letters = b"".join(data.split()).replace(b"-", b"+").replace(b"_", b"/").rstrip(b"=")
    try:
        return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
    except binascii.Error:
        raise ImageError(f"cannot read {name}: its base64 is damaged; copy all of it") from None


class _Remaining:
    """A stream whose reads ask for at most what is left: for a length that is damaged, a file would allocate it all."""

    def __init__(self, stream: IO[bytes]) -> None:
        at = stream.tell()
        self._end = stream.seek(0, io.SEEK_END)
        stream.seek(at)
        self._stream = stream

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._end - self._stream.tell(), 0)
        return self._stream.read(left if size is None or size < 0 else min(size, left))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _seekable(stream: IO[bytes], name: str) -> IO[bytes]:
    """``stream``, or its content if it is a pipe, which cannot be read twice."""
    if stream.seekable():
        return stream
    data = stream.read(_LARGEST_STREAM + 1)
    if len(data) > _LARGEST_STREAM:
        raise ImageError(f"cannot read {name}: it has more than {format_bytes(_LARGEST_STREAM)}; pass a file")
    if not data:
        raise ImageError(f"cannot read {name}: it is empty; send it a picture")
    return io.BytesIO(data)


def _decode(stream: IO[bytes], name: str, warn: Warn) -> PIL.Image.Image:
    stream = cast("IO[bytes]", _Remaining(stream))
    try:
        return _decode_once(stream, name, warn)
    except (ImageError, MissingDependencyError, PIL.Image.DecompressionBombError, MemoryError):
        raise
    except Exception:
        stream.seek(0)
        if not can_be_stripped(stream.read(_MAGIC)):  # most likely no picture, and of any size
            raise
        stream.seek(0)
        for data in stripped(stream.read(_LARGEST_STREAM)):
            try:
                return _decode_once(io.BytesIO(data), name, warn)
            except Exception:  # noqa: S112  # less metadata may help, and the first exception is the one to report
                continue
        raise


def _decode_once(stream: IO[bytes], name: str, warn: Warn) -> PIL.Image.Image:
    image: PIL.Image.Image
    try:
        image = PIL.Image.open(stream)
    except PIL.UnidentifiedImageError:
        heif = _open_heif(stream, name)
        if heif is None:
            raise
        image = heif
    except PIL.Image.DecompressionBombError:
        image = _open_large(stream, name, warn)
    if image.format == "EPS":  # PIL would start Ghostscript to draw it; no other format starts a program
        raise ImageError(f"cannot read {name}: it is EPS, which only another program can draw; save it as PNG")
    require_size(image.size, name)
    return upright(image)


def _open_large(stream: IO[bytes], name: str, warn: Warn) -> PIL.Image.Image:
    """Open a JPEG file with too many pixels, to be decoded at a part of its size."""
    stream.seek(0)
    if stream.read(3) != b"\xff\xd8\xff":
        raise ImageError(
            f"cannot read {name}: it has more than {format_count(most_pixels() or 0)} pixels; scale it down, or save "
            "it as JPEG, of which a smaller size can be read"
        )
    stream.seek(0)
    image = PIL.JpegImagePlugin.JpegImageFile(stream)  # PIL.Image.open would refuse it
    width, height = image.size
    if image.info.get("progressive"):
        # The decoder holds the coefficients of the whole picture, whatever size it is decoded at.
        raise ImageError(
            f"cannot read {name}: it is a progressive JPEG of {format_count(width * height)} pixels, and more than "
            f"{format_count(most_pixels() or 0)} need too much memory; scale it down, or save it as a baseline JPEG"
        )
    scale = 2
    while (width // scale) * (height // scale) > (PIL.Image.MAX_IMAGE_PIXELS or 0) and scale < 8:
        scale *= 2
    image.draft(None, (width // scale, height // scale))
    share = {2: "half", 4: "a quarter", 8: "an eighth"}[scale]
    warn(f"{name} has {format_count(width * height)} pixels, so it was read at {share} of its width and height")
    return image


def _open_heif(stream: IO[bytes], name: str) -> PIL.Image.Image | None:
    """Open a HEIC picture with pillow-heif; None if it is of another kind."""
    stream.seek(0)
    head = stream.read(64)
    stream.seek(0)
    brands = {head[at : at + 4] for at in (8, *range(16, min(int.from_bytes(head[:4], "big"), 64), 4))}
    if head[4:8] != b"ftyp":
        return None
    if brands & _AVIF:
        if PIL.features.check("avif"):
            raise ImageError(f"cannot read {name}: it is AVIF and may be damaged; save or download it again")
        raise ImageError(f"cannot read {name}: it is AVIF, which this Pillow cannot read: pip install 'pillow>=11.3'")
    if not brands & _HEIF:
        return None
    try:
        import pillow_heif
    except ImportError as error:
        raise MissingDependencyError(f"{name} is a HEIC picture: reading it", "heic") from error
    file = pillow_heif.open_heif(stream)
    require_size(file.size, name)
    width, height = file.size
    limit = most_pixels()
    if limit is not None and width * height > limit:
        raise ImageError(f"cannot read {name}: it has more than {format_count(limit)} pixels; scale it down")
    image: PIL.Image.Image = file.to_pillow()
    return image


def _reason(error: Exception) -> str:
    """One line: what is wrong with the picture, then what to do."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file; check the path"
    if isinstance(error, IsADirectoryError):
        return "it is a directory; pass one picture"
    if isinstance(error, OSError) and error.strerror:  # PIL raises OSError without an error number
        return f"{error.strerror}; check the path"
    if isinstance(error, PIL.UnidentifiedImageError):
        return "it is not a picture in a format that Pillow knows; save it as PNG or JPEG"
    if isinstance(error, PIL.Image.DecompressionBombError):
        return f"it has more than {format_count(most_pixels() or 0)} pixels; scale it down"
    detail = shorten(" ".join(str(error).split()) or type(error).__name__)
    return f"it may be damaged ({detail}); save or download it again"
