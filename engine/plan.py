"""ONNX to a TensorRT plan, in a process of its own.

The builder spends most of its time in steps that it does not interrupt (a minute for a full-size denoiser), takes
gigabytes, and, where memory runs out, takes its process with it. Apart from ours it can be stopped at once, its
memory is free when it is done, and its death is an error message.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

import svd_trt
from svd_trt.engine.flavour import Flavour
from svd_trt.engine.spec import NetworkSpec
from svd_trt.engine.tensorrt_build import Job, Message, PlanReport
from svd_trt.errors import EngineBuildError

__all__ = ["build_plan"]


def build_plan(
    flavour: Flavour,
    onnx_path: Path,
    spec: NetworkSpec,
    plan_path: Path,
    progress: Callable[[float], None] | None = None,
) -> PlanReport:
    """Build the engine of ``spec`` from ``onnx_path`` and write it to ``plan_path``.

    ``progress`` is called with the fraction that is done, from 0 to 1. Any exception while waiting, Ctrl-C among
    them, stops the build at once.

    Raises:
        EngineBuildError: a node was refused, the tensors are not those of ``spec``, or the build failed or died.
        OSError: the plan cannot be written.
    """
    plan_path.parent.mkdir(parents=True, exist_ok=True)
    partial = plan_path.with_name(f"{plan_path.name}.{os.getpid()}")
    job = Job(flavour=flavour.name, onnx_path=str(onnx_path), plan_path=str(partial), spec=spec)
    command = [sys.executable, "-m", "svd_trt.engine.tensorrt_build"]
    try:
        with subprocess.Popen(  # noqa: S603  (our own interpreter and module)
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment(), bufsize=0
        ) as process:
            try:
                report = _converse(process, msgspec.json.encode(job), spec, progress or (lambda _: None))
            except BaseException:
                process.kill()  # leaving the block waits for it
                raise
        partial.replace(plan_path)
    finally:
        partial.unlink(missing_ok=True)
    return report


def _converse(
    process: subprocess.Popen[bytes], job: bytes, spec: NetworkSpec, progress: Callable[[float], None]
) -> PlanReport:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once; what it left behind says more
        process.stdin.write(job + b"\n")  # and stays open: its end tells the builder that we are gone
    with io.BufferedReader(process.stdout) as lines:  # type: ignore[type-var]  # a raw pipe, with bufsize=0
        for line in lines:
            message = msgspec.json.decode(line, type=Message)
            if message.report is not None:
                return message.report
            if message.error is not None:
                raise EngineBuildError(message.error)
            if message.progress is not None:
                progress(message.progress)
    raise EngineBuildError(f"building {spec.name} failed: {_epitaph(process.wait())}")


def _epitaph(code: int) -> str:
    """Why a builder that said nothing is gone."""
    if code == -signal.SIGKILL:
        return "TensorRT was killed, most likely because memory ran out; close other programs or use a larger machine"
    if code < 0:
        return f"TensorRT crashed ({signal.Signals(-code).name})"
    return f"TensorRT's process ended with code {code}"


def _environment() -> dict[str, str]:
    """Ours, with this svd_trt found first wherever it was imported from."""
    here = str(Path(svd_trt.__file__).parent.parent)
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))}
