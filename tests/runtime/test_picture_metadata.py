"""Orientation and damaged metadata: nothing beside the pixels refuses them, and they are those of diffusers."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest

from svd_trt.errors import ImageError
from svd_trt.runtime.images import load_image

HEIGHT, WIDTH = 24, 32
IMAGE_DESCRIPTION, ORIENTATION, X_RESOLUTION, ICC_PROFILE = 0x010E, 0x0112, 0x011A, 34675
TURNED = 6
SAVED = {"jpg": {"quality": 95}, "png": {}, "tiff": {}, "webp": {"lossless": True}}


def picture() -> PIL.Image.Image:
    rows, columns = np.indices((HEIGHT, WIDTH))
    pixels = np.stack([rows * 10, columns * 7, 255 - rows * 4 - columns * 3], axis=2)
    return PIL.Image.fromarray(pixels.astype(np.uint8))


def encoded(kind: str, image: PIL.Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or picture()).save(file, {"jpg": "JPEG"}.get(kind, kind), **SAVED[kind], **options)
    return file.getvalue()


def plain(kind: str) -> npt.NDArray[np.uint8]:
    """The pixels of the file without metadata."""
    return np.asarray(PIL.Image.open(io.BytesIO(encoded(kind))).convert("RGB"))


def turned(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """As orientation 6 says."""
    return np.rot90(pixels, k=-1)


def directory(*entries: tuple[int, int, int, bytes], data: bytes = b"", following: bytes = bytes(4)) -> bytes:
    """EXIF data with entries of tag, type, count and value; ``data`` starts at 8 + 2 + 12 entries + 4."""
    body = b"".join(struct.pack(">HHI4s", *entry) for entry in entries)
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + body + following + data


ORIENTED = (ORIENTATION, 3, 1, struct.pack(">H", TURNED))
EXIF = {
    # A type that PIL reads and cannot write: the report that this test comes from.
    "a rational description": directory(
        (IMAGE_DESCRIPTION, 5, 1, struct.pack(">I", 38)), ORIENTED, data=struct.pack(">II", 1, 3)
    ),
    "a resolution in letters": directory(ORIENTED, (X_RESOLUTION, 2, 3, b"72\0")),
    "a value beyond the end": directory(ORIENTED, (IMAGE_DESCRIPTION, 2, 500, struct.pack(">I", 4000))),
    "more entries than there are": directory(ORIENTED)[:9] + b"\x09" + directory(ORIENTED)[10:],
    "a type that does not exist": directory((IMAGE_DESCRIPTION, 77, 1, b""), ORIENTED),
    "a directory that follows beyond the end": directory(ORIENTED, following=b"\x7f\xff\xff\xff"),
    "two orientations": directory((ORIENTATION, 3, 2, struct.pack(">HH", TURNED, 3))),
    "a maker's note of zeros": directory(ORIENTED, (0x8769, 4, 1, struct.pack(">I", 8))),
}
UNREADABLE = {
    "nothing": b"",
    "no header": b"what",
    "a header alone": b"MM\0*",
    "a first directory beyond the end": b"MM\0*\x7f\xff\xff\xff",
    "random bytes": bytes(np.random.default_rng(0).integers(0, 256, 200, dtype=np.uint8)),
    "an orientation in letters": directory((ORIENTATION, 2, 2, b"6\0")),
    "an orientation that does not exist": directory((ORIENTATION, 3, 1, struct.pack(">H", 99))),
}


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("case", EXIF)
def test_damaged_exif_data_keeps_the_orientation(kind: str, case: str) -> None:
    data = encoded(kind, exif=b"Exif\0\0" + EXIF[case])
    np.testing.assert_array_equal(np.asarray(load_image(io.BytesIO(data))), turned(plain(kind)))


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_exif_data_is_ignored(kind: str, case: str) -> None:
    data = encoded(kind, exif=b"Exif\0\0" + UNREADABLE[case])
    np.testing.assert_array_equal(np.asarray(load_image(io.BytesIO(data))), plain(kind))


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("orientation", range(10))
def test_orientations_are_those_of_diffusers(kind: str, orientation: int, tmp_path: Path) -> None:
    diffusers_load_image = pytest.importorskip("diffusers.utils").load_image
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"turned.{kind}"
    path.write_bytes(encoded(kind, exif=exif))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # diffusers leaves the file to the garbage collector
        expected = np.asarray(diffusers_load_image(str(path)))
    upright = load_image(path)
    np.testing.assert_array_equal(np.asarray(upright), expected)
    assert upright.size == ((HEIGHT, WIDTH) if orientation in (5, 6, 7, 8) else (WIDTH, HEIGHT))
    np.testing.assert_array_equal(np.asarray(load_image(upright)), expected)  # it is not turned again


def xmp(orientation: int) -> bytes:
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


@pytest.mark.parametrize("exif", [None, b"Exif\0\0what"])
def test_the_orientation_of_xmp_data(exif: bytes | None) -> None:
    data = encoded("jpg", xmp=xmp(TURNED), **({} if exif is None else {"exif": exif}))
    np.testing.assert_array_equal(np.asarray(load_image(io.BytesIO(data))), turned(plain("jpg")))


def chunk(name: bytes, body: bytes, *, checksum: int | None = None) -> bytes:
    check = zlib.crc32(name + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)


CHUNKS = {
    "a text that is too long": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 20))),
    "too many texts": b"".join(chunk(b"tEXt", b"k\0" + bytes(1 << 20)) for _ in range(70)),
    "an unknown compression": chunk(b"zTXt", b"Comment\0\x09abc"),
    "a text with a wrong checksum": chunk(b"tEXt", b"Comment\0abc", checksum=0),
    "a profile that is cut off": chunk(b"iCCP", b"name"),
    "a profile of an unknown compression": chunk(b"iCCP", b"name\0\x09abc"),
    "a profile that is too long": chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(2 << 20))),
    "short gamma": chunk(b"gAMA", b"a"),
    "short chromaticities": chunk(b"cHRM", b"a"),
    "short resolution": chunk(b"pHYs", b"a"),
    "short intent": chunk(b"sRGB", b""),
    "an animation that is cut off": chunk(b"acTL", b"a"),
    "a frame beyond the picture": chunk(b"acTL", struct.pack(">II", 2, 0))
    + chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 999, 999, 0, 0, 1, 1, 0, 0)),
    "an unknown chunk with a wrong checksum": chunk(b"abCd", b"abc", checksum=0),
}


@pytest.mark.parametrize("place", ["before the pixels", "after them"])
@pytest.mark.parametrize("case", CHUNKS)
def test_damaged_chunks_of_png(case: str, place: str) -> None:
    """The EXIF orientation beside the damaged chunk is still applied."""
    data = encoded("png", exif=b"Exif\0\0" + directory(ORIENTED))
    at = 33 if place == "before the pixels" else data.rindex(b"IEND") - 4
    damaged = data[:at] + CHUNKS[case] + data[at:]
    np.testing.assert_array_equal(np.asarray(load_image(io.BytesIO(damaged))), turned(plain("png")))


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


SEGMENTS = {
    "a profile that is cut off": segment(0xE2, b"ICC_PROFILE\0"),
    "half a profile": segment(0xE2, b"ICC_PROFILE\0\x01\x02" + bytes(200)),
    "short JFIF": segment(0xE0, b"JFIF\0"),
    "short Adobe": segment(0xEE, b"Adobe"),
    "Photoshop data that is cut off": segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04"),
    "Photoshop data of a wrong size": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\x7f\xff"),
    "several pictures that are not there": segment(0xE2, b"MPF\0" + bytes(20)),
    "a comment of any bytes": segment(0xFE, bytes(range(256))),
    "FlashPix": segment(0xE2, b"FPXR\0"),
}


@pytest.mark.parametrize("case", SEGMENTS)
def test_damaged_segments_of_jpeg(case: str) -> None:
    data = encoded("jpg", exif=b"Exif\0\0" + directory(ORIENTED))
    damaged = data[:2] + SEGMENTS[case] + data[2:]
    np.testing.assert_array_equal(np.asarray(load_image(io.BytesIO(damaged))), turned(plain("jpg")))


def tiff(*entries: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """A TIFF file of one strip with further entries in its directory."""
    pixels = np.asarray(picture()).tobytes()
    shorts = {256: WIDTH, 257: HEIGHT, 259: 1, 262: 2, 274: TURNED, 277: 3, 278: HEIGHT}
    every = [(tag, 3, 1, struct.pack(f"{order}H", value)) for tag, value in shorts.items()]
    every += [
        (258, 3, 3, struct.pack(f"{order}I", 8)),
        (273, 4, 1, struct.pack(f"{order}I", 14)),
        (279, 4, 1, struct.pack(f"{order}I", len(pixels))),
        *entries,
    ]
    body = b"".join(struct.pack(f"{order}HHI4s", *entry) for entry in sorted(every))
    start = 14 + len(pixels)
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", start)
    return head + struct.pack(f"{order}HHH", 8, 8, 8) + pixels + struct.pack(f"{order}H", len(every)) + body + bytes(4)


TAGS = {
    "a resolution in letters": [(X_RESOLUTION, 2, 4, b"72\0\0"), (296, 3, 1, struct.pack("<H", 3))],
    "a resolution beyond the end": [(X_RESOLUTION, 5, 1, struct.pack("<I", 1 << 30))],
    "a rational description": [(IMAGE_DESCRIPTION, 5, 1, struct.pack("<I", 8))],
    "a description beyond the end": [(IMAGE_DESCRIPTION, 2, 900, struct.pack("<I", 1 << 30))],
    "a profile that is a number": [(ICC_PROFILE, 3, 1, b"\1\0")],
    "a type that does not exist": [(33333, 77, 1, b"")],
    "EXIF data beyond the end": [(0x8769, 4, 1, struct.pack("<I", 1 << 30))],
    "XMP data that is a number": [(700, 3, 1, b"\1\0")],
}


@pytest.mark.parametrize("case", TAGS)
def test_damaged_tags_of_tiff(case: str) -> None:
    np.testing.assert_array_equal(np.asarray(load_image(io.BytesIO(tiff(*TAGS[case])))), turned(np.asarray(picture())))


def test_damaged_tags_of_a_big_endian_tiff() -> None:
    data = tiff((X_RESOLUTION, 2, 4, b"72\0\0"), (296, 3, 1, struct.pack(">H", 3)), order=">")
    np.testing.assert_array_equal(np.asarray(load_image(io.BytesIO(data))), turned(np.asarray(picture())))


def test_webp_that_is_cut_off_in_its_metadata() -> None:
    data = encoded("webp", exif=b"Exif\0\0" + EXIF["a resolution in letters"])
    assert np.array_equal(np.asarray(load_image(io.BytesIO(data[:-8]))), plain("webp"))


def test_exif_data_with_a_wrong_checksum() -> None:
    """It is read, because a checksum says nothing about the pixels."""
    data = bytearray(encoded("png", exif=b"Exif\0\0" + directory(ORIENTED)))
    at = data.index(b"eXIf")
    (length,) = struct.unpack_from(">I", data, at - 4)
    data[at + 4 + length : at + 8 + length] = bytes(4)
    np.testing.assert_array_equal(np.asarray(load_image(io.BytesIO(bytes(data)))), turned(plain("png")))


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_file_is_read_or_refused(kind: str, seed: int) -> None:
    """Whatever bytes are changed, there is a picture or an `ImageError`, and nothing else."""
    rng = np.random.default_rng(seed)
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = TURNED
    data = bytearray(encoded(kind, exif=exif))
    for at in rng.integers(0, len(data), 6):
        data[at] = rng.integers(0, 256)
    with contextlib.suppress(ImageError):
        assert load_image(io.BytesIO(bytes(data))).mode == "RGB"
