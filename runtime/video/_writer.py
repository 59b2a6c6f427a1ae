"""Common to all formats: checks of frames, messages about failures, and moving complete files into place."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from svd_trt.engine.temporary_files import create_file, remove_leftovers
from svd_trt.errors import ArgumentError, OutputError

STDOUT = "-"

_NO_SPACE = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}


@dataclass(frozen=True)
class VideoSpec:
    """What is known before the first frame: size in pixels, frames a second, and parameters as ASCII JSON."""

    height: int
    width: int
    fps: Fraction
    parameters: str


class State(Enum):
    NEW = "not opened yet"
    OPEN = "open"
    FAILED = "failed"
    DONE = "closed"


class VideoWriter(ABC):
    """A video that is being written; `open_writer` returns one for use in a ``with`` statement.

    If the block ends normally, the complete video is moved into place. If an exception ends the block, or if writing
    fails, everything that the writer made is removed and the path keeps what it held before.
    """

    def __init__(self, path: str, spec: VideoSpec) -> None:
        self.path = path
        self.spec = spec
        self._count = 0
        self._state = State.NEW

    @classmethod
    def unavailable(cls) -> str | None:
        """Why the installed libraries cannot write this format, and what to do; None if they can."""
        return None

    def __enter__(self) -> Self:
        if self._state is not State.NEW:
            raise ArgumentError(f"the writer of {display(self.path)} is {self._state.value}; open another one")
        with self._guarded():
            self._start()
        self._state = State.OPEN
        return self

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Append ``frames``, uint8 ``[N, H, W, 3]`` RGB in 0..255; N may differ between calls and may be 0.

        Raises:
            ArgumentError: another shape or dtype, or the writer is not inside its ``with`` block.
            OutputError: the frames could not be written, for instance because the disk is full.
        """
        if self._state is not State.OPEN:
            raise ArgumentError(f"the writer of {display(self.path)} is {self._state.value}; write inside its with")
        self.check_frames(frames)
        with self._guarded():
            for frame in frames:
                self._append(np.ascontiguousarray(frame))
                self._count += 1

    def check_frames(self, frames: NDArray[Any]) -> None:
        """Check that `write` takes ``frames``.

        Raises:
            ArgumentError: the shape, the dtype or the type is another one.
        """
        shape = (self.spec.height, self.spec.width, 3)
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.shape[1:] != shape:
            got = f"{frames.dtype} {frames.shape}" if isinstance(frames, np.ndarray) else type(frames).__name__
            raise ArgumentError(f"expected uint8 frames [N, {', '.join(map(str, shape))}], got {got}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        if self._state is State.FAILED:
            raise OutputError(f"{display(self.path)} was not written: an earlier write to it failed")
        with self._guarded():
            if self._count == 0:
                raise OutputError(f"{display(self.path)} was not written: it got no frames")
            self._finish()
        self._state = State.DONE

    @abstractmethod
    def _start(self) -> None:
        """Open the file, folder or stream that frames are written to."""

    @abstractmethod
    def _append(self, frame: NDArray[np.uint8]) -> None:
        """Write one frame, uint8 ``[H, W, 3]``, C-contiguous; ``_count`` frames were written before it."""

    @abstractmethod
    def _finish(self) -> None:
        """Complete the video and put it in place."""

    @abstractmethod
    def _discard(self) -> None:
        """Remove everything written so far; also called if `_start` or `_finish` failed."""

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Remove what was written if the body fails; an `OSError` becomes an `OutputError` with the cause."""
        try:
            yield
        except OSError as error:
            self._abandon()
            raise OutputError(explain(self.path, error)) from error
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        self._state = State.FAILED
        # The first failure is reported, not one of the clean-up.
        with suppress(OSError):
            self._discard()


class FileWriter(VideoWriter):
    """A writer of one file: it writes a hidden file beside the target and renames it when it is complete."""

    suffix = ""

    def __init__(self, path: str, spec: VideoSpec) -> None:
        super().__init__(path, spec)
        self._target = resolved(path)
        self._opened: tuple[Path, BinaryIO] | None = None

    @property
    def _temporary(self) -> Path:
        assert self._opened is not None, "only used between _start and _finish"
        return self._opened[0]

    @property
    def _file(self) -> BinaryIO:
        assert self._opened is not None, "only used between _start and _finish"
        return self._opened[1]

    def _start(self) -> None:
        remove_leftovers(self._target.parent)
        # With the suffix of the format, because libraries choose the format by it.
        self._opened = create_file(self._target, self.suffix)

    def _complete(self) -> None:
        """Write what the format needs after the last frame."""

    def _finish(self) -> None:
        self._complete()
        self._file.flush()
        # Some file systems report a full disk only now, and a crash could otherwise leave the new name without content.
        os.fsync(self._file.fileno())
        # Before it is closed, and with that unlocked: another process could take it for a leftover.
        self._temporary.replace(self._target)
        self._file.close()

    def _discard(self) -> None:
        if self._opened is None:
            return
        # Closing flushes, which fails again on a full disk, but the file is closed.
        with suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def resolved(path: str) -> Path:
    """``path`` without symbolic links: the target of a link is replaced, and the link stays."""
    # Not Path.resolve: before Python 3.13 it raises RuntimeError if links form a circle.
    return Path(os.path.realpath(path))


def display(path: str) -> str:
    """The name of ``path`` in messages."""
    return "standard output" if path == STDOUT else path


def explain(path: str, error: OSError) -> str:
    """One line: why ``path`` could not be written, then what to do."""
    cannot = f"cannot write {display(path)}"
    if isinstance(error, BrokenPipeError):
        return f"{cannot}: the reader closed the pipe"
    if error.errno in _NO_SPACE:
        advice = "free some space, or write elsewhere"
    elif error.errno in _NOT_ALLOWED:
        advice = "choose a folder that you may write to"
    else:
        advice = "choose another output"
    return f"{cannot}: {error.strerror or error}; {advice}"
