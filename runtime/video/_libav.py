"""Videos that libav encodes, through PyAV: H.264, VP9 and lossless FFV1 in files, and in streams on standard output.

imageio's `pyav` plugin wraps the same library, but it offers neither the encoder's options (the quality is always
libx264's default) nor the colour tags, so this module calls the encoder directly.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from typing import BinaryIO, ClassVar, Protocol, cast

import av
import numpy as np
from av.container import OutputContainer
from av.video.reformatter import ColorRange
from av.video.stream import VideoStream
from numpy.typing import NDArray

from svd_trt.runtime.video._png import KEYWORD
from svd_trt.runtime.video._raw import StdoutWriter
from svd_trt.runtime.video._writer import FileWriter, State, VideoSpec, VideoWriter
from svd_trt.runtime.video._yuv import require_even, yuv420p

# ITU-T H.273 code points: BT.709 primaries and matrix; players expect its transfer function for sRGB pictures too.
_BT709 = 1
_H264 = {
    # Visually lossless for most material; the default of 23 smears the fine noise of generated frames.
    "crf": "17",
    # A colour sample is at the centre of its four pixels. Without this tag, decoders assume that it is half a pixel
    # further left, and shift all colours by that much.
    "x264-params": "chromaloc=1",
}
# As fast as H.264 at a quality that looks the same; without a bit rate of 0, crf is only a limit.
_VP9 = {"crf": "20", "b:v": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"}
# Version 3 with a checksum for each slice, which archives ask for.
_FFV1 = {"level": "3", "slicecrc": "1"}


_AFTER_IHDR = 8 + 25  # the signature, and the chunk with its length, name and checksum
_BLOCK = 1 << 20


def _to_yuv(frame: NDArray[np.uint8]) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(yuv420p(frame), format="yuv420p")


def _to_rgb(frame: NDArray[np.uint8]) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(frame, format="rgb24")


def _to_bgr0(frame: NDArray[np.uint8]) -> av.VideoFrame:
    return _to_rgb(frame).reformat(format="bgr0")  # only the order of bytes changes


@dataclass(frozen=True)
class Encoding:
    """How libav writes a video.

    Attributes:
        container: libav's name of the file format.
        codec: libav's name of the encoder.
        pixels: libav's name of the pixel format.
        convert: makes a picture of that format from uint8 RGB ``[H, W, 3]``.
        codec_options: of the encoder.
        container_options: of the file format.
        halves_colour: colours have half the height and width, so both must be even.
    """

    container: str
    codec: str
    pixels: str
    convert: Callable[[NDArray[np.uint8]], av.VideoFrame]
    codec_options: Mapping[str, str]
    container_options: Mapping[str, str] = field(default_factory=dict)
    halves_colour: bool = True

    def unavailable(self) -> str | None:
        """Why the installed PyAV has no such encoder, and what to do; None if it has."""
        if self.codec in av.codecs_available:
            return None
        return f"the installed PyAV has no encoder {self.codec}; pip install --force-reinstall av, or write .webp"


_FRAGMENTS = "empty_moov+default_base_moof+frag_every_frame"
MP4 = Encoding("mp4", "libx264", "yuv420p", _to_yuv, _H264, {"movflags": "+faststart"})
MOV = Encoding("mov", "libx264", "yuv420p", _to_yuv, _H264, {"movflags": "+faststart"})
WEBM = Encoding("webm", "libvpx-vp9", "yuv420p", _to_yuv, _VP9)
MKV = Encoding("matroska", "ffv1", "bgr0", _to_bgr0, _FFV1, halves_colour=False)
APNG = Encoding("apng", "apng", "rgb24", _to_rgb, {}, {"plays": "0"}, halves_colour=False)
# Without a look at later frames, so that each frame leaves at once.
MP4_STREAM = Encoding("mp4", "libx264", "yuv420p", _to_yuv, {**_H264, "tune": "zerolatency"}, {"movflags": _FRAGMENTS})
MKV_STREAM = Encoding("matroska", "ffv1", "bgr0", _to_bgr0, _FFV1, {"cluster_time_limit": "0"}, halves_colour=False)


class _Sink(Protocol):
    """What libav writes a stream to."""

    def write(self, data: bytes, /) -> int: ...


class Encoder:
    """A video that libav is encoding, into a file by its name or into a sink."""

    def __init__(self, target: str | _Sink, encoding: Encoding, spec: VideoSpec) -> None:
        self._encoding = encoding
        self._spec = spec
        self._count = 0
        options = dict(encoding.container_options)
        if encoding.container in ("mp4", "mov"):
            options["movie_timescale"] = str(_timescale(spec.fps))
        with _system_errors():
            self._container: OutputContainer | None = av.open(
                target, "w", format=encoding.container, container_options=options
            )
            self._container.metadata["comment"] = spec.parameters
            self._container.metadata["encoding_tool"] = "svd-trt"
            self._stream = _add_stream(self._container, encoding, spec)

    def append(self, frame: NDArray[np.uint8]) -> None:
        """Encode one frame, uint8 ``[H, W, 3]``."""
        picture = self._encoding.convert(frame)
        picture.pts = self._count
        picture.time_base = 1 / self._spec.fps
        # Without a duration the last frame has no length, and a video of one frame has no rate.
        picture.duration = 1
        self._encode(picture)
        self._count += 1

    def finish(self) -> None:
        """Write what the encoder still holds, and the end of the file."""
        self._encode(None)
        self.close()

    def close(self) -> None:
        """Close the container, which writes a trailer. Closing twice is harmless."""
        container, self._container = self._container, None
        if container is not None:
            with _system_errors():
                container.close()

    def _encode(self, picture: av.VideoFrame | None) -> None:
        assert self._container is not None, "only used before the end"
        with _system_errors():
            self._container.mux(self._stream.encode(picture))


class _EncodedVideo(VideoWriter):
    """What a file and a stream that libav writes have in common."""

    encoding: ClassVar[Encoding]

    def __init__(self, path: str, spec: VideoSpec) -> None:
        if self.encoding.halves_colour:
            require_even(path, spec.height, spec.width)
        super().__init__(path, spec)
        self._opened_encoder: Encoder | None = None

    @classmethod
    def unavailable(cls) -> str | None:
        return cls.encoding.unavailable()

    @property
    def _encoder(self) -> Encoder:
        assert self._opened_encoder is not None, "only used between _start and _finish"
        return self._opened_encoder

    def _append(self, frame: NDArray[np.uint8]) -> None:
        self._encoder.append(frame)

    def _close(self) -> None:
        """Close the container after a failure, for which closing, too, may fail."""
        with suppress(OSError):
            if self._opened_encoder is not None:
                self._opened_encoder.close()


class EncodedFile(_EncodedVideo, FileWriter):
    """A file that libav writes; holds only the encoder's look-ahead, for videos of any length."""

    def _start(self) -> None:
        super()._start()
        # By name and not by handle: to move an index to the front, libav opens the file a second time.
        self._opened_encoder = Encoder(str(self._temporary), self.encoding, self.spec)

    def _complete(self) -> None:
        self._encoder.finish()

    def _discard(self) -> None:
        self._close()
        super()._discard()


