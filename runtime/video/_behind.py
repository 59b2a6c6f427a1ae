"""Writing in a thread, so that encoding overlaps with what makes the frames."""

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

# How long leaving by an exception waits, in seconds, for the frame that is being written. A frame takes well under a
# second; what takes longer hangs, on a reader of standard output that stalls, say, and must not hold up Ctrl-C.
_PATIENCE_S = 3.0


class WriteBehind:
    """A `VideoWriter` whose frames are written by a thread; use it in a ``with`` instead of the writer.

    ::

        with WriteBehind(open_writer("out.mp4", ...)) as writer:
            for chunk in decoded:
                writer.write(chunk)

    Leaving the block normally waits until all is written and finishes the video, in the calling thread. Leaving it
    by any exception drops what is queued and removes everything, as the writer itself does. Writing the frame that
    has been begun cannot be interrupted; should it take more than some seconds, or another exception come while it is
    waited for, the rest is left to a thread that does not keep the program running.

    One thread at a time may use it.

    Args:
        writer: not opened yet; nothing else may use it.
        maxsize: calls of `write` that may be queued beside the one that is being written; at least 1.

    Attributes:
        seconds: time that the thread has spent writing. Opening and finishing happen in the calling thread and are
            not in it.

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
        # Not Thread.join: in Python 3.11 one that a signal interrupts takes the thread for finished.
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

        They are copied, so the caller may change them at once. A read-only array is not copied: what lies under it
        must stay as it is until the block is left.

        Raises:
            ArgumentError: another shape or dtype, which harms nothing, or it is not inside its ``with`` block.
            OutputError: frames of an earlier call could not be written. Any other exception of the writer comes the
                same way. No call after that writes anything; each raises it again, and so does leaving the block.
        """
        if not self._open:
            raise ArgumentError("the writer is not open; write inside its with")
        if self._error is not None:
            raise self._error
        self._writer._check(frames)  # here rather than in the thread: the caller is told which call was wrong
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
                # After a failure the queue is still emptied, or the caller would wait for ever for room in it.
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
                self._writer.write(frames[index : index + 1])  # one by one, so that it can stop between them
        except BaseException as error:
            self._error = error  # the caller's to raise
        finally:
            self.seconds += time.perf_counter() - started

    def _abandon(self, error: BaseException) -> None:
        """Stop the thread and have the writer remove what it made, now or, at the latest, when its call returns."""
        self._abandoned = True
        self._drop_queued()
        ended = False
        try:
            ended = self._ended.wait(_PATIENCE_S)
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
            self._queue.put_nowait(None)  # there is room: nobody else puts anything in

    def _discard(self, error: BaseException) -> None:
        self._ended.wait()
        if self._error is not None and self._error is not error and isinstance(self._error, Exception):
            error.add_note(f"Before that, writing the video failed: {first_line(self._error)}")
        self._writer.__exit__(type(error), error, error.__traceback__)
