"""Writing in a thread, so that the encoding of frames overlaps with their generation."""

from __future__ import annotations

import queue
import threading
import time
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from svd_trt.errors import ArgumentError, first_line
from svd_trt.runtime.video._writer import VideoWriter

# Seconds to wait for the frame that is being written when an exception ends the block. A frame takes well under a
# second; a write that takes longer hangs, for instance because the reader of standard output stalls, and must not
# delay Ctrl-C.
_TIMEOUT_S = 3.0


class BackgroundWriter:
    """A `VideoWriter` whose frames are written by a thread; use it in a ``with`` instead of the writer.

    ::

        with BackgroundWriter(open_writer("out.mp4", ...)) as writer:
            for chunk in decoded:
                writer.write(chunk)

    If the block ends normally, the caller waits until all frames are written and finishes the video in its own
    thread. If an exception ends the block, queued frames are dropped and everything that was written is removed, as
    the writer itself does. The frame that is being written cannot be interrupted: if it takes more than a few seconds,
    or if another exception is raised while the caller waits for it, a daemon thread removes the files later.

    Only one thread at a time may use it.

    Args:
        writer: a writer that is not open yet and that nothing else uses.
        maxsize: number of `write` calls that may be queued while an earlier one is being written; at least 1.

    Attributes:
        seconds: time that the thread has spent writing, without opening and finishing the video, which happen in the
            caller's thread.

    Raises:
        ArgumentError: ``maxsize`` is less than 1.
    """

    def __init__(self, writer: VideoWriter, maxsize: int = 2) -> None:
        if maxsize < 1:
            raise ArgumentError(f"maxsize must be at least 1, got {maxsize}")
        self.seconds = 0.0
        self._writer = writer
        self._queue: queue.Queue[NDArray[np.uint8] | None] = queue.Queue(maxsize)  # None is the end
        self._thread = threading.Thread(target=self._run, name="svd-trt-writer", daemon=True)
        # Not Thread.join: in Python 3.11, a join that a signal interrupts marks the thread as finished.
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._open = False
        self._abandoned = False

    def __enter__(self) -> Self:
        self._writer.__enter__()
        try:
            self._thread.start()
        except BaseException as error:
            self._queue.put_nowait(None)
            self._writer.__exit__(type(error), error, error.__traceback__)
            raise
        self._open = True
        return self

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Queue ``frames``, uint8 ``[N, H, W, 3]`` RGB; waits while the queue is full.

        The frames are copied, so the caller may change the array at once. A read-only array is not copied: its memory
        must not change until the block ends.

        Raises:
            ArgumentError: another shape or dtype, or the writer is not inside its ``with`` block. Nothing was written.
            OutputError: frames of an earlier call could not be written. Any other exception of the writer is raised
                in the same way. No later call writes anything: each raises the exception again, and so does the end
                of the block.
        """
        if not self._open:
            raise ArgumentError("the writer is not open; write inside its with")
        if self._error is not None:
            raise self._error
        self._writer.check_frames(frames)  # here and not in the thread, so that the wrong call raises
        self._queue.put(frames.copy() if frames.flags.writeable else frames)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        if error is not None:
            self._abandon(error)
            return
        try:
            self._queue.put(None)
            self._ended.wait()
            if self._error is not None:
                raise self._error
        except BaseException as problem:
            self._abandon(problem)
            raise
        self._writer.__exit__(None, None, None)

    def _run(self) -> None:
        try:
            while (frames := self._queue.get()) is not None:
                # The queue is emptied after a failure as well, or the caller would wait forever for space in it.
                if self._error is None:
                    self._write(frames)
        finally:
            self._ended.set()

    def _write(self, frames: NDArray[Any]) -> None:
        started = time.perf_counter()
        try:
            for index in range(len(frames)):
                if self._abandoned:
                    break
                self._writer.write(frames[index : index + 1])  # one at a time, so that an abandoned video stops soon
        except BaseException as error:
            self._error = error  # raised in the caller's thread
        finally:
            self.seconds += time.perf_counter() - started

    def _abandon(self, error: BaseException) -> None:
        """Stop the thread and remove what was written: now, or as soon as the write in progress returns."""
        self._abandoned = True
        self._drop_queued()
        ended = False
        try:
            ended = self._ended.wait(_TIMEOUT_S)
        finally:
            if ended:
                self._discard(error)
            else:
                threading.Thread(target=self._discard, args=(error,), daemon=True).start()

    def _drop_queued(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            self._queue.put_nowait(None)  # the queue is empty, and no other thread puts anything in

    def _discard(self, error: BaseException) -> None:
        self._ended.wait()
        if self._error is not None and self._error is not error and isinstance(self._error, Exception):
            error.add_note(f"Before that, writing the video failed: {first_line(self._error)}")
        self._writer.__exit__(type(error), error, error.__traceback__)
