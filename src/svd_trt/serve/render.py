"""Making the videos of waiting jobs: one thread for each model, and one call of its pipeline at a time.

A call makes one video, or several whose arguments are equal but for the picture and the seed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from svd_trt.errors import ArgumentError, BackendError, CancelledError, OutputError, SvdTrtError
from svd_trt.progress import Progress
from svd_trt.runtime.output import VideoStream
from svd_trt.runtime.pipeline import VideoPipeline
from svd_trt.serve.content import VideoFiles
from svd_trt.serve.events import SHARES, Hub, Live
from svd_trt.serve.limits import Limits, argument_limits
from svd_trt.serve.metrics import Metrics
from svd_trt.serve.refusals import error_object, refused
from svd_trt.serve.store import Job, Store
from svd_trt.units import format_seconds

__all__ = ["Renderer"]

_log = logging.getLogger("svd_trt")
T = TypeVar("T")
_RETRY = 5.0  # seconds between two tries to write to the store
_IDLE = 60.0  # seconds between two looks for old videos
_STAGES = ("encode", "denoise", "decode")


@dataclass
class _Call:
    """One call of the pipeline.

    Attributes:
        jobs: those whose videos it makes, one after the other.
        lives: of the jobs.
        wanted: ids of videos that are neither finished nor cancelled.
        stream: its frames, once it is begun.
        stopped: why it should end.
    """

    jobs: list[Job]
    lives: list[Live]
    wanted: set[str]
    stream: VideoStream | None = None
    stopped: SvdTrtError | None = None
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_STAGES, 0.0))  # seconds by stage


class _Unwanted(Exception):  # noqa: N818  (no error)
    """The video was cancelled, and others of its call go on."""


class Renderer:
    """Makes the jobs of one model in a thread, in the order in which they were accepted.

    Args:
        name: of the model.
        pipe: its pipeline, which the renderer closes.
        reopen: opens the bundle again, after its device failed.
        store: the jobs.
        hub: what happens to them is reported there.
        metrics: and counted there.
        limits: of the server.
        keep: called now and then to remove old videos.
        on_failure: called with the reason if no more videos can be made.
        batch: the most videos of a call.
    """

    def __init__(
        self,
        name: str,
        pipe: VideoPipeline,
        *,
        reopen: Callable[[], VideoPipeline],
        store: Store,
        hub: Hub,
        metrics: Metrics,
        limits: Limits,
        keep: Callable[[], object],
        on_failure: Callable[[SvdTrtError], object],
        batch: int = 1,
    ) -> None:
        self.name = name
        self.pipe = pipe
        self._reopen = reopen
        self._store, self._hub, self._metrics, self._limits = store, hub, metrics, limits
        self._keep, self._on_failure, self._batch = keep, on_failure, batch
        self.reopening = False  # its device failed, so it takes no requests for a moment
        self._work = threading.Event()
        self._ending = False
        self._lock = threading.Lock()
        self._running: _Call | None = None
        self._shares: Mapping[str, float] = SHARES
        self._looked = 0.0  # when old videos were looked for
        self.seconds = 0.0  # of a video, on average
        self._thread = threading.Thread(target=self._run, name=f"svd-trt render {name}", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether it makes videos."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin with what waits."""
        self._thread.start()

    def wake(self) -> None:
        """Look for a job."""
        self._work.set()

    def cancel(self, job_id: str) -> None:
        """Stop the job of an id, if it is being made; others of its call go on. It returns at once."""
        with self._lock:
            call = self._running
            if call is None or job_id not in call.wanted:
                return
            call.wanted.discard(job_id)
            if call.wanted:
                return
        self._stop(call, CancelledError("the video was cancelled"))

    def end(self) -> None:
        """Begin no further job. It returns at once."""
        self._ending = True
        self._work.set()

    def stop(self, grace: float) -> None:
        """End the thread.

        Args:
            grace: seconds after which a video that is being made is stopped, and waits again in the store.
        """
        self.end()
        if self._thread.ident is not None:
            self._thread.join(grace)
            with self._lock:
                call = self._running
            if call is not None:
                self._stop(call, _server_ends())
            self._thread.join()
        self.pipe.close()

    def _stop(self, call: _Call, reason: SvdTrtError) -> None:
        with self._lock:
            call.stopped = call.stopped or reason
            stream = call.stream
        if stream is not None:
            stream.cancel()

    def _run(self) -> None:
        while not self._ending:
            self._work.clear()
            try:
                if time.monotonic() >= self._looked + _IDLE:
                    self._looked = time.monotonic()
                    self._kept(self._keep)
                job = self._kept(lambda: self._store.claim(self.name))
                if job is None:
                    self._work.wait(_IDLE)
                else:
                    self._make([job, *self._alike(job)])
            except Exception as error:
                if self._ending and isinstance(error, OutputError):
                    return
                _log.exception("the queue of %s ended", self.name)
                self._on_failure(SvdTrtError(f"the queue of {self.name} ended: {error}; see the log"))
                return

    def _alike(self, job: Job) -> list[Job]:
        """Begin further jobs whose videos one call makes with that of ``job``.

        Decode chunks go on over the end of a video, as in diffusers, which would mix the frames of two videos if the
        chunks did not end there. A job at which the server ended before is made alone, so that it ends no other.
        """
        if self._batch == 1 or job.streamed or job.attempts > 1 or job.arguments["extend"]:
            return []
        if job.arguments["num_frames"] % _chunk(job):
            return []
        return self._kept(lambda: self._store.claim_alike(job, self._batch - 1))

    def _make(self, jobs: list[Job]) -> None:
        """Make the videos of ``jobs`` in one call, and say in the store how they ended."""
        call = _Call(jobs, [self._hub.live(job.id) for job in jobs], {job.id for job in jobs})
        for live in call.lives:
            live.begin(self._shares)
        with self._lock:
            self._running = call
            call.stopped = _server_ends() if self._ending else None
        self._hub.notify()
        alone: list[Job] = []
        try:
            self._videos(call)
        except Exception as raised:
            error = call.stopped or raised
            left = [job for job in jobs if job.id in call.wanted]
            if len(call.jobs) == 1 or (self._ending and isinstance(error, CancelledError)):
                for job in left:
                    self._end(job, error)
            else:
                _log.info("%d videos were not made together, and are made alone: %s", len(left), error)
                alone = left
            self._recover(raised)
        finally:
            with self._lock:
                self._running = None
            self._hub.notify()
        for job in alone:
            self._make([job])

    def _videos(self, call: _Call) -> None:
        """Generate, write and complete the videos of a call."""
        if not self._still_wanted(call):
            return
        pictures = [self._store.picture(job).read_bytes() for job in call.jobs]
        started = time.perf_counter()
        timer = threading.Timer(self._limits.seconds, self._stop, (call, self._too_long()))
        timer.daemon = True
        timer.start()
        try:
            with closing(self._opened(call, pictures)) as stream:
                self._metrics.call(self.name, len(call.jobs))
                for job, live in zip(call.jobs, call.lives, strict=True):
                    live.total, live.metadata = stream.parameters.total_frames, _metadata(stream, job)
                for job, live in zip(call.jobs, call.lives, strict=True):
                    if call.wanted:
                        self._video(call, job, live, stream, started)
        finally:
            timer.cancel()

    def _still_wanted(self, call: _Call) -> bool:
        """Leave out the jobs that were cancelled after they were begun in the store; False if none is left."""
        for job in call.jobs:
            now = self._store.get(job.id)
            if now is None or now.status != "in_progress":
                self.cancel(job.id)
        kept = [(job, live) for job, live in zip(call.jobs, call.lives, strict=True) if job.id in call.wanted]
        call.jobs, call.lives = [job for job, _ in kept], [live for _, live in kept]
        return bool(call.jobs)

    def _video(self, call: _Call, job: Job, live: Live, stream: VideoStream, started: float) -> None:
        """Take the frames of one video from the stream of its call, write them, and complete its job."""
        settings = stream.parameters
        frames = islice(stream, settings.total_frames)
        size = {"height": settings.height, "width": settings.width, "fps": settings.fps}
        metadata = _metadata(stream, job)
        try:
            with VideoFiles(self._store.video(job, ".mkv"), **size, metadata=metadata) as files:
                for frame in frames:
                    if job.id not in call.wanted:
                        raise _Unwanted
                    frame.flags.writeable = False
                    live.frames.append(frame)
                    files.write(frame)
                    self._metrics.frame(self.name)
                    self._hub.notify()
        except _Unwanted:
            for _ in frames:  # up to those of the next video
                pass
            return
        seconds = time.perf_counter() - started
        if call.wanted == {job.id}:  # the last of its call
            self._measured(call.spent, seconds)
        if self._kept(lambda: self._store.complete(job, metadata)):
            self._metrics.video(self.name, seconds)
            self._metrics.ended(self.name, "completed")
            _log.info("%s: made in %s", job.id, format_seconds(seconds))
        with self._lock:
            call.wanted.discard(job.id)
        self._hub.notify()

    def _opened(self, call: _Call, pictures: list[bytes]) -> VideoStream:
        """The stream of frames, which a cancellation from now on reaches."""
        first, progress = call.jobs[0], self._progress(call)
        if len(pictures) == 1:
            stream = self.pipe.stream(pictures[0], progress=progress, **first.given)
        else:
            shared = {"seed": [job.given["seed"] for job in call.jobs], "decode_chunk_size": _chunk(first)}
            stream = self.pipe.stream(pictures, progress=progress, **first.given | shared)
        with self._lock:
            call.stream = stream
            stopped = call.stopped
        if stopped is not None:
            stream.close()
            raise stopped
        return stream

    def _progress(self, call: _Call) -> Progress:
        """Reports the progress of a call to its jobs, and sums up the times of its stages."""
        clock = time.perf_counter()

        def report(stage: str, done: float, total: float) -> None:
            nonlocal clock
            now = time.perf_counter()
            call.spent[stage] = call.spent.get(stage, 0.0) + now - clock
            clock = now
            each = total // len(call.jobs)  # frames of a video
            for number, live in enumerate(call.lives):
                if stage == "decode":  # of all frames of one video, then of the next
                    live.report(stage, min(max(done - number * each, 0), each), each)
                else:
                    live.report(stage, done, total)
            self._hub.notify()

        return report

    def _too_long(self) -> SvdTrtError:
        return ArgumentError(
            f"the video was stopped after {self._limits.seconds:g} s, the most that this server allows; "
            "ask for fewer steps or frames"
        )

    def _measured(self, spent: Mapping[str, float], seconds: float) -> None:
        """Learn how long a video takes, for the estimates of the next ones."""
        known = sum(spent[stage] for stage in _STAGES)
        if known > 0:
            self._shares = {stage: spent[stage] / known for stage in _STAGES}
        self.seconds = seconds if not self.seconds else 0.8 * self.seconds + 0.2 * seconds
        self._metrics.stages(self.name, spent)

    def _end(self, job: Job, error: Exception) -> None:
        """Say that a job has no video, and why; open the bundle again if its device failed."""
        if self._ending and isinstance(error, CancelledError):
            self._kept(lambda: self._store.put_back(job))
            return
        if isinstance(error, CancelledError):
            if self._kept(lambda: self._store.cancel(job, str(error))):
                _log.info("%s: %s", job.id, error)
                self._metrics.ended(self.name, "cancelled")
            return
        if isinstance(error, FileNotFoundError) and (now := self._store.get(job.id)) and now.status == "cancelled":
            return  # its picture was removed before it was read
        if not isinstance(error, SvdTrtError):
            _log.error("the video %s failed", job.id, exc_info=error)
        told = refused(error, argument_limits(self.pipe.bundle.manifest, self._limits))
        if isinstance(error, MemoryError):
            told = error_object("server_error", "memory ran out; ask for fewer or smaller frames")
        if self._kept(lambda: self._store.fail(job, told)):
            _log.info("%s: failed: %s", job.id, told["message"])
            self._metrics.ended(self.name, "failed")

    def _kept(self, operate: Callable[[], T]) -> T:
        """Write to the store; wait and try again as long as its disk is full, because a job must end as it ended.

        Raises:
            OutputError: the server ends meanwhile. The store begins the job again after the next start.
        """
        while True:
            try:
                return operate()
            except OutputError as error:
                if self._ending:
                    raise
                _log.warning("%s", error)
                self._work.clear()
                self._work.wait(_RETRY)

    def _recover(self, error: Exception) -> None:
        """Open the bundle again if its device failed."""
        if not isinstance(error, BackendError) or self._ending:
            return
        self.reopening = True
        with suppress(SvdTrtError):
            self.pipe.close()
        try:
            self.pipe = self._reopen()
            self.reopening = False
        except SvdTrtError as error:
            self._ending = True
            self._on_failure(error)


def _server_ends() -> SvdTrtError:
    return CancelledError("the server is ending")


def _chunk(job: Job) -> int:
    """Frames that are decoded together if the video of ``job`` is made alone."""
    chunk, frames = job.arguments["decode_chunk_size"], job.arguments["num_frames"]
    return int(min(chunk, frames))


def _metadata(stream: VideoStream, job: Job) -> dict[str, Any]:
    """What the file of a video says of it: the same as if its call made no other."""
    alone = {name: job.arguments[name] for name in ("seed", "decode_chunk_size") if stream.num_videos > 1}
    return {**stream.metadata, **alone}
