"""``POST /v1/videos?stream=true``: the frames of one job as a video, encoded while they are decoded."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import anyio
import anyio.to_thread

from svd_trt.runtime.video import VideoWriter, open_stream
from svd_trt.serve.events import Hub, Live, wait
from svd_trt.serve.refusals import RequestError
from svd_trt.serve.service import Service, cancel
from svd_trt.serve.store import ENDED, Job

__all__ = ["STREAM_TYPES", "BrokenStream", "first_frame", "video_stream"]

STREAM_TYPES: Mapping[str, str] = {"y4m": "video/x-yuv4mpeg", "mp4": "video/mp4", "mkv": "video/x-matroska"}
"""Formats, the default first, and their types."""

_LOOK = 0.5  # seconds between two looks at whether the client has left, while its job waits


class BrokenStream(Exception):  # noqa: N818  (no error of the server)
    """The video of a stream ended before its last frame; the connection must end without the end of the body."""


async def first_frame(service: Service, job: Job, live: Live, left: Callable[[], Any]) -> None:
    """Wait until a job has a frame.

    Args:
        service: that makes it.
        job: that was accepted.
        live: of the job.
        left: an awaitable function: has the client gone?

    Raises:
        RequestError: it ended without one, or the client left.
    """
    try:
        with service.hub.subscribed() as news:
            while not live.frames:
                news.clear()
                now = await anyio.to_thread.run_sync(service.store.get, job.id)
                if live.frames:  # it may have ended since
                    return
                if now is None or now.status in ENDED or service.hub.closed:
                    raise _ended(now)
                if await left():
                    await anyio.to_thread.run_sync(cancel, service, job)
                    raise RequestError(400, "cancelled", "the client closed the connection")
                await wait(news, _LOOK)
    except asyncio.CancelledError:  # so Ray Serve says that the client left
        cancel(service, job)
        raise


async def video_stream(service: Service, job: Job, live: Live, kind: str) -> AsyncIterator[bytes]:
    """The video of a job that has a frame, in the format ``kind``. Leaving it early cancels the job."""
    sent, sink = 0, io.BytesIO()
    height, width, _ = live.frames[0].shape
    metadata = live.metadata or {}
    writer = open_stream(sink, kind, height=height, width=width, fps=metadata["fps"], metadata=metadata)
    try:
        await anyio.to_thread.run_sync(writer.__enter__)
        with service.hub.subscribed() as news:
            while sent < live.total:
                news.clear()
                while sent < len(live.frames):
                    await anyio.to_thread.run_sync(_write, writer, live, sent)
                    sent += 1
                    yield _taken(sink)
                if sent < live.total and not news.is_set():
                    await _more(service.hub, service, job, live, sent, news)
        await anyio.to_thread.run_sync(writer.__exit__, None, None, None)
        yield _taken(sink)
    finally:
        if sent < live.total:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(cancel, service, job)


async def _more(hub: Hub, service: Service, job: Job, live: Live, sent: int, news: Any) -> None:
    """Wait for more frames than ``sent``; the connection breaks if there will be none."""
    now = await anyio.to_thread.run_sync(service.store.get, job.id)
    if len(live.frames) > sent:
        return
    if now is None or now.status in ENDED or hub.closed:
        raise BrokenStream("the video ended before its last frame")
    await wait(news, _LOOK)


def _write(writer: VideoWriter, live: Live, index: int) -> None:
    writer.write(live.frames[index][None])


def _taken(sink: io.BytesIO) -> bytes:
    data = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return data


def _ended(job: Job | None) -> RequestError:
    error = job.error if job is not None else None
    if error is None:
        return RequestError(503, "server_error", "the server is ending; send the picture again later")
    status = {"invalid_request": 400, "cancelled": 409}.get(error["type"], 500)
    return RequestError.of(status, error)
