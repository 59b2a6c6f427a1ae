"""The process of one contender: ``python -m svd_trt.benchmarks.worker``, driven by `svd_trt.benchmarks.harness`.

Reads a `Job` from standard input, loads, and answers; then makes a video for each `Request` until the input ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

import msgspec
import numpy as np

from svd_trt.benchmarks.contenders import CONTENDERS
from svd_trt.benchmarks.protocol import Job, Made, Ready, Reply, Request
from svd_trt.benchmarks.resources import GpuMeter, peak_rss, used_vram
from svd_trt.benchmarks.runs import Run, Video
from svd_trt.errors import first_line

__all__ = ["main", "pin"]

_FPS = 7
_GLANCE = 2.0  # seconds between looks at whether the harness is still there


def main() -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the harness decides
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever libraries print must not mix with the answers

    def say(reply: Reply) -> None:
        answers.write(msgspec.json.encode(reply) + b"\n")

    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    pin(job.threads)
    try:
        before = used_vram(enabled=job.gpu)
        started = time.perf_counter()
        run = _make(job)
        imported = time.perf_counter()
        run.load()
        now = time.perf_counter()
        say(Reply(ready=Ready(import_s=imported - started, load_s=now - imported)))
        for line in sys.stdin.buffer:
            say(Reply(made=_once(job, run, msgspec.json.decode(line, type=Request), before)))
    except Exception as error:  # a contender may fail in any way; the harness records it and goes on
        say(Reply(error=f"{type(error).__name__}: {first_line(error)}"))


def _end_with_parent(parent: int) -> None:
    """Standard input ends with the harness too, but nobody reads it during a video, which may take minutes."""
    while os.getppid() == parent:
        time.sleep(_GLANCE)
    os.killpg(0, signal.SIGKILL)


def _make(job: Job) -> Run:
    """The contender's code with the libraries it needs imported."""
    entrant = next(e for e in CONTENDERS if e.name == job.contender)
    if entrant.kind == "diffusers":
        from svd_trt.benchmarks.diffusers_runs import DiffusersRun
        from svd_trt.export.silence import silence_libraries

        with silence_libraries():
            from diffusers import StableVideoDiffusionPipeline  # noqa: F401

        return DiffusersRun(job, entrant.mode)
    from svd_trt.benchmarks.svd_trt_runs import SvdTrtRun

    return SvdTrtRun(job, "openvino" if entrant.kind == "openvino" else entrant.mode)


def _once(job: Job, run: Run, request: Request, before: int) -> Made:
    from svd_trt.runtime.video import BackgroundWriter, open_writer

    s = job.subject
    with GpuMeter(enabled=job.gpu, before=before) as meter:
        started = time.perf_counter()
        opened: Any = _Finish(open_writer(request.output, height=s.height, width=s.width, fps=_FPS, metadata={}))
        with BackgroundWriter(opened, maxsize=s.frames) as writer:

            def write(frames: Any) -> None:
                for frame in frames:
                    writer.write(frame[np.newaxis])

            video = run.make(write)
        total = time.perf_counter() - started
        # Encoding may overlap with what makes the frames; finishing the file does not.
        video.stages["write"] = writer.seconds + opened.seconds
    if request.frames is not None:
        np.save(request.frames, video.frames)
    return _measured(video, total, started, meter)


def _measured(video: Video, total: float, started: float, meter: GpuMeter) -> Made:
    return Made(
        total_s=total,
        stages=video.stages,
        steps=video.steps,
        first_step_s=video.first_step_at - started,
        host_s=video.host_s,
        load_s=video.load_s,
        peak_rss=peak_rss(),
        peak_vram=meter.peak_vram,
        energy_j=meter.energy_j,
    )


class _Finish:
    """A writer whose last step, finishing the file, is timed.

    Leaving a `BackgroundWriter` waits for frames that its own clock counts, and then finishes; only the latter is
    wanted.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def __enter__(self) -> Any:
        return self._writer.__enter__()

    def __exit__(self, *error: Any) -> None:
        started = time.perf_counter()
        self._writer.__exit__(*error)
        self.seconds = time.perf_counter() - started


def pin(threads: int) -> None:
    """The first so many of the processors that we may use; every library sizes its pool by that."""
    if hasattr(os, "sched_setaffinity"):
        allowed: Any = sorted(os.sched_getaffinity(0))[:threads]
        os.sched_setaffinity(0, allowed)


if __name__ == "__main__":
    main()
