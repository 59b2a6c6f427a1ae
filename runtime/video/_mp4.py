"""H.264 in MP4 through PyAV.

imageio's `pyav` plugin wraps the same library, but it offers neither the encoder's options (the quality is always
libx264's default) nor the colour tags, so this module calls the encoder directly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction

import av
import numpy as np
from av.container import OutputContainer
from av.video.reformatter import ColorRange
from av.video.stream import VideoStream
from numpy.typing import NDArray

from svd_trt.errors import ArgumentError
from svd_trt.runtime.video._writer import FileWriter, VideoSpec
from svd_trt.runtime.video._yuv import yuv420p

_ENCODER = {
    # Visually lossless for most material; the default of 23 smears the fine noise of generated frames.
    "crf": "17",
    # A colour sample is at the centre of its four pixels. Without this tag, decoders assume that it is half a pixel
    # further left, and shift all colours by that much.
    "x264-params": "chromaloc=1",
}
# ITU-T H.273 code points: BT.709 primaries and matrix; players expect its transfer function for sRGB pictures too.
_BT709 = 1


class Mp4Writer(FileWriter):
    """H.264, yuv420p, BT.709, index first; holds only the encoder's look-ahead, for videos of any length."""

    suffix = ".mp4"

    def __init__(self, path: str, spec: VideoSpec) -> None:
        if spec.height % 2 or spec.width % 2:
            raise ArgumentError(f"an .mp4 needs an even height and width, got {spec.height}x{spec.width}")
        super().__init__(path, spec)
        self._container: OutputContainer | None = None

    @classmethod
    def unavailable(cls) -> str | None:
        if "libx264" in av.codecs_available:
            return None
        return "the installed PyAV cannot encode H.264; pip install --force-reinstall av, or write .webp"

    def _start(self) -> None:
        super()._start()
        # By name and not by handle: to move the index to the front, libav opens the file a second time.
        options = {"movflags": "+faststart", "movie_timescale": str(_timescale(self.spec.fps))}
        self._container = av.open(str(self._temporary), "w", format="mp4", container_options=options)
        self._container.metadata["comment"] = self.spec.parameters
        self._container.metadata["encoding_tool"] = "svd-trt"
        self._stream = _add_stream(self._container, self.spec)

    def _append(self, frame: NDArray[np.uint8]) -> None:
        picture = av.VideoFrame.from_ndarray(yuv420p(frame), format="yuv420p")
        picture.pts = self._count
        picture.time_base = 1 / self.spec.fps
        # Without a duration the last frame has no length, and a video of one frame has no rate.
        picture.duration = 1
        self._encode(picture)

    def _complete(self) -> None:
        self._encode(None)
        self._close()

    def _discard(self) -> None:
        # Closing writes a trailer, which can fail for the reason that the frames did; the file is removed anyway.
        with suppress(OSError):
            self._close()
        super()._discard()

    def _encode(self, picture: av.VideoFrame | None) -> None:
        assert self._container is not None, "only used between _start and _finish"
        with _system_errors():
            self._container.mux(self._stream.encode(picture))

    def _close(self) -> None:
        container, self._container = self._container, None
        if container is not None:
            with _system_errors():
                container.close()


def _add_stream(container: OutputContainer, spec: VideoSpec) -> VideoStream:
    stream = container.add_stream("libx264", rate=spec.fps, options=dict(_ENCODER))
    stream.width, stream.height, stream.pix_fmt = spec.width, spec.height, "yuv420p"
    context = stream.codec_context
    context.time_base = 1 / spec.fps
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = ColorRange.MPEG
    return stream


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
