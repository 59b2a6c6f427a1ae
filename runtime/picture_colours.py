"""Colours of a picture: what a viewer shows, and whether that differs from the pixels that diffusers takes.

diffusers takes the numbers in the file: it neither applies a colour profile nor blends transparency. Both can be asked
for. If neither is, a picture whose colours differ visibly gets a warning.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import PIL.Image
import PIL.ImageCms

from svd_trt.units import shorten

__all__ = ["ICC", "Colour", "Icc", "to_rgb"]

Icc: TypeAlias = Literal["ignore", "convert"]
Colour: TypeAlias = tuple[int, int, int]

ICC: tuple[Icc, ...] = get_args(Icc)

_SAMPLE = 256  # pixels along a side that decide whether a difference is visible
_VISIBLE = 4  # levels of 255: more than profiles that mean sRGB differ from one another
_SHARE = 0.01  # of the pixels
# As browsers and editors do by default; the black points of profiles that mean sRGB differ.
_INTENT = PIL.ImageCms.Intent.RELATIVE_COLORIMETRIC
_FLAGS = PIL.ImageCms.Flags.BLACKPOINTCOMPENSATION


def to_rgb(
    image: PIL.Image.Image,
    profile: bytes | None,
    *,
    icc: Icc | None,
    background: Colour | None,
    name: str,
    warn: Callable[[str], None],
) -> PIL.Image.Image:
    """``image`` in 8-bit RGB.

    Args:
        image: of any mode that PIL converts to RGB.
        profile: its ICC profile, if it has one.
        icc: ``convert`` converts the colours from the profile to sRGB; ``ignore`` takes the numbers as they are, and so
            does None, with a warning.
        background: what transparent pixels are blended with; None drops the transparency.
        name: what warnings call the picture.
        warn: receives a sentence if the result differs visibly from what a viewer shows and nobody asked for that.
    """
    sample = image.resize((min(image.width, _SAMPLE), min(image.height, _SAMPLE)), PIL.Image.Resampling.NEAREST)
    rgb: PIL.Image.Image | None = None
    if profile and icc == "convert":
        try:
            rgb = _converted(image, profile)
        except Exception as error:  # LittleCMS has exceptions of its own, and damaged profiles raise others
            warn(f"{name}: its colour profile cannot be used ({_words(error)}), so its colours are taken as sRGB")
    elif profile and icc is None and _profile_matters(sample, profile):
        warn(
            f"{name} has the colour profile {_description(profile)}, which is ignored, as in diffusers; "
            "--icc convert gives its true colours (icc='convert' in Python)"
        )
    if rgb is None:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    if not image.has_transparency_data:
        return rgb
    if background is not None:
        return _blended(rgb, image, background)
    if _differs(sample.convert("RGB"), _blended(sample.convert("RGB"), sample, (255, 255, 255))):
        warn(
            f"{name} is transparent in places, and the colours hidden there are used, as in diffusers; "
            "--background white blends it with white (background='white' in Python)"
        )
    return rgb


def _converted(image: PIL.Image.Image, profile: bytes) -> PIL.Image.Image:
    """``image`` in sRGB.

    Raises:
        Exception: the profile is damaged, or for colours of another kind, such as one for CMYK in a picture in RGB.
    """
    source = PIL.ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}[str(source.profile.xcolor_space).strip()]
    if mode == "L" and image.mode in ("1", "L", "LA", "La"):
        pixels = image.convert("L")
    elif mode == "RGB" and image.mode not in ("CMYK", "LAB"):
        pixels = image.convert("RGB")
    elif mode == image.mode:
        pixels = image
    else:
        raise ValueError(f"it is for {mode}, and the picture is {image.mode}")
    transform = PIL.ImageCms.buildTransform(source, PIL.ImageCms.createProfile("sRGB"), mode, "RGB", _INTENT, _FLAGS)
    converted = PIL.ImageCms.applyTransform(pixels, transform)
    assert converted is not None  # it is if the transform is not applied in place
    return converted


def _profile_matters(sample: PIL.Image.Image, profile: bytes) -> bool:
    try:
        return _differs(sample.convert("RGB"), _converted(sample, profile))
    except Exception:  # a profile that cannot be used changes nothing
        return False


def _differs(first: PIL.Image.Image, second: PIL.Image.Image) -> bool:
    """Whether two RGB pictures of one size differ visibly."""
    difference = np.abs(np.asarray(first, np.int16) - np.asarray(second, np.int16)).max(axis=2)
    return bool((difference > _VISIBLE).mean() > _SHARE)


def _blended(rgb: PIL.Image.Image, image: PIL.Image.Image, background: Colour) -> PIL.Image.Image:
    """``rgb`` over ``background``, with the transparency of ``image``."""
    canvas = PIL.Image.new("RGB", rgb.size, background)
    canvas.paste(rgb, mask=image.convert("RGBA").getchannel("A"))
    return canvas


def _description(profile: bytes) -> str:
    try:
        text = PIL.ImageCms.getProfileDescription(PIL.ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    except Exception:
        return "without a name"
    return repr(shorten(text.strip()))


def _words(error: Any) -> str:
    return shorten(" ".join(str(error).split())) or type(error).__name__
