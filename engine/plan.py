"""ONNX to a TensorRT plan, in a process of its own.

Most of the builder's time goes into steps that it does not interrupt (a minute for a full-size denoiser). It takes
gigabytes, and its process dies when memory runs out. As a child process it can be stopped at once, its memory is free
when it is done, and its death becomes an error message.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from svd_trt.engine.child_process import FREE_MEMORY_EARLY, ChildProcess
from svd_trt.engine.profiles import Profile, profiles_of
from svd_trt.engine.spec import NetworkName, NetworkSpec
from svd_trt.engine.tensorrt_build import EngineOptions, Job, Message, PlanReport
from svd_trt.engine.tensorrt_import import TensorRt
from svd_trt.errors import EngineBuildError
from svd_trt.progress import Progress, ignore_progress

__all__ = ["build_plan", "kernels_path", "plan_stage"]

_log = logging.getLogger("svd_trt")

_ALMOST_DONE = 0.999  # a stage has ended when it reports 1, and the plan is not in place before


def build_plan(
    tensorrt: TensorRt,
    onnx_path: Path,
    spec: NetworkSpec,
    plan_path: Path,
    profiles: Sequence[Profile] | None = None,
    options: EngineOptions | None = None,
    progress: Progress = ignore_progress,
    *,
    timing_cache: Path | None = None,
) -> PlanReport:
    """Build the engine of ``spec`` from ``onnx_path``; write it to ``plan_path``, its kernels to `kernels_path` of it.

    Its profiles are ``profiles``, by default the whole range alone. The progress of `plan_stage` is a fraction of 1.
    Any exception while waiting, including one that ``progress`` raises and Ctrl-C, stops the build at once.

    Raises:
        EngineBuildError: a node was refused, the tensors are not those of ``spec``, or the build failed or died.
        OSError: the plan cannot be written.
    """
    plan_path.parent.mkdir(parents=True, exist_ok=True)
    partial = plan_path.with_name(f"{plan_path.name}.{os.getpid()}")
    partial_kernels = kernels_path(partial)
    job = Job(
        tensorrt=tensorrt.name,
        target=tensorrt.target,
        device=tensorrt.device,
        onnx_path=str(onnx_path),
        plan_path=str(partial),
        kernels_path=str(partial_kernels),
        timing_cache=str(timing_cache) if timing_cache else None,
        spec=spec,
        profiles=tuple(profiles or profiles_of(spec, ())),
        options=options or EngineOptions(),
    )
    stage = plan_stage(spec.name)
    progress(stage, 0, 1)
    try:
        report = _run(job, stage, progress)
        partial.replace(plan_path)
        partial_kernels.replace(kernels_path(plan_path))
    finally:
        partial.unlink(missing_ok=True)
        partial_kernels.unlink(missing_ok=True)
    progress(stage, 1, 1)
    return report


def kernels_path(plan_path: Path) -> Path:
    """The list of kernels of the plan at ``plan_path``: ``denoiser.kernels.json`` beside ``denoiser.plan``."""
    return plan_path.with_name(f"{plan_path.name.removesuffix('.plan')}.kernels.json")


def plan_stage(network: NetworkName) -> str:
    """What the progress of building the engine of ``network`` is called."""
    return f"{network}: building the engine"


def _run(job: Job, stage: str, progress: Progress) -> PlanReport:
    with ChildProcess("svd_trt.engine.tensorrt_build", FREE_MEMORY_EARLY) as child:
        child.send(msgspec.json.encode(job))
        while (line := child.receive()) is not None:
            message = msgspec.json.decode(line, type=Message)
            if message.error is not None:
                raise EngineBuildError(message.error)
            if message.note is not None:
                _log.warning("%s", message.note)
            if message.progress is not None:
                progress(stage, min(message.progress, _ALMOST_DONE), 1)
            if message.report is not None:
                return message.report
        raise EngineBuildError(f"building {job.spec.name} failed: {child.describe_exit('TensorRT')}")
