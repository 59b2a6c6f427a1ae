"""A contender in a process of its own: `ContenderProcess` is the harness's side, `main` the process itself.

The process gets a `Job`, loads, and answers with `Loaded`; then it makes a video for each `VideoRequest` and answers
with a `Measurement`. It answers with a `Failure` if it has to stop.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from svd_trt.benchmarks.contenders import CONTENDERS, Job, Runner
from svd_trt.benchmarks.measuring import GpuMeter, peak_rss, pin_threads, used_vram
from svd_trt.benchmarks.results import Stage
from svd_trt.engine.child_process import Answer, ChildProcess, connect_to_parent
from svd_trt.errors import first_line

__all__ = ["ContenderError", "ContenderProcess", "Loaded", "Measurement", "VideoRequest", "main"]

_FPS = 7


class VideoRequest(msgspec.Struct, frozen=True):
    """Make the video once."""

    output: str
    """File to write the video to."""
    frames: str | None = None
    """File to save the frames to, uint8 ``[F, H, W, 3]``, in numpy's format."""


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The contender can make videos."""

    import_s: float
    load_s: float


class Measurement(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One video was made."""

    total_s: float
    stages: dict[Stage, float]
    steps: list[float]
    first_step_s: float
    """From the call to the start of the first step."""
    host_s: float | None
    """The part of a step that its network does not account for, median."""
    load_s: float
    """Loading that was part of this video, usually of the first."""
    peak_rss: int
    peak_vram: int | None
    energy_j: float | None


class Failure(msgspec.Struct, frozen=True, tag=True):
    """The contender failed."""

    reason: str


class ContenderError(Exception):
    """A contender failed; the message is one line."""


class ContenderProcess:
    """One contender, loaded in a process of its own; leaving the ``with`` block kills it.

    Args:
        job: what to load.
        log: file for what the process prints.
        timeout: seconds to wait for an answer before the process is killed.

    Attributes:
        loaded: what loading took.
        started_s: from the start of the process until it was loaded.

    Raises:
        ContenderError: the contender failed to load, or its process ended.
    """

    def __init__(self, job: Job, log: Path, *, timeout: float = 3600.0) -> None:
        threads = str(job.threads)
        variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
        # A cache of an earlier run would hide what compiling costs.
        variables["TORCHINDUCTOR_CACHE_DIR"] = str(log.with_suffix(".inductor"))
        self._timeout = timeout
        started = time.perf_counter()
        self._child = ChildProcess("svd_trt.benchmarks.contender_process", variables, log=log, own_session=True)
        try:
            answer = self._ask(job)
            assert isinstance(answer, Loaded)
        except BaseException:
            self._child.kill()
            raise
        self.loaded = answer
        self.started_s = time.perf_counter() - started

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._child.pid

    def make_video(self, output: Path, frames: Path | None = None) -> Measurement:
        """Make one video and write it to ``output``, its frames also to ``frames``.

        Raises:
            ContenderError: the contender failed, or its process ended.
        """
        answer = self._ask(VideoRequest(os.fspath(output), None if frames is None else os.fspath(frames)))
        assert isinstance(answer, Measurement)
        return answer

    def _ask(self, request: Job | VideoRequest) -> Loaded | Measurement:
        self._child.send(msgspec.json.encode(request))
        try:
            line = self._child.receive(self._timeout)
        except TimeoutError as error:
            self._child.kill()
            raise ContenderError(f"{error}; --timeout sets a longer limit") from None
        if line is None:
            raise ContenderError(self._child.describe_exit("it"))
        answer = msgspec.json.decode(line, type=Loaded | Measurement | Failure)
        if isinstance(answer, Failure):
            raise ContenderError(answer.reason)
        return answer

    def __enter__(self) -> ContenderProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()


def main() -> None:
    """Serve the harness until it ends."""
    requests, answer = connect_to_parent()
    job = msgspec.json.decode(next(requests), type=Job)
    pin_threads(job.threads)
    try:
        _serve(job, requests, answer)
    except Exception as error:  # a contender may fail in any way; the harness records it and continues
        answer(msgspec.json.encode(Failure(f"{type(error).__name__}: {first_line(error)}")))


def _serve(job: Job, requests: Iterator[bytes], answer: Answer) -> None:
    vram_before = used_vram(enabled=job.gpu)
    started = time.perf_counter()
    runner = _import_runner(job)
    imported = time.perf_counter()
    runner.load()
    loaded = time.perf_counter()
    answer(msgspec.json.encode(Loaded(import_s=imported - started, load_s=loaded - imported)))
    for line in requests:
        request = msgspec.json.decode(line, type=VideoRequest)
        answer(msgspec.json.encode(_measure(job, runner, request, vram_before)))


def _import_runner(job: Job) -> Runner:
    """The contender's code, with the libraries that it needs imported."""
    contender = next(c for c in CONTENDERS if c.name == job.contender)
    if contender.kind == "diffusers":
        from svd_trt.benchmarks.diffusers_contender import DiffusersRunner
        from svd_trt.export.silence import silence_libraries

        with silence_libraries():
            from diffusers import StableVideoDiffusionPipeline  # noqa: F401

        return DiffusersRunner(job, contender.mode)
    from svd_trt.benchmarks.svd_trt_contender import SvdTrtRunner

    return SvdTrtRunner(job, "openvino" if contender.kind == "openvino" else contender.mode)


def _measure(job: Job, runner: Runner, request: VideoRequest, vram_before: int) -> Measurement:
    from svd_trt.runtime.video import BackgroundWriter, open_writer

    workload = job.workload
    with GpuMeter(enabled=job.gpu, before=vram_before) as meter:
        started = time.perf_counter()
        finish: Any = _TimedFinish(
            open_writer(request.output, height=workload.height, width=workload.width, fps=_FPS, metadata={})
        )
        with BackgroundWriter(finish, maxsize=workload.frames) as writer:

            def write(frames: Any) -> None:
                for frame in frames:
                    writer.write(frame[np.newaxis])

            video = runner.make_video(write)
        total = time.perf_counter() - started
    if request.frames is not None:
        np.save(request.frames, video.frames)
    # Encoding may overlap with making the frames; finishing the file does not.
    stages: dict[Stage, float] = {**video.stages, "write": writer.seconds + finish.seconds}
    return Measurement(
        total_s=total,
        stages=stages,
        steps=video.steps,
        first_step_s=video.first_step_at - started,
        host_s=video.host_s,
        load_s=video.load_s,
        peak_rss=peak_rss(),
        peak_vram=meter.peak_vram,
        energy_j=meter.energy_j,
    )


class _TimedFinish:
    """A writer that times the last step, finishing the file.

    Leaving a `BackgroundWriter` first waits for frames, which its own clock counts already.
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


if __name__ == "__main__":
    main()
