"""Uncompressed frames: a NumPy array in a file, or raw or YUV4MPEG2 frames on standard output."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from io import RawIOBase
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from svd_trt.errors import OutputError
from svd_trt.runtime.video._writer import STDOUT, FileWriter, VideoSpec, VideoWriter, display
from svd_trt.runtime.video._yuv import BT601, require_even, yuv420p, yuv444p


class NpyWriter(FileWriter):
    """uint8 ``[F, H, W, 3]``, for ``np.load(path, mmap_mode="r")``; holds one frame and no parameters."""

    suffix = ".npy"

    def _start(self) -> None:
        super()._start()
        self._write_header(0)
        self._header_bytes = self._file.tell()

    def _append(self, frame: NDArray[np.uint8]) -> None:
        self._file.write(frame.data)

    def _complete(self) -> None:
        self._file.seek(0)
        self._write_header(self._count)
        # NumPy leaves space for the first axis to grow. If it did not, the longer header would overwrite frames.
        assert self._file.tell() == self._header_bytes, "the header does not fit its place"

    def _write_header(self, frames: int) -> None:
        shape = (frames, self.spec.height, self.spec.width, 3)
        npy.write_array_header_1_0(self._file, {"descr": "|u1", "fortran_order": False, "shape": shape})


class StdoutWriter(VideoWriter):
    """Packed RGB, ``H * W * 3`` bytes per frame, without any header.

    Frames that were read cannot be taken back, so the output can be incomplete after a failure, unlike a file.

    Attributes:
        sink: takes the bytes in the place of standard output, if it is set before the ``with``.
    """

    sink: BinaryIO | None = None

    def _start(self) -> None:
        if self.sink is not None:
            self._stream: RawIOBase | BinaryIO = self.sink
            return
        buffer = binary_stdout()
        sys.stdout.flush()
        # Without the buffer: bytes that it kept after a failure would fail again, with a traceback, when Python exits.
        self._stream = getattr(buffer, "raw", buffer)

    def _append(self, frame: NDArray[np.uint8]) -> None:
        self._send(frame.data)

    def _send(self, data: memoryview) -> None:
        """Write all of ``data``."""
        rest = data.cast("B")
        while rest:
            written = self._stream.write(rest)
            if written is None:
                raise BlockingIOError(errno.EAGAIN, "it does not wait for its reader (O_NONBLOCK)")
            rest = rest[written:]

    def _finish(self) -> None:
        self._stream.flush()

    def _discard(self) -> None:
        """Nothing to remove."""


class Y4mWriter(StdoutWriter):
    """YUV4MPEG2 with a colour sample for each pixel (4:4:4, BT.601, limited range): at most 2 levels of RGB are lost.

    Programs that read it need no options: its header has size, rate and colour samples. It has no place for the
    matrix, and readers take that of BT.601.
    """

    colours = "C444"

    def _start(self) -> None:
        super()._start()
        rate = f"F{self.spec.fps.numerator}:{self.spec.fps.denominator}"
        header = f"YUV4MPEG2 W{self.spec.width} H{self.spec.height} {rate} Ip A1:1 {self.colours} XCOLORRANGE=LIMITED\n"
        self._send(memoryview(header.encode("ascii")))

    def _append(self, frame: NDArray[np.uint8]) -> None:
        self._send(memoryview(b"FRAME\n"))
        self._send(self._planes(frame).data)

    def _planes(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return yuv444p(frame, BT601)


class Y4m420Writer(Y4mWriter):
    """As `Y4mWriter` with a colour sample for four pixels (4:2:0, at their centre), for readers that take no other."""

    colours = "C420jpeg"

    def __init__(self, path: str, spec: VideoSpec) -> None:
        require_even("4:2:0", spec.height, spec.width)
        super().__init__(path, spec)

    def _planes(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return yuv420p(frame, BT601)


def _is_read_only(stream: BinaryIO) -> bool:
    """Whether a stream of a descriptor takes nothing, as the command line's standard output does if it was closed."""
    try:
        return fcntl.fcntl(stream.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    except OSError:  # a stream in memory has no descriptor
        return False


def binary_stdout() -> BinaryIO:
    """Standard output for bytes.

    Raises:
        OutputError: it is a terminal, closed, or replaced by something that takes only text.
    """
    buffer: BinaryIO | None = getattr(sys.stdout, "buffer", None)
    if buffer is None or buffer.closed or not buffer.writable() or _is_read_only(buffer):
        raise OutputError(f"{display(STDOUT)} takes no bytes here; write to a file instead")
    if buffer.isatty():
        raise OutputError(f"{display(STDOUT)} is a terminal; pipe it into a program, for instance ffmpeg, or a file")
    return buffer
