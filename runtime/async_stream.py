"""Frames of a generation for asyncio: a thread computes them, and the event loop never waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from svd_trt.errors import CancelledError
from svd_trt.runtime.cancellation import Cancellation
from svd_trt.runtime.decode import Frames
from svd_trt.runtime.output import VideoStream
from svd_trt.runtime.worker import Worker

__all__ = ["AsyncVideoStream"]

_T = TypeVar("_T")


class AsyncVideoStream(AsyncIterator[Frames]):
    """The frames of a `VideoStream`, ``async for frame in pipe.astream(...)``.

    ``async with pipe.astream(...) as stream`` prepares the generation, so that wrong arguments are known before the
    first frame, and closes it at the end of the block. Cancelling a task that waits for a frame cancels the generation.
    Several tasks may make videos with one pipeline: they take turns. The frames stay in order if several tasks
    share a stream.

    Args:
        open_stream: prepares the generation, in a thread.
        cancellation: of the generation.
    """

    def __init__(self, open_stream: Callable[[], VideoStream], cancellation: Cancellation) -> None:
        self._open_stream = open_stream
        self._cancellation = cancellation
        self._stream: VideoStream | None = None
        # A thread of its own: those of the loop's pool are for everybody, and this one may wait for its turn for long.
        at_exit = partial(cancellation.cancel, CancelledError("the program ended"))
        self._worker = Worker("svd-trt stream", at_exit)
        self._closed = False
        self._closing: Future[None] | None = None

    @property
    def stream(self) -> VideoStream:
        """The stream behind it, whose attributes say what the video is generated with.

        Raises:
            RuntimeError: it is not prepared yet: enter the block ``async with``, or take a frame first.
        """
        if self._stream is None:
            raise RuntimeError("the stream is not prepared yet; use `async with`, or take a frame first")
        return self._stream

    async def __aenter__(self) -> Self:
        if not self._closed:
            await self._in_thread(self._prepared)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def __anext__(self) -> Frames:
        """Return the next frame.

        Raises:
            svd_trt.errors.CancelledError: the generation was cancelled, but not by the cancellation of this task.
            SvdTrtError: as `VideoStream.__next__`; the first call also as `VideoPipeline.stream`.
        """
        frame = None if self._closed else await self._in_thread(self._next)
        if frame is None:
            self._release()
            raise StopAsyncIteration
        return frame

    def cancel(self) -> None:
        """Make the stream end, as `VideoStream.cancel`. Any thread may call it, and it returns at once."""
        self._cancellation.cancel(CancelledError("the video was cancelled"))

    async def aclose(self) -> None:
        """Cancel the frames that are not generated yet, and free the stream's memory. Closing twice is harmless."""
        self._cancellation.cancel(CancelledError("the stream was closed"))
        self._release()
        if self._closing is not None:  # also if a task that was cancelled began it
            await asyncio.shield(asyncio.wrap_future(self._closing))

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        try:
            return await asyncio.wrap_future(self._worker.submit(work))
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError):
                self.cancel()
            self._release()
            raise

    def _release(self) -> None:
        """Close the stream in its thread, after what runs there, and end the thread."""
        if not self._closed and self._worker.thread is not None:
            self._closing = self._worker.submit(self._close)
            self._worker.stop()
        self._closed = True

    def _prepared(self) -> VideoStream:
        if self._stream is None:
            self._stream = self._open_stream()
        return self._stream

    def _next(self) -> Frames | None:
        return next(self._prepared(), None)

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def __del__(self) -> None:
        """Close the stream of a loop that was left early, in its thread, because closing may wait."""
        self._cancellation.cancel(CancelledError("the stream was closed"))
        self._release()
