"""Pictures of another shape: stretched as in diffusers, cropped, or padded, and then exactly diffusers' inputs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageDraw
import pytest

from svd_trt.errors import ImageError
from svd_trt.runtime.framing import framed
from svd_trt.runtime.preprocess import clip_pixels, vae_image
from tests.runtime.test_preprocess import MEAN, PILLOW, STD, diffusers_clip_pixels

RED, BLUE = (255, 0, 0), (0, 0, 255)


def fit(image: PIL.Image.Image, size: tuple[int, int], mode: str, **options: object) -> PIL.Image.Image:
    said: list[str] = []
    result = framed(image, *size, mode, name="it", warn=said.append, **options)  # type: ignore[arg-type]
    assert said == []
    return result


def circle(width: int, height: int) -> PIL.Image.Image:
    image = PIL.Image.new("RGB", (width, height), BLUE)
    middle, radius = (width / 2, height / 2), min(width, height) / 4
    box = (middle[0] - radius, middle[1] - radius, middle[0] + radius, middle[1] + radius)
    PIL.ImageDraw.Draw(image).ellipse(box, fill=RED)
    return image


def extent_of_red(values: npt.NDArray[np.float32]) -> tuple[int, int]:
    """Rows and columns with red pixels in an input of the VAE, ``[3, H, W]``."""
    red = (values[0] > 0) & (values[2] < 0)
    return int(red.any(axis=1).sum()), int(red.any(axis=0).sum())


@pytest.mark.parametrize(("width", "height"), [(300, 500), (500, 300), (900, 100)])
def test_a_circle_stays_round(width: int, height: int) -> None:
    target = (64, 128)
    for mode in ("crop", "pad"):
        rows, columns = extent_of_red(vae_image(fit(circle(width, height), target, mode), *target))
        assert abs(rows - columns) <= 1, mode
        assert rows > 5
    rows, columns = extent_of_red(vae_image(fit(circle(width, height), target, "stretch"), *target))
    assert abs(rows - columns) > 5


def test_crop_cuts_equal_parts_off_two_sides() -> None:
    image = PIL.Image.fromarray(np.arange(90 * 40 * 3, dtype=np.uint16).astype(np.uint8).reshape(40, 90, 3))
    cropped = fit(image, (64, 64), "crop")
    np.testing.assert_array_equal(np.asarray(cropped), np.asarray(image)[:, 25:65])
    tall = image.transpose(PIL.Image.Transpose.TRANSPOSE)
    np.testing.assert_array_equal(np.asarray(fit(tall, (64, 128), "crop")), np.asarray(tall)[35:55])


@pytest.mark.parametrize(("background", "colour"), [(None, (0, 0, 0)), ((1, 2, 3), (1, 2, 3))])
def test_pad_adds_equal_bars_at_two_sides(background: tuple[int, int, int] | None, colour: tuple[int, ...]) -> None:
    image = PIL.Image.new("RGB", (40, 80), RED)
    padded = np.asarray(fit(image, (64, 128), "pad", background=background))
    assert padded.shape == (80, 160, 3)
    assert np.all(padded[:, 60:100] == RED)
    assert np.all(padded[:, :60] == colour)
    assert np.all(padded[:, 100:] == colour)
    assert np.asarray(fit(image.resize((80, 40)), (64, 64), "pad")).shape == (80, 80, 3)


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize(("width", "height"), [(90, 160), (171, 50), (128, 64)])
def test_both_encoders_get_what_diffusers_makes_of_the_fitted_picture(mode: str, width: int, height: int) -> None:
    """Also the image encoder sees the fitted picture, as if it had been cropped or padded before."""
    module = pytest.importorskip("diffusers.video_processor")
    target = (64, 128)
    rng = np.random.default_rng(width)
    image = PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if mode == "crop":
        kept = (width, round(width / 2)) if width < 2 * height else (2 * height, height)
        left, top = (width - kept[0]) // 2, (height - kept[1]) // 2
        expected = image.crop((left, top, left + kept[0], top + kept[1]))
    else:
        kept = (2 * height, height) if width < 2 * height else (width, round(width / 2))
        expected = PIL.Image.new("RGB", kept)
        expected.paste(image, ((kept[0] - width) // 2, (kept[1] - height) // 2))
    fitted = fit(image, target, mode)
    np.testing.assert_allclose(clip_pixels(fitted, mean=MEAN, std=STD), diffusers_clip_pixels(expected), atol=1e-5)
    if PILLOW >= 13 and expected.height > target[0] and expected.height * target[1] > expected.width * target[0]:
        expected = expected.resize((target[1], expected.height), PIL.Image.Resampling.LANCZOS)
    processor = module.VideoProcessor(do_resize=True, vae_scale_factor=8)
    np.testing.assert_array_equal(vae_image(fitted, *target), processor.preprocess(expected, *target)[0].numpy())


@pytest.mark.parametrize("mode", [None, "stretch", "crop", "pad"])
def test_a_picture_of_the_same_shape_is_left_alone(mode: str | None) -> None:
    image = PIL.Image.new("RGB", (1920, 1080))
    assert framed(image, 576, 1024, mode, name="it", warn=pytest.fail) is image  # type: ignore[arg-type]


@pytest.mark.parametrize(("width", "warned"), [(110, False), (111, True), (91, False), (90, True)])
def test_a_change_of_more_than_a_tenth_is_said(width: int, warned: bool) -> None:
    said: list[str] = []
    image = PIL.Image.new("RGB", (width, 100))
    assert framed(image, 64, 64, None, name="it", warn=said.append) is image
    assert len(said) == warned
    for message in said:
        assert "--resize-mode" in message
        assert "resize_mode='crop'" in message


def test_how_much_a_picture_is_stretched_is_said() -> None:
    said: list[str] = []
    framed(PIL.Image.new("RGB", (1080, 1920)), 576, 1024, None, name="'a.jpg'", warn=said.append)
    framed(PIL.Image.new("RGB", (1000, 100)), 576, 1024, None, name="'b.jpg'", warn=said.append)
    assert said[0].startswith(
        "'a.jpg' of 1080x1920 pixels is stretched to 1024x576, as in diffusers: 3.2 times as wide"
    )
    assert "5.6 times as high" in said[1]


@pytest.mark.parametrize("size", [(130_000, 1), (1, 130_000)])
def test_bars_that_would_need_gigabytes(size: tuple[int, int]) -> None:
    image = PIL.Image.new("RGB", size)
    with pytest.raises(ImageError, match="--resize-mode crop"):
        fit(image, (576, 1024), "pad")
    assert min(fit(image, (576, 1024), "crop").size) == 1
