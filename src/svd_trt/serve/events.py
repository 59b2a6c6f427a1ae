"""What happens to jobs while the server runs: progress and frames, and the stream of events of a job."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import anyio.to_thread
import msgspec
import numpy as np
import numpy.typing as npt
import PIL.Image

from svd_trt.serve.store import ENDED

__all__ = ["SHARES", "Hub", "Live", "job_events", "wait"]

SHARES: Mapping[str, float] = {"encode": 0.05, "denoise": 0.8, "decode": 0.15}
"""Shares of the stages in the time of a video, until the first one was measured."""
_KEEP_ALIVE = 15.0  # seconds; proxies close connections that say nothing for a minute
_LATE = 2.0  # seconds that an ended video waits for its frames
_PREVIEW = 512  # pixels of the longer side


class Live:
    """A job while it waits or is made, as far as it is not stored. A thread writes it, and any may read it.

    A job that another process makes has no ``frames``; `follow` takes what that process says of it.

    Attributes:
        frames: uint8 ``[H, W, 3]``, as far as they are decoded; their number only grows.
        shown: how many frames have a `preview`.
        total: how many there will be; 0 as long as that is not known.
        metadata: what the video's file will say, and its frames a second under ``fps``; None before it is begun.
        step: the stage, and how much of it is done of how much; None before the first.
        share: of the video that is done, 0 to 1.
        seconds_left: estimated at the last step from the pace so far; None before the second.
    """

    def __init__(self) -> None:
        self.begin(SHARES)

    def begin(self, shares: Mapping[str, float]) -> None:
        """Begin, or begin again. ``shares`` are those of the stages in the time of a video."""
        self.frames: list[npt.NDArray[np.uint8]] = []
        self.total = 0
        self.metadata: Mapping[str, Any] | None = None
        self.step: tuple[str, float, float] | None = None
        self.share = 0.0
        self.seconds_left: float | None = None
        self._done: dict[str, float] = {}
        self._shares = dict(shares)
        self._paced: tuple[float, float] | None = None  # time and share from which the pace is measured
        self._previews: dict[int, str] = {}
        self._followed = 0

    def report(self, stage: str, done: float, total: float) -> None:
        """Take the pipeline's progress."""
        self._done[stage] = done / total if total else 0.0
        self.share = sum(self._shares.get(one, 0.0) * share for one, share in self._done.items())
        now = time.monotonic()
        if self._paced is None and stage != "encode":  # which loads the networks the first time
            self._paced = (now, self.share)
        if self._paced is not None and self.share > self._paced[1]:
            began, before = self._paced
            self.seconds_left = round((now - began) * max(1 - self.share, 0.0) / (self.share - before), 1)
        self.step = (stage, done, total)

    def state(self) -> dict[str, Any]:
        """What `follow` takes in another process, without previews."""
        return {name: getattr(self, name) for name in ("step", "share", "seconds_left", "total", "shown")}

    def follow(self, state: Mapping[str, Any], previews: Sequence[str]) -> None:
        """Take what another process says of a job that it makes: its `state`, and the previews that come next here."""
        if state["shown"] < self._followed:  # it was begun again
            self._followed = 0
        self.step, self.share, self.seconds_left = state["step"], state["share"], state["seconds_left"]
        self.total = state["total"]
        for preview in previews:
            self._previews[self._followed] = preview
            self._followed += 1

    @property
    def shown(self) -> int:
        return len(self.frames) or self._followed

    def preview(self, index: int) -> str:
        """A frame as a ``data:`` URL of WebP, with at most 512 pixels at a side."""
        if index not in self._previews:
            picture = PIL.Image.fromarray(self.frames[index])
            picture.thumbnail((_PREVIEW, _PREVIEW))
            file = io.BytesIO()
            picture.save(file, "WEBP", quality=80, method=0)
            self._previews[index] = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
        return self._previews[index]


