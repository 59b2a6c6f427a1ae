"""Reading pictures: awkward files of many kinds, PIL images and arrays, against diffusers where it agrees."""

from __future__ import annotations

import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import PIL.ImageOps
import pytest

from svd_trt.errors import ArgumentError, ImageError
from svd_trt.runtime.images import load_image

HEIGHT, WIDTH = 6, 8
ORIENTATION = 0x0112


def ramp(channels: int = 3) -> npt.NDArray[np.uint8]:
    values = np.arange(HEIGHT * WIDTH * channels) * 255 // (HEIGHT * WIDTH * channels - 1)
    return values.astype(np.uint8).reshape(HEIGHT, WIDTH, channels)


def picture(mode: str) -> PIL.Image.Image:
    if mode == "RGBA":
        return PIL.Image.fromarray(ramp(4))
    if mode == "LA":
        return PIL.Image.fromarray(ramp(2))
    return PIL.Image.fromarray(ramp()).convert(mode)


def pixels(image: PIL.Image.Image) -> npt.NDArray[np.uint8]:
    assert image.mode == "RGB"
    return np.asarray(image)


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "png"),
        ("RGB", "jpg"),
        ("RGB", "webp"),
        ("RGB", "bmp"),
        ("RGB", "tiff"),
        ("RGBA", "png"),
        ("RGBA", "webp"),
        ("RGBA", "tiff"),
        ("LA", "png"),
        ("L", "png"),
        ("L", "jpg"),
        ("1", "png"),
        ("1", "tiff"),
        ("P", "png"),
        ("P", "gif"),
        ("CMYK", "jpg"),
        ("CMYK", "tiff"),
        ("YCbCr", "jpg"),
    ],
)
def test_files_as_diffusers_reads_them(tmp_path: Path, mode: str, suffix: str) -> None:
    diffusers_load_image = pytest.importorskip("diffusers.utils").load_image
    path = tmp_path / f"picture.{suffix}"
    picture(mode).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # diffusers leaves the file to the garbage collector
        expected = diffusers_load_image(str(path))
        np.testing.assert_array_equal(pixels(load_image(path)), pixels(expected))
        del expected
    np.testing.assert_array_equal(pixels(load_image(str(path))), pixels(load_image(path)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "1", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_pil_images_as_diffusers_reads_them(mode: str) -> None:
    diffusers_load_image = pytest.importorskip("diffusers.utils").load_image
    image = PIL.Image.new("LAB", (WIDTH, HEIGHT), (80, 20, 40)) if mode == "LAB" else picture(mode)
    np.testing.assert_array_equal(pixels(load_image(image)), pixels(diffusers_load_image(image)))


def test_a_pil_image_is_copied() -> None:
    image = picture("RGB")
    load_image(image).paste((0, 0, 0), (0, 0, WIDTH, HEIGHT))
    np.testing.assert_array_equal(np.asarray(image), ramp())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "turned.jpg"
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    picture("RGB").resize((64, 48)).save(path, exif=exif, quality=95)
    upright = load_image(path)
    assert upright.size == ((64, 48) if orientation < 5 else (48, 64))
    assert ORIENTATION not in upright.getexif() or upright.getexif()[ORIENTATION] == 1
    with PIL.Image.open(path) as image:
        expected = PIL.ImageOps.exif_transpose(image)
    np.testing.assert_array_equal(pixels(upright), np.asarray(expected))


def test_exif_orientation_of_a_16_bit_file(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = 6
    values = (ramp(1)[:, :, 0].astype(np.uint16)) * 257
    PIL.Image.fromarray(values).save(tmp_path / "turned.png", exif=exif)
    turned = pixels(load_image(tmp_path / "turned.png"))
    np.testing.assert_array_equal(turned[:, :, 0], np.rot90(ramp(1)[:, :, 0], k=-1))


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_files_are_scaled(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 257], [32767, 32768, 65406, 65535]], dtype=np.uint16)
    path = tmp_path / f"deep.{suffix}"
    PIL.Image.fromarray(values).save(path)
    result = pixels(load_image(path))
    np.testing.assert_array_equal(result[:, :, 0], [[0, 0, 1, 1], [127, 128, 254, 255]])
    np.testing.assert_array_equal(result, np.repeat(result[:, :, :1], 3, axis=2))


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I"])
def test_16_bit_pil_images_are_scaled(mode: str) -> None:
    image = PIL.Image.new(mode, (2, 1))
    image.putpixel((1, 0), 40000)
    np.testing.assert_array_equal(pixels(load_image(image))[0], [[0] * 3, [156] * 3])


def test_float_files_are_scaled(tmp_path: Path) -> None:
    values = np.array([[0.0, 0.25, 0.5, 1.0]], dtype=np.float32)
    PIL.Image.fromarray(values).save(tmp_path / "float.tiff")
    np.testing.assert_array_equal(pixels(load_image(tmp_path / "float.tiff"))[0, :, 0], [0, 64, 128, 255])


@pytest.mark.parametrize(
    "image",
    [
        PIL.Image.fromarray(np.array([[0.0, 1.5]], dtype=np.float32)),
        PIL.Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32)),
        PIL.Image.fromarray(np.array([[0, 70000]], dtype=np.int32)),
        PIL.Image.fromarray(np.array([[0, -1]], dtype=np.int32)),
    ],
)
def test_deep_images_out_of_range(image: PIL.Image.Image) -> None:
    with pytest.raises(ImageError, match="rescale them") as error:
        load_image(image)
    one_line(error)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_animations_give_their_first_frame(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"moving.{suffix}"
    frames = [PIL.Image.new("RGB", (WIDTH, HEIGHT), color) for color in ("white", "black", "white")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert np.all(pixels(load_image(path)) == 255)


def test_palette_with_transparency_in_bytes(tmp_path: Path) -> None:
    # PIL warns about such a palette, and the user cannot do anything about it.
    path = tmp_path / "palette.png"
    picture("RGB").quantize(16).save(path, transparency=bytes(range(0, 160, 10)))
    assert load_image(path).size == (WIDTH, HEIGHT)


def broken(content: Callable[[bytes], bytes], suffix: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / f"broken.{suffix}"
        rng = np.random.default_rng(0)
        PIL.Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
        path.write_bytes(content(path.read_bytes()))
        return path

    return write


def directory(folder: Path) -> Path:
    (folder / "folder.png").mkdir()
    return folder / "folder.png"


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda folder: folder / "missing.png", "no such file"),
        (lambda folder: folder / "missing" / "a.png", "no such file"),
        (lambda _: "long" * 64, "check the path"),
        (directory, "directory"),
        (broken(lambda _: b"", "png"), "not a picture"),
        (broken(lambda _: b"just some words\n" * 50, "jpg"), "not a picture"),
        (broken(lambda data: data[: len(data) // 2], "png"), "damaged"),
        (broken(lambda data: data[: len(data) // 2], "jpg"), "damaged"),
        (broken(lambda data: data[: len(data) // 2], "gif"), "damaged"),
        (broken(lambda data: data[: len(data) // 2], "bmp"), "damaged"),
        (broken(lambda data: data[: len(data) // 2], "tiff"), "cannot read"),
        (broken(lambda data: data[: len(data) // 2], "webp"), "cannot read"),
        (broken(lambda data: data[:30], "png"), "cannot read"),
        (broken(lambda data: data[:200] + b"\xff" * 200 + data[400:], "png"), "cannot read"),
        (lambda folder: "https://example.com/a.png", "download"),
        (lambda folder: "a\0b.png", "damaged"),
    ],
)
def test_unreadable_files(tmp_path: Path, make: Callable[[Path], Path | str], what: str) -> None:
    path = make(tmp_path)
    with pytest.raises(ImageError, match=what) as error:
        load_image(path)
    assert repr(str(path)) in one_line(error)


def test_a_lazily_opened_truncated_image(tmp_path: Path) -> None:
    path = broken(lambda data: data[: len(data) // 2], "jpg")(tmp_path)
    with PIL.Image.open(path) as image, pytest.raises(ImageError, match="damaged") as error:
        load_image(image)
    one_line(error)


def test_a_closed_image(tmp_path: Path) -> None:
    picture("RGB").save(tmp_path / "a.png")
    with PIL.Image.open(tmp_path / "a.png") as image:
        pass
    with pytest.raises(ImageError) as error:
        load_image(image)
    one_line(error)


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (0, 0)])
def test_empty_images(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="not empty") as error:
        load_image(PIL.Image.new("RGB", size))
    one_line(error)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_arrays(dtype: type, channels: int | None) -> None:
    array = ramp(channels or 1)
    expected = np.broadcast_to(array[:, :, :3], (HEIGHT, WIDTH, 3))
    given: npt.NDArray[Any] = array if dtype is np.uint8 else (array / 255).astype(dtype)
    result = load_image(given[:, :, 0] if channels is None else given)
    np.testing.assert_array_equal(pixels(result), expected)


def test_float_arrays_are_rounded() -> None:
    values = np.array([[0.0, 0.0019, 0.002, 0.5, 0.998, 0.999, 1.0]])
    np.testing.assert_array_equal(pixels(load_image(values))[0, :, 0], [0, 0, 1, 128, 254, 255, 255])


def test_strided_and_read_only_arrays() -> None:
    array = ramp()[::-1, ::2]
    array.setflags(write=False)
    np.testing.assert_array_equal(pixels(load_image(array)), array)


def test_an_array_is_copied() -> None:
    array = ramp()
    image = load_image(array)
    array[:] = 0
    np.testing.assert_array_equal(pixels(image), ramp())


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4,), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((5, 4, 8), np.uint8),
        np.zeros((6, 6, 2), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0), np.float32),
        np.zeros((), np.uint8),
        np.zeros((4, 4, 3), np.int64),
        np.zeros((4, 4, 3), np.uint16),
        np.zeros((4, 4), bool),
        np.zeros((4, 4), object),
        np.zeros((4, 4), complex),
        np.full((4, 4, 3), 1.01, np.float32),
        np.full((4, 4, 3), -0.01, np.float64),
        np.full((4, 4), np.nan),
        np.full((4, 4), np.inf),
        np.full((4, 4), 200.0),
    ],
)
def test_unusable_arrays(array: npt.NDArray[Any]) -> None:
    with pytest.raises(ImageError, match=r"pass|rescale") as error:
        load_image(array)
    one_line(error)


@pytest.mark.parametrize("image", [None, 3, [[0, 1]], object()])
def test_other_types(image: Any) -> None:
    with pytest.raises(ArgumentError, match="convert it first") as error:
        load_image(image)
    one_line(error)


def test_a_damaged_length_takes_no_memory(tmp_path: Path) -> None:
    """A box of JPEG 2000 that claims 2 GB: Pillow asks the file for them at once."""
    PIL.Image.new("RGB", (24, 16)).save(tmp_path / "a.jp2")
    content = (tmp_path / "a.jp2").read_bytes()
    at = content.index(b"jp2h")
    (tmp_path / "a.jp2").write_bytes(content[: at - 4] + (2**31 - 1).to_bytes(4, "big") + content[at:])
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match="may be damaged"):
            load_image(tmp_path / "a.jp2")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000
