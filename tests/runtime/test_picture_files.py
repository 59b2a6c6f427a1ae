"""Places that pictures come from, formats that need more than Pillow, and pictures that are too large."""

from __future__ import annotations

import base64
import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.features
import PIL.Image
import pytest

from svd_trt.errors import ImageError, MissingDependencyError
from svd_trt.runtime.images import load_image
from svd_trt.runtime.picture_files import local_path
from tests.runtime.memory_peak import peak_of

HEIGHT, WIDTH = 40, 60


@pytest.fixture
def pixels() -> npt.NDArray[np.uint8]:
    rows, columns = np.indices((HEIGHT, WIDTH))
    return np.stack([rows * 6, columns * 4, 255 - rows * 6], axis=2).astype(np.uint8)


@pytest.fixture
def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def refusal(image: object) -> str:
    with pytest.raises(ImageError) as error:
        load_image(image)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("head", ["data:image/png;base64,", "DATA:image/png;charset=utf-8;BASE64,", "data:;base64,"])
def test_data_urls(head: str, png: bytes, pixels: npt.NDArray[np.uint8]) -> None:
    text = base64.b64encode(png).decode()
    broken = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    for body in (text, broken, text.rstrip("="), text.replace("+", "-").replace("/", "_"), text.replace("+", "%2B")):
        np.testing.assert_array_equal(np.asarray(load_image(head + body)), pixels)


def test_a_data_url_in_percent_escapes(png: bytes, pixels: npt.NDArray[np.uint8]) -> None:
    escaped = "".join(f"%{byte:02X}" for byte in png)
    np.testing.assert_array_equal(np.asarray(load_image(f"data:image/png,{escaped}")), pixels)


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,iVBO$$$", "base64 is damaged"),
        ("data:image/png;base64,iVBOR", "base64 is damaged"),
        ("data:image/png;base64,aGVsbG8=", "not a picture"),
        ("data:,", "not a picture"),
    ],
)
def test_data_urls_that_are_damaged(url: str, what: str) -> None:
    assert what in refusal(url)


def test_a_long_data_url_is_shortened() -> None:
    message = refusal("data:image/png;base64," + "A" * 1_000_000)
    assert "data:image/png;base64,AAAA" in message
    assert "1,000,022 characters" in message
    assert len(message) < 400


def test_file_urls(tmp_path: Path, png: bytes, pixels: npt.NDArray[np.uint8]) -> None:
    path = tmp_path / "a picture ü 100%.png"
    path.write_bytes(png)
    escaped = f"{tmp_path}/a%20picture%20%C3%BC%20100%25.png"
    for url in (path.as_uri(), f"file://{escaped}", f"file://localhost{escaped}", f"FILE:{escaped}?a=b#c"):
        assert local_path(url) == path
        np.testing.assert_array_equal(np.asarray(load_image(url)), pixels)


def test_a_file_url_of_a_name_that_is_not_text(tmp_path: Path, png: bytes) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    path.write_bytes(png)
    assert load_image(f"file://{tmp_path}/%FF.png").size == (WIDTH, HEIGHT)


def test_urls_that_cannot_be_read(tmp_path: Path) -> None:
    assert "another machine" in refusal("file://server/picture.png")
    assert "another machine" in refusal("file://[/picture.png")
    assert "no file has %00 in its name; check the URL" in refusal("file:///a%00b.png")
    assert "no such file" in refusal(f"file://{tmp_path}/missing.png")
    assert "directory" in refusal("file:///")
    for url in ("https://example.com/a.png", "HTTP://example.com/a.png", "s3://bucket/a.png"):
        assert "download it" in refusal(url)


