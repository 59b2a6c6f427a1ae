"""Fitting a picture to the shape of the frames: stretch it, as diffusers does, crop it, or add bars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import PIL.Image

from svd_trt.errors import ImageError
from svd_trt.runtime.picture_colours import Colour
from svd_trt.runtime.picture_files import most_pixels, require_size

__all__ = ["RESIZE_MODES", "ResizeMode", "framed"]

ResizeMode: TypeAlias = Literal["stretch", "crop", "pad"]

RESIZE_MODES: tuple[ResizeMode, ...] = get_args(ResizeMode)

_NOTICED = 1.1  # the change of the aspect ratio from which a picture looks stretched


def framed(
    picture: PIL.Image.Image,
    height: int,
    width: int,
    mode: ResizeMode | None,
    *,
    background: Colour | None = None,
    name: str,
    warn: Callable[[str], None],
) -> PIL.Image.Image:
    """``picture`` with the aspect ratio of ``height`` and ``width``, to the nearest pixel; it is not resized.

    Args:
        picture: in RGB.
        height: of the frames.
        width: of the frames.
        mode: ``crop`` cuts off equal parts at two sides; ``pad`` adds equal bars at two sides; ``stretch`` returns
            the picture as it is, because resizing it to the frames stretches it; so does None, with a warning.
        background: the colour of bars; None is black.
        name: what messages call the picture.
        warn: receives a sentence if the aspect ratio changes by more than a tenth and nobody asked for that.

    Raises:
        ImageError: with bars, the picture would have too many pixels.
    """
    if mode is None or mode == "stretch":
        change = width * picture.height / (height * picture.width)
        if mode is None and max(change, 1 / change) > _NOTICED:
            looks = f"{change:.2g} times as wide" if change > 1 else f"{1 / change:.2g} times as high"
            warn(
                f"{name} of {picture.width}x{picture.height} pixels is stretched to {width}x{height}, as in diffusers: "
                f"{looks}; --resize-mode crop or pad keeps its shape (resize_mode='crop' in Python)"
            )
        return picture
    # The size that has the aspect ratio of the frames, and the height or the width of the picture.
    by_height = (max(round(picture.height * width / height), 1), picture.height)
    by_width = (picture.width, max(round(picture.width * height / width), 1))
    wide = picture.width * height > picture.height * width
    if mode == "crop":
        size = by_height if wide else by_width
        left, top = (picture.width - size[0]) // 2, (picture.height - size[1]) // 2
        return picture if size == picture.size else picture.crop((left, top, left + size[0], top + size[1]))
    size = by_width if wide else by_height
    if size == picture.size:
        return picture
    _require_room(size, name)
    canvas = PIL.Image.new("RGB", size, background or (0, 0, 0))
    canvas.paste(picture, ((size[0] - picture.width) // 2, (size[1] - picture.height) // 2))
    return canvas


def _require_room(size: tuple[int, int], name: str) -> None:
    limit = most_pixels()
    if limit is not None and size[0] * size[1] > limit:
        raise ImageError(
            f"{name} would have {size[0]:,}x{size[1]:,} pixels with bars; crop it, or use --resize-mode crop "
            "(resize_mode='crop' in Python)"
        )
    require_size(size, name)
