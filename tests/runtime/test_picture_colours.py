"""Colour profiles and transparency: diffusers' pixels by default, with a warning; a viewer's colours if asked for."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageCms
import pytest

from svd_trt.runtime.images import load_image
from tests.runtime import icc_profiles

P3 = icc_profiles.rgb_profile("Display P3", icc_profiles.DISPLAY_P3)
ADOBE = icc_profiles.rgb_profile(
    "Adobe RGB (1998)", icc_profiles.ADOBE_RGB, icc_profiles.curve([round(2.19921875 * 256)])
)
SRGB = icc_profiles.rgb_profile("sRGB in other words", icc_profiles.SRGB)
LCMS_SRGB = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
DARK_GREY = icc_profiles.grey_profile("Gamma 1.0", icc_profiles.curve([256]))
CMYK = icc_profiles.cmyk_profile("Grey inks")


def read(image: Any, **options: Any) -> tuple[npt.NDArray[np.uint8], list[str]]:
    said: list[str] = []
    return np.asarray(load_image(image, name="it", warn=said.append, **options)), said


def colours() -> PIL.Image.Image:
    rng = np.random.default_rng(0)
    return PIL.Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))


def saved(image: PIL.Image.Image, kind: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file


@pytest.mark.parametrize(
    ("profile", "values", "shown"),
    [
        # The primaries of sRGB, as Display P3 writes them.
        (P3, (234, 51, 35), (255, 0, 0)),
        (P3, (128, 128, 128), (128, 128, 128)),
        (P3, (0, 0, 245), (0, 0, 255)),
        (ADOBE, (219, 0, 0), (255, 0, 0)),
        (ADOBE, (127, 127, 127), (127, 127, 127)),
        (LCMS_SRGB, (200, 100, 50), (200, 100, 50)),
    ],
)
def test_convert_gives_the_colours_that_are_meant(
    profile: bytes, values: tuple[int, ...], shown: tuple[int, ...]
) -> None:
    file = saved(PIL.Image.new("RGB", (8, 8), values), "png", icc_profile=profile)
    converted, said = read(file, icc="convert")
    assert said == []
    assert np.abs(converted.astype(int) - shown).max() <= 2
    assert np.all(read(file)[0] == values)


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp"])
def test_a_profile_that_is_ignored_is_said(kind: str) -> None:
    file = saved(colours(), kind, icc_profile=P3)
    pixels, said = read(file)
    np.testing.assert_array_equal(pixels, np.asarray(PIL.Image.open(file)))
    assert len(said) == 1
    assert said[0].startswith("it has the colour profile 'Display P3', which is ignored")
    assert "--icc convert" in said[0]
    assert "icc='convert'" in said[0]
    ignored, said = read(file, icc="ignore")
    np.testing.assert_array_equal(ignored, pixels)
    assert said == []


@pytest.mark.parametrize("profile", [SRGB, LCMS_SRGB, None])
def test_profiles_that_mean_srgb_are_not_said(profile: bytes | None) -> None:
    """They are known by what they do to the pixels, not by their names."""
    assert read(saved(colours(), "png", icc_profile=profile))[1] == []


def test_a_profile_that_changes_nothing_visible_is_not_said() -> None:
    grey = PIL.Image.linear_gradient("L").convert("RGB")
    assert read(saved(grey, "png", icc_profile=P3))[1] == []


def test_pil_images_bring_their_profile() -> None:
    image = PIL.Image.open(saved(colours(), "png", icc_profile=P3))
    assert len(read(image)[1]) == 1
    converted, said = read(image, icc="convert")
    assert said == []
    assert not np.array_equal(converted, np.asarray(image))
    # The result has no profile, so it is not converted twice.
    once = load_image(image, icc="convert")
    np.testing.assert_array_equal(read(once, icc="convert")[0], converted)


def test_a_grey_profile() -> None:
    image = PIL.Image.new("L", (8, 8), 55)  # 0.2157 of the light, which sRGB writes as 128
    file = saved(image, "png", icc_profile=DARK_GREY)
    assert "Gamma 1.0" in read(file)[1][0]
    assert np.abs(read(file, icc="convert")[0].astype(int) - 128).max() <= 1


def test_a_grey_profile_of_a_picture_with_transparency() -> None:
    file = saved(PIL.Image.new("LA", (8, 8), (55, 255)), "png", icc_profile=DARK_GREY)
    assert np.abs(read(file, icc="convert", background=(255, 255, 255))[0].astype(int) - 128).max() <= 1


@pytest.mark.parametrize("kind", ["jpeg", "tiff"])
def test_a_cmyk_profile(kind: str) -> None:
    """Full cyan without other inks has three quarters of the lightness of paper in this profile, and no hue."""
    file = saved(PIL.Image.new("CMYK", (16, 16), (255, 0, 0, 0)), kind, icc_profile=CMYK)
    ignored, said = read(file)
    assert np.abs(ignored.astype(int) - (0, 255, 255)).max() <= 3
    assert "Grey inks" in said[0]
    converted = read(file, icc="convert")[0].astype(int)
    assert np.ptp(converted[0, 0]) <= 2
    assert abs(converted[0, 0, 0] - 185) <= 4  # L* 75


DAMAGED = {
    "random bytes": bytes(np.random.default_rng(0).integers(0, 256, 500, dtype=np.uint8)),
    "cut off": P3[:200],
    "empty": b"",
    "for other colours": CMYK,
    "a header alone": P3[:128],
    "no colours": icc_profiles.profile(b"RGB ", b"mntr", b"XYZ ", "nothing", {}),
    "an unknown space": icc_profiles.profile(b"9CLR", b"mntr", b"XYZ ", "nine", {}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_profiles_that_cannot_be_used(case: str) -> None:
    image = colours()
    image.info["icc_profile"] = DAMAGED[case]
    expected = np.asarray(image)
    ignored, said = read(image)
    np.testing.assert_array_equal(ignored, expected)
    assert said == []  # the pixels are the same either way
    converted, said = read(image, icc="convert")
    np.testing.assert_array_equal(converted, expected)
    if case != "empty":
        assert len(said) == 1
        assert "cannot be used" in said[0]
        assert "\n" not in said[0]


def hidden(colour: tuple[int, int, int], alpha: int = 0) -> PIL.Image.Image:
    """The left half is opaque red, and the right half has ``colour`` with ``alpha``."""
    image = PIL.Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    image.paste((*colour, alpha), (20, 0, 40, 20))
    return image


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
def test_hidden_colours_are_said(kind: str) -> None:
    file = saved(hidden((0, 0, 255)), kind, **({"lossless": True, "exact": True} if kind == "webp" else {}))
    pixels, said = read(file)
    assert np.all(pixels[:, 20:] == (0, 0, 255))  # diffusers' pixels
    assert len(said) == 1
    assert "--background white" in said[0]
    assert "background='white'" in said[0]


@pytest.mark.parametrize("alpha", [0, 128])
def test_a_background_is_blended(alpha: int) -> None:
    blended, said = read(saved(hidden((0, 0, 255), alpha), "png"), background=(255, 255, 0))
    assert said == []
    assert np.all(blended[:, :20] == (255, 0, 0))
    expected = np.array((255, 255, 0)) * (1 - alpha / 255) + np.array((0, 0, 255)) * alpha / 255
    assert np.abs(blended[:, 20:] - expected).max() <= 1


def test_transparency_of_other_modes() -> None:
    grey = PIL.Image.merge("LA", hidden((9, 9, 9)).convert("L").split() + hidden((9, 9, 9)).split()[3:])
    palette = hidden((0, 0, 255)).convert("RGB").quantize(4)
    palette.info["transparency"] = palette.getpixel((30, 10))
    key = hidden((0, 0, 255)).convert("RGB")
    key.info["transparency"] = (0, 0, 255)
    for image in (grey, palette, key, np.asarray(hidden((0, 0, 255)))):
        pixels, said = read(image)
        assert len(said) == 1
        assert not np.any(np.all(pixels[:, 20:] == 255, axis=2))
        assert np.all(read(image, background=(255, 255, 255))[0][:, 20:] == 255)
        assert not np.all(read(image, background=(255, 255, 255))[0][:, :20] == 255)


def test_transparency_that_makes_no_difference_is_not_said() -> None:
    """Opaque pictures with an alpha channel, and pictures whose hidden colour is that of a page."""
    assert read(hidden((0, 0, 255), 255))[1] == []
    assert read(hidden((255, 255, 255)))[1] == []


def test_a_profile_and_a_background_together() -> None:
    image = PIL.Image.new("RGBA", (40, 20), (234, 51, 35, 255))
    image.paste((0, 255, 0, 0), (20, 0, 40, 20))
    pixels, said = read(saved(image, "png", icc_profile=P3), icc="convert", background=(10, 20, 30))
    assert said == []
    assert np.abs(pixels[:, :20].astype(int) - (255, 0, 0)).max() <= 2
    assert np.all(pixels[:, 20:] == (10, 20, 30))  # it is in sRGB already
    assert len(read(saved(image, "png", icc_profile=P3))[1]) == 2
