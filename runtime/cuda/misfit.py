"""Whether a bundle's engines can run on a GPU, and what to do if they cannot."""

from __future__ import annotations

import re

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.driver import Gpu
from svd_trt.engine.rebuild import engine_options, rebuild_command
from svd_trt.engine.tensorrt_import import TensorRt
from svd_trt.errors import BackendError
from svd_trt.runtime.cuda.tensorrt_runtime import Runtime

__all__ = ["refuse_invalid", "refuse_misfit"]

_ONNX = "or run its ONNX networks with --backend onnxruntime --provider cuda"
_CUDA_13 = "install NVIDIA driver 580 or newer, which supports CUDA 13"


def refuse_misfit(tensorrt: TensorRt, gpu: Gpu, bundle: Bundle) -> None:
    """Check that ``tensorrt`` and ``gpu`` are what the bundle's engines were built with and for.

    Raises:
        BackendError: they were not; the message says why, and which command builds them again.
    """
    built = bundle.manifest.tensorrt
    if built is None:
        reason = "it holds no engines"
    elif built.name != tensorrt.name:
        reason = f"its engines are for {built.name}, and {tensorrt.name} was asked for"
    elif built.version != tensorrt.version:
        reason = f"its engines are from {built.name} {built.version}, and {tensorrt.version} is installed"
    elif tensorrt.name == "tensorrt" and gpu.sm not in (built.targets or (gpu.sm,)):
        reason = f"its engines are for {built.target}, and this GPU is {gpu.sm} ({gpu.name})"
    else:
        return
    raise BackendError(_message(bundle, gpu, reason, _build(bundle, *engine_options(tensorrt.name, gpu.index))))


def refuse_invalid(runtime: Runtime, gpu: Gpu, bundle: Bundle) -> None:
    """Ask ``runtime`` whether the engines can run on the GPU whose context is current, without loading them.

    Raises:
        BackendError: they cannot; the message says why, and what helps.
    """
    problems = runtime.invalidity(_header(bundle, runtime.header_bytes))
    if problems is None:
        return
    found = [_explain(problem, runtime, gpu, bundle) for problem in problems] or [_from_log(runtime, gpu)]
    said = f"TensorRT for RTX {runtime.tensorrt.version} refuses its engines on {gpu.name} ({gpu.sm}): "
    raise BackendError(_message(bundle, gpu, said + ", ".join(reason for reason, _ in found), found[0][1]))


def _explain(problem: str, runtime: Runtime, gpu: Gpu, bundle: Bundle) -> tuple[str, str]:
    """The reason, and what to do, for one of TensorRT for RTX's diagnostics. A new build is advised if it helps."""
    if problem == "UNSUPPORTED_CC":
        if gpu.sm in runtime.served:
            again = _build(bundle, *engine_options("tensorrt-rtx", gpu.index), "--target", gpu.sm)
            return "they were not built for this compute capability", again
        served = ", ".join(runtime.served)
        other = _build(bundle, *engine_options("tensorrt", gpu.index))
        return f"it serves {served}, and no other GPU", f"{other}, {_ONNX}"
    if problem == "OLD_CUDA_DRIVER":
        return f"the driver, which supports CUDA {_cuda_of(gpu)}, is too old", _CUDA_13
    again = _build(bundle, *engine_options("tensorrt-rtx", gpu.index))
    known = {
        "VERSION_MISMATCH": ("they are from another version", again),
        "MALFORMED_ENGINE": ("the plan is damaged", again),
        "OLD_CUDA_RUNTIME": ("its CUDA runtime is too old", "pip install -U 'svd-trt[rtx]'"),
        "INSUFFICIENT_GPU_MEMORY": ("the GPU's memory is too small", "choose a larger GPU with --device"),
        "CUDA_ERROR": ("CUDA does not work here", "see whether nvidia-smi shows the GPU"),
    }
    return known.get(problem, (problem.lower().replace("_", " "), _ONNX.removeprefix("or ")))


def _from_log(runtime: Runtime, gpu: Gpu) -> tuple[str, str]:
    """The reason, and what to do, if no diagnostic is set. Only the log says that a driver is too old for CUDA 13."""
    said = runtime.errors.reason if runtime.errors.messages else ""
    if re.search(r"driver version is insufficient", said, re.IGNORECASE) or gpu.driver_version < 13000:
        return said or f"the driver supports CUDA {_cuda_of(gpu)}", _CUDA_13
    return said or "it does not say why", _ONNX.removeprefix("or ")


def _cuda_of(gpu: Gpu) -> str:
    return f"{gpu.driver_version // 1000}.{gpu.driver_version % 1000 // 10}"


def _build(bundle: Bundle, *options: str) -> str:
    return f"build it again: {rebuild_command(bundle.manifest, bundle.path, *options)}"


def _message(bundle: Bundle, gpu: Gpu, reason: str, advice: str) -> str:
    return f"{bundle.path} cannot run on cuda:{gpu.index}: {reason}; {advice}"


def _header(bundle: Bundle, nbytes: int) -> bytes:
    path = bundle.plan_path("denoiser")
    assert path is not None
    with path.open("rb") as file:
        return file.read(nbytes)
