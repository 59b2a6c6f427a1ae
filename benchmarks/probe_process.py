"""The process of one step of `svd_trt.benchmarks.gpu_probe`: it checks what the step needs, runs it, and answers."""

from __future__ import annotations

import importlib
import importlib.util
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from svd_trt.benchmarks.probe_steps import NEEDS, Answer, Need, ProbeError, ProbeJob, SkippedError, bundle_of
from svd_trt.engine.child_process import connect_to_parent
from svd_trt.engine.driver import list_gpus, load_driver
from svd_trt.engine.tensorrt_import import find_tensorrt
from svd_trt.errors import MissingDependencyError, SvdTrtError, first_line

__all__ = ["main", "unmet"]


def main() -> None:
    """Run the step that the parent sends, and answer with its figures and its outcome."""
    requests, send = connect_to_parent()
    job = msgspec.json.decode(next(requests), type=ProbeJob)

    def answer(**fields: Any) -> None:
        send(msgspec.json.encode(Answer(**fields)))

    try:
        _run(job, lambda **figures: answer(figures=figures))
    except SkippedError as skip:
        answer(outcome="skipped", reason=str(skip))
    except Exception as error:  # a step may fail in any way, and that is its result
        traceback.print_exc()  # into the log
        named = isinstance(error, ProbeError | SvdTrtError)
        answer(outcome="failed", reason=str(error) if named else f"{type(error).__name__}: {first_line(error)}")
    else:
        answer(outcome="passed")


def _run(job: ProbeJob, report: Callable[..., None]) -> None:
    for need in job.needs:
        if (reason := unmet(need, job)) is not None:
            raise SkippedError(f"it needs {NEEDS[need]}: {reason}")
    module, _, function = job.place.partition(":")
    getattr(importlib.import_module(module), function)(job, report, **job.arguments)


def unmet(need: Need, job: ProbeJob) -> str | None:
    """Why ``need`` is not met on this machine; None if it is."""
    checks: dict[Need, Callable[[ProbeJob], str | None]] = {
        "gpu": lambda job: None if job.dry_run else _no_gpu(),
        "torch": _no_torch,
        "diffusers": lambda _: _missing("diffusers", "transformers", "accelerate"),
        "cuda-python": lambda _: _missing("cuda.bindings") or _no_gpu(),
        "nvrtc": lambda _: _no_nvrtc(),
        "tensorrt": _no_tensorrt,
        "provider": lambda job: None if job.dry_run else _no_provider(),
        "checkout": lambda _: None if Path("tests", "gpu").is_dir() else "there is no tests/gpu",
        "bundle": lambda job: None if bundle_of(job).is_dir() else "there is none yet",
    }
    return checks[need](job)


def _missing(*modules: str) -> str | None:
    for module in modules:
        try:
            found = importlib.util.find_spec(module)
        except ImportError:  # the package that it is in
            found = None
        if found is None:
            return f"{module} is not installed"
    return None


def _no_gpu() -> str | None:
    try:
        return None if list_gpus(load_driver()) else "the driver shows none"
    except MissingDependencyError:
        return None  # another need; torch does without cuda-python
    except SvdTrtError as error:
        return str(error)


def _no_torch(job: ProbeJob) -> str | None:
    if (reason := _missing("torch")) is not None:
        return reason
    import torch

    return None if job.dry_run or torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"


def _no_nvrtc() -> str | None:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        return first_line(error)
    return None


def _no_provider() -> str | None:
    import onnxruntime

    found = onnxruntime.get_available_providers()
    return None if "CUDAExecutionProvider" in found else f"the installed onnxruntime has {', '.join(found)}"


def _no_tensorrt(job: ProbeJob) -> str | None:
    try:
        find_tensorrt(job.backend)
    except SvdTrtError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main()