@pytest.mark.parametrize("name", ["data.png", "file.png", "a:b.png", "http:"])
def test_names_that_resemble_urls(name: str, tmp_path: Path, png: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(png)
    assert load_image(name).size == (WIDTH, HEIGHT)
    assert local_path(name) == Path(name)
    assert local_path("data:image/png;base64,AAAA") is None


@pytest.fixture
def pipe(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A named pipe into which a thread writes ``request.param`` or the fixture of that name."""
    content = request.param if isinstance(request.param, bytes) else request.getfixturevalue(request.param)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(content,))
    writer.start()
    yield path
    writer.join()


@pytest.mark.parametrize("pipe", ["png"], indirect=True)
def test_a_pipe(pipe: Path, pixels: npt.NDArray[np.uint8]) -> None:
    np.testing.assert_array_equal(np.asarray(load_image(pipe)), pixels)


@pytest.mark.parametrize("pipe", [b""], indirect=True)
def test_an_empty_pipe(pipe: Path) -> None:
    assert "it is empty" in refusal(pipe)


def test_a_stream_is_left_open(png: bytes, pixels: npt.NDArray[np.uint8]) -> None:
    stream = io.BytesIO(png)
    np.testing.assert_array_equal(np.asarray(load_image(stream)), pixels)
    assert not stream.closed


def header_only_png(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def progressive_jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (64, 64)).save(file, "JPEG", progressive=True)
    data = bytearray(file.getvalue())
    at = data.index(b"\xff\xc2")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


BOMBS = {
    "png": (header_only_png(60000, 60000), "scale it down"),
    "one row": (header_only_png(170_000_000, 1), "crop it"),
    "one column": (header_only_png(1, 170_000_000), "crop it"),
    "progressive jpeg": (progressive_jpeg(60000, 60000), "baseline JPEG"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_need_memory(name: str, tmp_path: Path) -> None:
    """A small file that says that it has gigapixels; refusing it must not take 100 MB."""
    data, what = BOMBS[name]
    message = refusal(io.BytesIO(data))
    assert what in message
    assert "MAX_IMAGE_PIXELS" not in message  # the command line cannot set it
    (tmp_path / "small.png").write_bytes(small_png())
    (tmp_path / "bomb").write_bytes(data)
    load = f"load_image({str(tmp_path)!r} + "
    setup = f"from svd_trt.runtime.images import load_image; {load}'/small.png')"  # loads PIL's plugins
    code = f"try: {load}'/bomb')\nexcept Exception: pass"
    assert peak_of(setup, code) < 100_000_000


class Counted(io.BytesIO):
    """A stream that counts the bytes that are read from it."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


@pytest.mark.parametrize("content", [b"Once upon a time ", b"\0" * 16, b"%PDF-1.7\n%abcdefg", b"\x1f\x8b" * 8])
def test_what_is_no_picture_is_not_read(content: bytes) -> None:
    file = Counted(content * 1_000_000)
    assert "not a picture" in refusal(file)
    assert file.count < 1_000_000


def test_a_pipe_without_an_end() -> None:
    with subprocess.Popen(["head", "-c", "2000000000", "/dev/zero"], stdout=subprocess.PIPE) as source:
        assert source.stdout is not None
        assert "it has more than 256 MB; pass a file" in refusal(source.stdout)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n8 8 rectfill\n%%EOF\n"


@pytest.mark.parametrize("head", [b"", struct.pack("<I7IHH", 0xC6D3D0C5, 32, len(EPS), 0, 0, 0, 0, 0xFFFF, 0, 0)[:32]])
def test_no_program_is_started_for_eps(head: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ghostscript has run commands of files before, and a file says only in its first bytes that it is EPS."""
    script, started = tmp_path / "gs", tmp_path / "started"
    script.write_text(f"#!/bin/sh\ntouch {started}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    picture = tmp_path / "picture.png"
    picture.write_bytes(head + EPS)
    assert "it is EPS, which only another program can draw; save it as PNG" in refusal(picture)
    assert not started.exists()
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # not asked yet whether there is one
    with pytest.raises(Exception):  # noqa: B017, PT011  # what a load raises after a program that drew nothing
        PIL.Image.open(io.BytesIO(head + EPS)).load()
    assert started.exists()


def small_png() -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(file, "png")
    return file.getvalue()


def test_pictures_up_to_the_limit_are_those_of_diffusers(
    tmp_path: Path, png: bytes, pixels: npt.NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow warns from half the limit on, which refused a photograph of 108 megapixels before."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 2)
    said: list[str] = []
    np.testing.assert_array_equal(np.asarray(load_image(io.BytesIO(png), warn=said.append)), pixels)
    assert said == []
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 2 - 1)
    assert "2.4 k pixels" in refusal(io.BytesIO(png))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    np.testing.assert_array_equal(np.asarray(load_image(io.BytesIO(png))), pixels)


@pytest.mark.parametrize(("limit", "scale", "share"), [(700, 2, "half"), (200, 4, "a quarter"), (50, 8, "an eighth")])
def test_a_larger_jpeg_is_read_at_a_smaller_size(
    limit: int, scale: int, share: str, pixels: npt.NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.fromarray(pixels).save(file, "JPEG", quality=95, exif=exif)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
    said: list[str] = []
    read = load_image(file, name="big.jpg", warn=said.append)
    assert said == [f"big.jpg has 2.4 k pixels, so it was read at {share} of its width and height"]
    assert read.size == (-(-HEIGHT // scale), -(-WIDTH // scale))
    small = PIL.Image.fromarray(np.rot90(pixels, k=-1)).resize(read.size, PIL.Image.Resampling.BOX)
    assert np.abs(np.asarray(read, int) - np.asarray(small, int)).mean() < 8


def test_a_large_progressive_jpeg_says_what_to_do(
    pixels: npt.NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "JPEG", progressive=True)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 500)
    assert "baseline JPEG" in refusal(file)


def test_avif(pixels: npt.NDArray[np.uint8]) -> None:
    pytest.importorskip("PIL.AvifImagePlugin")  # from Pillow 11.3 on
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "AVIF", quality=100, subsampling="4:4:4")
    read = np.asarray(load_image(file), int)
    assert np.abs(read - pixels).max() < 12
    assert "damaged" in refusal(io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2]))


def heic(pixels: npt.NDArray[np.uint8], orientation: int) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image = pillow_heif.from_pillow(PIL.Image.fromarray(pixels))
    image.info["exif"] = exif.tobytes()
    image.save(file, quality=-1, chroma=444)
    return file.getvalue()


@pytest.mark.parametrize("orientation", [1, 6, 5])
def test_heic(orientation: int, pixels: npt.NDArray[np.uint8]) -> None:
    """The pixels are those of diffusers after ``pillow_heif.register_heif_opener()``, which has this class open it."""
    diffusers_load_image = pytest.importorskip("diffusers.utils").load_image
    data = heic(pixels, orientation)
    from pillow_heif import HeifImageFile

    ours = np.asarray(load_image(io.BytesIO(data)))
    np.testing.assert_array_equal(ours, np.asarray(diffusers_load_image(HeifImageFile(io.BytesIO(data)))))
    upright = {1: pixels, 6: np.rot90(pixels, k=-1), 5: pixels.transpose(1, 0, 2)}[orientation]
    assert np.abs(ours.astype(int) - upright).max() < 12


def test_damaged_heic(pixels: npt.NDArray[np.uint8]) -> None:
    assert "damaged" in refusal(io.BytesIO(heic(pixels, 1)[:200]))


def test_heic_without_pillow_heif(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A picture is known by its content, whatever its name."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "IMG_0001.JPG"
    path.write_bytes(struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"mif1", 0, b"mif1", b"heic") + bytes(100))
    with pytest.raises(MissingDependencyError, match=r"IMG_0001.JPG' is a HEIC picture.*pip install 'svd-trt\[heic\]'"):
        load_image(path)


def test_avif_without_support(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.features, "check", lambda name: False)
    data = struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"avif", 0, b"avif", b"mif1") + bytes(100)
    assert "pip install 'pillow>=11.3'" in refusal(io.BytesIO(data))