class Hub:
    """The live jobs, and who waits for news of them. Threads report; subscribers are tasks of an event loop."""

    def __init__(self) -> None:
        self.closed = False
        self._lock = threading.Lock()
        # A job lives as long as somebody makes it or watches it.
        self._live: weakref.WeakValueDictionary[str, Live] = weakref.WeakValueDictionary()
        self._waiting: set[tuple[asyncio.AbstractEventLoop, asyncio.Event, str | None]] = set()

    def live(self, job_id: str) -> Live:
        """The live job of an id; a new one if nobody has it."""
        with self._lock:
            found = self._live.get(job_id)
            if found is None:
                found = self._live[job_id] = Live()
            return found

    def known(self, job_id: str) -> Live | None:
        """The live job of an id, if somebody makes it or watches it."""
        with self._lock:
            return self._live.get(job_id)

    def all(self) -> dict[str, Live]:
        """The live jobs by their ids."""
        with self._lock:
            return dict(self._live)

    def watched(self) -> set[str]:
        """Ids of the jobs whose events somebody follows."""
        with self._lock:
            return {job_id for _, _, job_id in self._waiting if job_id is not None}

    def notify(self) -> None:
        """Wake every subscriber; each looks for what is new to it, so a slow one misses steps and queues nothing."""
        with self._lock:
            waiting = list(self._waiting)
        for loop, event, _ in waiting:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(event.set)

    def close(self) -> None:
        """End every stream of events, because the server ends."""
        self.closed = True
        self.notify()

    @contextmanager
    def subscribed(self, watched: str | None = None) -> Iterator[asyncio.Event]:
        """An event that is set whenever something happens. The frames of the job ``watched`` are wanted."""
        one = (asyncio.get_running_loop(), asyncio.Event(), watched)
        with self._lock:
            self._waiting.add(one)
        try:
            yield one[1]
        finally:
            with self._lock:
                self._waiting.discard(one)


async def wait(news: asyncio.Event, seconds: float) -> bool:
    """Wait for news; False if there were none for ``seconds``."""
    try:
        async with asyncio.timeout(seconds):
            await news.wait()
    except TimeoutError:
        return False
    return True


async def job_events(hub: Hub, job_id: str, describe: Callable[[], dict[str, Any] | None]) -> AsyncIterator[bytes]:
    """The events of a job as ``text/event-stream``, until it has ended.

    Args:
        hub: where it is reported.
        job_id: of the job.
        describe: makes the job object; None if there is no such job any more. It is called in a thread.
    """
    told: Any = None
    sent, step = 0, None
    late = 0.0  # when frames that are late are waited for no longer
    live = hub.live(job_id)
    with hub.subscribed(job_id) as news:
        while not hub.closed:
            news.clear()
            job = await anyio.to_thread.run_sync(describe)
            if job is None:
                return
            if told is None and job["status"] in ENDED:  # before this client came; the thread may still hold its frames
                yield _event("status", job)
                yield _event("end", job)
                return
            state = [job[name] for name in ("status", "position", "stage")]
            if state != told:
                told = state
                yield _event("status", job)
            if live.step is not None and live.step != step:
                step = live.step
                stage, done, total = step
                told_of = {name: job[name] for name in ("progress", "seconds_left")}
                yield _event("step", {"stage": stage, "done": done, "total": total, **told_of})
            if sent > live.shown:  # it was begun again
                sent = 0
            while sent < live.shown:
                try:
                    image = await anyio.to_thread.run_sync(live.preview, sent)
                except IndexError:  # it was begun again
                    break
                yield _event("frame", {"index": sent, "total": live.total, "image": image})
                sent += 1
            if job["status"] == "completed" and sent < live.total:
                late = late or time.monotonic() + _LATE
                if time.monotonic() < late:  # another process made it, and its last frames come a moment later
                    await wait(news, _LATE)
                    continue
            if job["status"] in ENDED:
                yield _event("end", job)
                return
            if not news.is_set() and not await wait(news, _KEEP_ALIVE):
                yield b": keep-alive\n\n"


def _event(name: str, data: Mapping[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(data))