class Mp4Writer(EncodedFile):
    """H.264, yuv420p, BT.709, index first."""

    suffix, encoding = ".mp4", MP4


class MovWriter(EncodedFile):
    """As `Mp4Writer`, in QuickTime's container."""

    suffix, encoding = ".mov", MOV


class WebmWriter(EncodedFile):
    """VP9, yuv420p, BT.709."""

    suffix, encoding = ".webm", WEBM


class MkvWriter(EncodedFile):
    """FFV1 in RGB, lossless."""

    suffix, encoding = ".mkv", MKV


class ApngWriter(EncodedFile):
    """Animated PNG, lossless, an endless loop, with the parameters in a text chunk as in a folder of PNGs."""

    suffix, encoding = ".apng", APNG

    def _complete(self) -> None:
        super()._complete()
        with self._temporary.open("r+b") as file:
            _add_text(file, self.spec.parameters)


class Mp4StreamWriter(_EncodedVideo, StdoutWriter):
    """H.264 in fragmented MP4 on standard output: a fragment for each frame, as it is written."""

    encoding: ClassVar[Encoding] = MP4_STREAM

    def _start(self) -> None:
        super()._start()
        self._opened_encoder = Encoder(_Pipe(self._send), self.encoding, self.spec)

    def _send(self, data: memoryview) -> None:
        # After a failure the container is closed, and its trailer would say that the video is complete.
        if self._state is not State.FAILED:
            super()._send(data)

    def _finish(self) -> None:
        self._encoder.finish()
        super()._finish()

    def _discard(self) -> None:
        self._close()


class MkvStreamWriter(Mp4StreamWriter):
    """FFV1 in Matroska on standard output, lossless."""

    encoding: ClassVar[Encoding] = MKV_STREAM


class _Pipe:
    """A sink that cannot be rewound, so that libav writes a stream."""

    def __init__(self, send: Callable[[memoryview], None]) -> None:
        self._send = send

    def write(self, data: bytes, /) -> int:
        self._send(memoryview(data))
        return len(data)


def _add_stream(container: OutputContainer, encoding: Encoding, spec: VideoSpec) -> VideoStream:
    options = dict(encoding.codec_options)
    stream = cast(VideoStream, container.add_stream(encoding.codec, rate=spec.fps, options=options))
    stream.width, stream.height, stream.pix_fmt = spec.width, spec.height, encoding.pixels
    context = stream.codec_context
    context.time_base = 1 / spec.fps
    if encoding.halves_colour:
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = ColorRange.MPEG
    return stream


def _add_text(file: BinaryIO, text: str) -> None:
    """Put a text chunk after the first chunk of a PNG, IHDR; readers stop at the pictures."""
    content = b"tEXt" + KEYWORD.encode() + b"\0" + text.encode("ascii")
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    end = file.seek(0, os.SEEK_END)
    while end > _AFTER_IHDR:  # from the end, so that no block is overwritten before it is moved
        start = max(_AFTER_IHDR, end - _BLOCK)
        file.seek(start)
        block = file.read(end - start)
        file.seek(start + len(chunk))
        file.write(block)
        end = start
    file.seek(_AFTER_IHDR)
    file.write(chunk)


def _timescale(fps: Fraction) -> int:
    """Ticks a second for the length of the whole video; the default of 1000 cannot hold 7.5 frames a second."""
    return fps.numerator if fps.numerator >= 600 else fps.numerator * 1000


@contextmanager
def _system_errors() -> Iterator[None]:
    """Turn libav's own errors into `OSError`, which its errors of the operating system already are."""
    try:
        yield
    except av.FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise OSError(error.errno, f"the video encoder failed ({error.strerror})") from error
