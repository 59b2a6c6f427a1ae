"""Reading the input picture: files, URLs, streams, PIL images and arrays become one RGB PIL image."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import IO, Any, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import PIL.Image

from svd_trt.errors import ArgumentError, ImageError
from svd_trt.runtime.arrays import is_array, to_numpy
from svd_trt.runtime.picture_colours import Colour, Icc, to_rgb
from svd_trt.runtime.picture_files import open_picture, readable, require_size
from svd_trt.runtime.picture_metadata import upright
from svd_trt.units import shorten

__all__ = ["ImageInput", "load_image", "name_of", "pictures_in"]


class _SharesArray(Protocol):
    """An array of any library."""

    def __dlpack__(self) -> Any: ...


class _GivesArray(Protocol):
    """An array of any library."""

    def __array__(self) -> npt.NDArray[Any]: ...


ImageInput: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | PIL.Image.Image | _SharesArray | _GivesArray
)

_log = logging.getLogger("svd_trt")
_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}


def load_image(
    image: ImageInput,
    *,
    icc: Icc | None = None,
    background: Colour | None = None,
    name: str | None = None,
    warn: Callable[[str], None] = _log.warning,
) -> PIL.Image.Image:
    """Read a picture and return it as a new 8-bit RGB image, upright and independent of any open file.

    The conversion is by default that of ``diffusers.utils.load_image``: the EXIF orientation is applied, colour
    profiles are ignored, transparency is dropped and not blended, and of a file with several frames the first is read.
    It differs for PIL modes of more than 8 bits, which PIL alone would clip to white: ``I`` and ``I;16`` are scaled
    down from [0, 65535], and ``F`` from [0, 1].

    Args:
        image: a path, a ``file://`` or ``data:`` URL, the bytes of a file, a stream that is open for reading bytes, a
            PIL image, or an array of numpy, torch or any library with ``__dlpack__`` or ``__array__``: ``[H, W]``,
            ``[H, W, C]`` or ``[C, H, W]`` with 1, 3 or 4 channels, uint8, or floating point within [0, 1] (scaled by
            255 and rounded). If both ends could be the channels, the last is.
        icc: ``convert`` converts the colours of the embedded profile to sRGB; ``ignore`` is None without its warning.
        background: red, green and blue, 0 to 255, to blend transparent pixels with.
        name: what messages call the picture; None is `name_of`.
        warn: receives a sentence for each thing that the caller should know: colours that differ visibly from what a
            viewer shows, a profile that cannot be used, a picture that was read at a smaller size.

    Raises:
        ImageError: a file is missing, not a picture, damaged, or has too many pixels; the picture is empty; an array
            has another shape, type or range.
        ArgumentError: ``image`` is none of these.
        MissingDependencyError: it is a HEIC picture, and pillow-heif is not installed.
    """
    name = name or name_of(image)
    if isinstance(image, bytes | bytearray | memoryview):
        image = io.BytesIO(image)
    if _is_pixels(image):
        image = _from_array(to_numpy(image, name))
    if not isinstance(image, PIL.Image.Image):
        if not isinstance(image, str | os.PathLike) and not hasattr(image, "read"):
            raise ArgumentError(
                "an image is a path, the bytes of a file or an open one, a PIL image, or an array of numpy, torch or "
                f"another library, not {type(image).__name__}; convert it first"
            )
        opened = open_picture(cast("str | os.PathLike[str] | IO[bytes]", image), name, warn)
        with readable(name):
            return _plain(_eight_bits(opened), opened, icc, background, name, warn)
    with readable(name):
        require_size(image.size, name)
        turned = _eight_bits(upright(image))
        return _plain(turned.copy() if turned is image else turned, image, icc, background, name, warn)


def pictures_in(image: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    """List the pictures of a call: one, those of a list, and those of arrays with four dimensions, ``[B, ...]``.

    Raises:
        ArgumentError: there is none, or an array cannot be read.
    """
    found: list[ImageInput] = []
    for one in image if isinstance(image, list | tuple) else [cast("ImageInput", image)]:
        if _is_pixels(one) and np.ndim(pixels := to_numpy(one, "the picture")) == 4:
            found.extend(pixels)
        else:
            found.append(one)
    if not found:
        raise ArgumentError("no picture was given")
    return found


def name_of(image: ImageInput, number: int | None = None) -> str:
    """What messages call a picture: its path or URL, shortened, or its ``number`` among several."""
    if isinstance(image, str | os.PathLike):
        return repr(shorten(os.fsdecode(image)))
    if getattr(sys.stdin, "buffer", None) is image:
        return "the picture from standard input"
    return "the picture" if number is None else f"picture {number}"


def _plain(
    image: PIL.Image.Image,
    origin: PIL.Image.Image,
    icc: Icc | None,
    background: Colour | None,
    name: str,
    warn: Callable[[str], None],
) -> PIL.Image.Image:
    """``image`` in RGB without metadata, by the colour profile of ``origin``."""
    profile = origin.info.get("icc_profile")
    rgb = to_rgb(
        image,
        profile if isinstance(profile, bytes) else None,
        icc=icc,
        background=background,
        name=name,
        warn=warn,
    )
    rgb.info = {}  # its orientation is applied, and its profile would be applied again
    return rgb


def _eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """``image``, scaled down if it has more than 8 bits a channel."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        return PIL.Image.fromarray(_scaled(np.asarray(image), 65535.0, "a 16-bit image"))
    if image.mode == "F":
        return PIL.Image.fromarray(_scaled(np.asarray(image), 1.0, "a floating-point image"))
    return image


def _is_pixels(image: object) -> bool:
    # A PIL image is asked nothing, because it would be decoded for its answer.
    return not isinstance(image, PIL.Image.Image | memoryview | str | os.PathLike) and is_array(image)


def _from_array(array: npt.NDArray[Any]) -> PIL.Image.Image:
    if array.ndim == 3 and array.shape[2] not in _CHANNELS and array.shape[0] in _CHANNELS:
        array = array.transpose(1, 2, 0)
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in _CHANNELS:
        raise ImageError(
            f"cannot read an array of shape {list(array.shape)}: "
            "pass [height, width], [height, width, channels] or [channels, height, width] with 1, 3 or 4 channels"
        )
    if array.size == 0:
        raise ImageError(f"cannot read an array of shape {list(array.shape)}: pass one that is not empty")
    pixels = array[:, :, 0] if array.ndim == 3 and channels == 1 else array
    if pixels.dtype == np.uint8:
        pixels = np.ascontiguousarray(pixels)
    elif np.issubdtype(pixels.dtype, np.floating):
        pixels = _scaled(pixels, 1.0, "an array")
    else:
        raise ImageError(f"cannot read an array of {pixels.dtype}: pass uint8, or floats between 0 and 1")
    return PIL.Image.fromarray(pixels)


def _scaled(values: npt.NDArray[Any], top: float, what: str) -> npt.NDArray[np.uint8]:
    """Map [0, top] to [0, 255] and round. Values outside raise `ImageError`, since clipping hides a wrong scale."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= top):  # false for NaN, which min and max return if there is one
        raise ImageError(f"cannot read {what} with values from {low:g} to {high:g}: rescale them to [0, {top:g}] first")
    scaled: npt.NDArray[np.uint8] = np.rint(values.astype(np.float64) * (255.0 / top)).astype(np.uint8)
    return scaled
