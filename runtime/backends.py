"""Which device runs the networks: the place where a leaf is entered."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.driver import Driver, Gpu, list_gpus, load_driver
from svd_trt.engine.manifest import TensorRtName
from svd_trt.engine.tensorrt_import import TensorRt, find_tensorrt
from svd_trt.errors import ArgumentError, BackendError, MissingDependencyError, NoGpuError
from svd_trt.runtime.device import Device

if TYPE_CHECKING:
    from svd_trt.runtime.cuda.cuda_device import Engine

__all__ = ["CPU_NAME", "PROVIDERS", "RUN_BACKENDS", "Provider", "RunBackend", "open_device"]

RunBackend: TypeAlias = Literal["auto", "onnxruntime", "tensorrt", "tensorrt-rtx"]
Provider: TypeAlias = Literal["cpu", "cuda", "tensorrt"]

RUN_BACKENDS: tuple[RunBackend, ...] = ("auto", "onnxruntime", "tensorrt", "tensorrt-rtx")
PROVIDERS: tuple[Provider, ...] = ("cpu", "cuda", "tensorrt")

CPU_NAME = "onnxruntime (CPU)"

_DEVICE = re.compile(r"cpu|cuda(?::(\d{1,9}))?")
_DEVICE_NODE = Path("/dev/nvidiactl")  # there where an NVIDIA driver is loaded


def open_device(
    bundle: Bundle, backend: RunBackend = "auto", device: str | None = None, provider: Provider | None = None
) -> Device:
    """Open the device that runs ``bundle``.

    Args:
        bundle: whose engines decide which TensorRT it is.
        backend: ``auto`` is the bundle's TensorRT where there is a GPU, else ONNX Runtime on the CPU. Where there is
            a GPU and it cannot be used, that is an error and not a video that takes hours.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None leaves it to the others.
        provider: of ONNX Runtime; naming one means ``backend="onnxruntime"``.

    Raises:
        ArgumentError: what was asked for contradicts itself, or has no such name.
        BackendError: it cannot be had here; the message says why and what to do.
        MissingDependencyError: it needs a package that is not installed.
    """
    _check(backend, device, provider)
    if provider is not None:
        backend = "onnxruntime"
    wants_gpu = device is not None and device.startswith("cuda")
    if backend == "onnxruntime":
        provider = provider or ("cuda" if wants_gpu else "cpu")
    elif backend == "auto":
        if device == "cpu" or not (wants_gpu or _has_gpu()) or (bundle.manifest.tensorrt is None and not wants_gpu):
            provider = "cpu"
        else:
            backend = _tensorrt_of(bundle)
    if provider == "cpu":
        from svd_trt.runtime.ort import CpuDevice

        return CpuDevice()
    return _open_gpu(bundle, backend, device, provider)


def _has_gpu() -> bool:
    """Whether there is a GPU to run on.

    Raises:
        BackendError: there is one, and its driver does not work, or cuda-python is not installed to use it.
    """
    try:
        load_driver()
    except NoGpuError:
        return False
    except MissingDependencyError as error:
        if _DEVICE_NODE.exists():
            raise _or_cpu(error) from error
        return False
    return True


def _or_cpu(error: MissingDependencyError) -> BackendError:
    return BackendError(f"{error}, or choose --device cpu, which is slow")


def _check(backend: str, device: str | None, provider: str | None) -> None:
    if backend not in RUN_BACKENDS:
        raise BackendError(f"there is no backend {backend!r}; choose one of: {', '.join(RUN_BACKENDS)}")
    if provider is not None and provider not in PROVIDERS:
        raise BackendError(f"there is no provider {provider!r}; choose one of: {', '.join(PROVIDERS)}")
    if device is not None and not (isinstance(device, str) and _DEVICE.fullmatch(device)):
        raise ArgumentError(f"{device!r} is not a device; write cpu, cuda, or cuda:1 for the second GPU")
    if provider is not None and backend not in ("auto", "onnxruntime"):
        raise ArgumentError(f"a provider is a part of ONNX Runtime, and the backend asked for is {backend}")
    on_gpu = backend.startswith("tensorrt") or provider in ("cuda", "tensorrt")
    if (device == "cpu" and on_gpu) or (provider == "cpu" and device is not None and device != "cpu"):
        raise ArgumentError(f"{backend}{f' with provider {provider}' if provider else ''} does not run on {device}")


def _tensorrt_of(bundle: Bundle) -> TensorRtName:
    if bundle.manifest.tensorrt is None:
        raise BackendError(
            f"{bundle.path} holds no engines to run on a GPU; build them with `svd-trt build "
            f"{bundle.manifest.source.model} -o {bundle.path}`, or use --backend onnxruntime --provider cuda"
        )
    return bundle.manifest.tensorrt.name


def _open_gpu(bundle: Bundle, backend: RunBackend, device: str | None, provider: Provider | None) -> Device:
    from svd_trt.runtime.cuda.context import Context
    from svd_trt.runtime.cuda.cuda_device import CudaDevice

    try:
        driver = load_driver()
    except NoGpuError as error:
        raise NoGpuError(f"{error}; without --backend, --provider and --device it runs on the CPU, slowly") from error
    gpu = _choose_gpu(driver, device)
    tensorrt = None if backend == "onnxruntime" else _fitting(bundle, gpu, backend)
    with ExitStack() as stack:
        context = stack.enter_context(Context(driver, gpu))
        with context.current():  # what asks which GPU this is must not see another one
            engine = stack.enter_context(_make_engine(bundle, gpu, tensorrt, provider))
        stack.pop_all()  # the device closes them
        return CudaDevice(context, engine)


def _choose_gpu(driver: Driver, device: str | None) -> Gpu:
    gpus = list_gpus(driver)
    found = _DEVICE.fullmatch(device or "cuda")
    index = int(found[1] or 0) if found else 0
    if index >= len(gpus):
        here = ", ".join(f"cuda:{gpu.index} ({gpu.name})" for gpu in gpus)
        raise BackendError(f"there is no cuda:{index}; this machine has {here or 'no GPU'}")
    return gpus[index]


def _fitting(bundle: Bundle, gpu: Gpu, backend: RunBackend) -> TensorRt:
    """The TensorRT that was asked for, where it and ``gpu`` are what the engines were built with and for."""
    from svd_trt.runtime.cuda.tensorrt_runtime import refuse_misfit

    assert backend == "tensorrt" or backend == "tensorrt-rtx"
    try:
        tensorrt = find_tensorrt(backend)
    except MissingDependencyError as error:
        raise _or_cpu(error) from error
    refuse_misfit(tensorrt, gpu, bundle)
    return tensorrt


def _make_engine(bundle: Bundle, gpu: Gpu, tensorrt: TensorRt | None, provider: Provider | None) -> Engine:
    if tensorrt is None:
        from svd_trt.runtime.cuda.provider import OrtEngine

        assert provider == "cuda" or provider == "tensorrt", "the CPU is another device"
        return OrtEngine(provider)
    from svd_trt.runtime.cuda.tensorrt import TensorRtEngine

    return TensorRtEngine(tensorrt, gpu, bundle)
