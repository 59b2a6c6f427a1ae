"""Making the videos of waiting jobs: one thread for each model, one video at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from typing import Any

from svd_trt.errors import ArgumentError, BackendError, CancelledError, SvdTrtError
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
_IDLE = 60.0  # seconds between two looks for old videos
_STAGES = ("encode", "denoise", "decode")


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
    ) -> None:
        self.name = name
        self.pipe = pipe
        self._reopen = reopen
        self._store, self._hub, self._metrics, self._limits = store, hub, metrics, limits
        self._keep, self._on_failure = keep, on_failure
        self._work = threading.Event()
        self._ending = False
        self._lock = threading.Lock()
        self._running: tuple[str, VideoStream | None] | None = None
        self._stopped: SvdTrtError | None = None  # why the running job should end
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
        """Stop the job of an id, if it is being made. It returns at once."""
        self._stop(CancelledError("the video was cancelled"), job_id)

    def stop(self) -> None:
        """End the thread. A video that is being made is stopped, and waits again in the store."""
        self._ending = True
        self._stop(CancelledError("the server is ending"), None)
        self._work.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.pipe.close()

    def _stop(self, reason: SvdTrtError, job_id: str | None) -> None:
        with self._lock:
            if self._running is None or job_id not in (None, self._running[0]):
                return
            self._stopped = self._stopped or reason
            stream = self._running[1]
        if stream is not None:
            stream.cancel()

    def _run(self) -> None:
        while not self._ending:
            self._work.clear()
            try:
                if time.monotonic() >= self._looked + _IDLE:
                    self._looked = time.monotonic()
                    self._keep()
                job = self._store.claim(self.name)
                if job is None:
                    self._work.wait(_IDLE)
                else:
                    self._make(job)
            except Exception as error:
                _log.exception("the queue of %s ended", self.name)
                self._on_failure(SvdTrtError(f"the queue of {self.name} ended: {error}; see the log"))
                return

    def _make(self, job: Job) -> None:
        """Make one video, and say in the store how it ended."""
        live = self._hub.live(job.id)
        live.begin(self._shares)
        with self._lock:
            self._running, self._stopped = (job.id, None), None
        self._hub.notify()
        started = time.perf_counter()
        try:
            metadata = self._video(job, live)
            if self._store.complete(job, metadata):
                self._metrics.ended(self.name, "completed")
                _log.info("%s: made in %s", job.id, format_seconds(time.perf_counter() - started))
        except Exception as error:
            self._end(job, self._stopped or error)
        finally:
            with self._lock:
                self._running = None
            self._hub.notify()

    def _video(self, job: Job, live: Live) -> Mapping[str, Any]:
        """Generate and write the video; return what its file says of it."""
        started = time.perf_counter()
        picture = self._store.picture(job).read_bytes()
        spent = dict.fromkeys(_STAGES, 0.0)
        clock = [started]

        def progress(stage: str, done: float, total: float) -> None:
            now = time.perf_counter()
            spent[stage] = spent.get(stage, 0.0) + now - clock[0]
            clock[0] = now
            live.report(stage, done, total)
            self._hub.notify()

        timer = threading.Timer(self._limits.seconds, self._stop, (self._too_long(), job.id))
        timer.daemon = True
        timer.start()
        try:
            with closing(self._opened(picture, job, progress)) as stream:
                settings = stream.parameters
                live.total, live.metadata = settings.total_frames, dict(stream.metadata)
                size = {"height": settings.height, "width": settings.width, "fps": settings.fps}
                with VideoFiles(self._store.video(job, ".mkv"), **size, metadata=stream.metadata) as files:
                    for frame in stream:
                        frame.flags.writeable = False
                        live.frames.append(frame)
                        files.write(frame)
                        self._metrics.frame(self.name)
                        self._hub.notify()
        finally:
            timer.cancel()
        self._measured(spent, time.perf_counter() - started)
        return dict(stream.metadata)

    def _opened(self, picture: bytes, job: Job, progress: Callable[[str, float, float], None]) -> VideoStream:
        """The stream of frames, which a cancellation from now on reaches."""
        stream = self.pipe.stream(picture, progress=progress, **job.given)
        with self._lock:
            self._running = (job.id, stream)
            stopped = self._stopped
        now = self._store.get(job.id)
        if stopped is not None or now is None or now.status != "in_progress":
            stream.close()
            raise stopped or CancelledError("the video was cancelled")
        return stream

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
        self._metrics.video(self.name, spent, seconds)

    def _end(self, job: Job, error: Exception) -> None:
        """Say that a job has no video, and why; open the bundle again if its device failed."""
        if self._ending and isinstance(error, CancelledError):
            self._store.put_back(job)
            return
        if isinstance(error, CancelledError):
            if self._store.cancel(job, str(error)):
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
        if self._store.fail(job, told):
            _log.info("%s: failed: %s", job.id, told["message"])
            self._metrics.ended(self.name, "failed")
        if isinstance(error, BackendError) and not self._ending:
            self._open_again()

    def _open_again(self) -> None:
        with suppress(SvdTrtError):
            self.pipe.close()
        try:
            self.pipe = self._reopen()
        except SvdTrtError as error:
            self._ending = True
            self._on_failure(error)
