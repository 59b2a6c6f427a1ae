"""Reading the input picture: files, PIL images and arrays become one RGB PIL image."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps

from svd_trt.errors import ArgumentError, ImageError

__all__ = ["ImageInput", "load_image"]

ImageInput: TypeAlias = str | os.PathLike[str] | PIL.Image.Image | npt.NDArray[Any]

_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}


def load_image(image: ImageInput) -> PIL.Image.Image:
    """Read a picture and return it as a new 8-bit RGB image, upright and independent of any open file.

    The conversion is that of ``diffusers.utils.load_image``: the EXIF orientation is applied, transparency is dropped
    and not blended, and of a file with several frames the first is read. It differs for PIL modes of more than 8 bits,
    which PIL alone would clip to white: ``I`` and ``I;16`` are scaled down from [0, 65535], and ``F`` from [0, 1].

    Args:
        image: a path, a PIL image, or an array ``[H, W]``, ``[H, W, 1]``, ``[H, W, 3]`` or ``[H, W, 4]`` that is
            uint8, or floating point within [0, 1] (scaled by 255 and rounded).

    Raises:
        ImageError: a file is missing, not a picture, damaged, or has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``;
            the picture is empty; an array has another shape, type or range.
        ArgumentError: ``image`` is neither a path, nor a PIL image, nor an array.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, PIL.Image.Image):
        with _readable("the image"):
            return _to_rgb(image)
    if isinstance(image, str | os.PathLike):
        return _from_file(image)
    raise ArgumentError(
        f"an image is a path, a PIL image or a numpy array, not {type(image).__name__}; convert it first"
    )


def _from_file(path: str | os.PathLike[str]) -> PIL.Image.Image:
    name = os.fsdecode(path)
    if name.startswith(("http://", "https://")):
        raise ImageError(f"cannot read {name!r}: it is a URL; download it and pass the file")
    with _readable(repr(name)), Path(name).open("rb") as file, PIL.Image.open(file) as image:
        return _to_rgb(image)


def _from_array(array: npt.NDArray[Any]) -> PIL.Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in _CHANNELS:
        raise ImageError(
            f"cannot read an array of shape {list(array.shape)}: "
            "pass [height, width], or [height, width, channels] with 1, 3 or 4 channels"
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
    return PIL.Image.fromarray(pixels).convert("RGB")


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """A copy of ``image``, upright and in 8-bit RGB."""
    if 0 in image.size:
        raise ImageError(f"cannot read an image of size {image.size}: pass one that is not empty")
    upright = PIL.ImageOps.exif_transpose(image)
    if upright.mode == "I" or upright.mode.startswith("I;16"):
        upright = PIL.Image.fromarray(_scaled(np.asarray(upright), 65535.0, "a 16-bit image"))
    elif upright.mode == "F":
        upright = PIL.Image.fromarray(_scaled(np.asarray(upright), 1.0, "a floating-point image"))
    return upright.convert("RGB")


def _scaled(values: npt.NDArray[Any], top: float, what: str) -> npt.NDArray[np.uint8]:
    """Map [0, top] to [0, 255] and round. Values outside raise `ImageError`, since clipping hides a wrong scale."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0.0 and high <= top):  # false for NaN, which min and max return if there is one
        raise ImageError(f"cannot read {what} with values from {low:g} to {high:g}: rescale them to [0, {top:g}] first")
    scaled: npt.NDArray[np.uint8] = np.rint(values.astype(np.float64) * (255.0 / top)).astype(np.uint8)
    return scaled


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn every exception of PIL into an `ImageError`, and suppress its warnings."""
    try:
        with warnings.catch_warnings():
            # PIL warns about defects that it works around (damaged metadata, palettes with transparency). Only a
            # picture that may exhaust the memory concerns the user.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # on damaged files PIL's decoders raise nearly anything, struct.error included
        raise ImageError(f"cannot read {name}: {_reason(error)}") from error


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
    if isinstance(error, PIL.Image.DecompressionBombWarning | PIL.Image.DecompressionBombError):
        return "it has too many pixels; scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
    detail = " ".join(str(error).split()) or type(error).__name__
    return f"it may be damaged ({detail}); save or download it again"
