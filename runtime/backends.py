"""Which device runs the networks: the place where a leaf is entered."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, TypeAlias

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.driver import Driver, Gpu, gpu_count, list_gpus, load_driver
from svd_trt.engine.flavour import FlavourName, find_flavour
from svd_trt.errors import ArgumentError, BackendError, MissingDependencyError
from svd_trt.runtime.device import Device

if TYPE_CHECKING:
    from svd_trt.runtime.cuda.device import Engine

__all__ = ["CPU_NAME", "PROVIDERS", "RUN_BACKENDS", "Provider", "RunBackend", "open_device"]

RunBackend: TypeAlias = Literal["auto", "onnxruntime", "tensorrt", "tensorrt-rtx"]
Provider: TypeAlias = Literal["cpu", "cuda", "tensorrt"]

RUN_BACKENDS: tuple[RunBackend, ...] = ("auto", "onnxruntime", "tensorrt", "tensorrt-rtx")
PROVIDERS: tuple[Provider, ...] = ("cpu", "cuda", "tensorrt")

CPU_NAME = "onnxruntime (CPU)"

_DEVICE = re.compile(r"cpu|cuda(?::(\d{1,3}))?")


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
        if device == "cpu" or not (wants_gpu or gpu_count()) or (bundle.manifest.flavour is None and not wants_gpu):
            provider = "cpu"
        else:
            backend = _flavour_of(bundle)
    if provider == "cpu":
        from svd_trt.runtime.ort import CpuDevice

        return CpuDevice()
    return _open_gpu(bundle, backend, device, provider)


def _check(backend: str, device: str | None, provider: str | None) -> None:
    if backend not in RUN_BACKENDS:
        raise BackendError(f"there is no backend {backend!r}; choose one of: {', '.join(RUN_BACKENDS)}")
    if provider is not None and provider not in PROVIDERS:
        raise BackendError(f"there is no provider {provider!r}; choose one of: {', '.join(PROVIDERS)}")
    if device is not None and not _DEVICE.fullmatch(device):
        raise ArgumentError(f"{device!r} is not a device; write cpu, cuda, or cuda:1 for the second GPU")
    if provider is not None and backend not in ("auto", "onnxruntime"):
        raise ArgumentError(f"a provider is a part of ONNX Runtime, and the backend asked for is {backend}")
    on_gpu = backend.startswith("tensorrt") or provider in ("cuda", "tensorrt")
    if (device == "cpu" and on_gpu) or (provider == "cpu" and device is not None and device != "cpu"):
        raise ArgumentError(f"{backend}{f' with provider {provider}' if provider else ''} does not run on {device}")


def _flavour_of(bundle: Bundle) -> FlavourName:
    if bundle.manifest.flavour is None:
        raise BackendError(
            f"{bundle.path} holds no engines to run on a GPU; build them with `svd-trt build "
            f"{bundle.manifest.source.model} -o {bundle.path}`, or use --backend onnxruntime --provider cuda"
        )
    return bundle.manifest.flavour.name


def _open_gpu(bundle: Bundle, backend: RunBackend, device: str | None, provider: Provider | None) -> Device:
    from svd_trt.runtime.cuda.device import CudaDevice

    try:
        driver = load_driver()
    except BackendError as error:
        raise BackendError(f"{error}; --device cpu runs on the CPU, slowly") from error
    gpu = _choose_gpu(driver, device)
    return CudaDevice(driver, gpu, _open_engine(bundle, gpu, backend, provider))


def _choose_gpu(driver: Driver, device: str | None) -> Gpu:
    gpus = list_gpus(driver)
    found = _DEVICE.fullmatch(device or "cuda")
    index = int(found[1] or 0) if found else 0
    if index >= len(gpus):
        here = ", ".join(f"cuda:{gpu.index} ({gpu.name})" for gpu in gpus)
        raise BackendError(f"there is no cuda:{index}; this machine has {here or 'no GPU'}")
    return gpus[index]


def _open_engine(bundle: Bundle, gpu: Gpu, backend: RunBackend, provider: Provider | None) -> Engine:
    if backend == "onnxruntime":
        from svd_trt.runtime.cuda.provider import OrtEngine

        assert provider == "cuda" or provider == "tensorrt", "the CPU is another device"
        return OrtEngine(provider)
    from svd_trt.runtime.cuda.tensorrt import TensorRtEngine

    assert backend == "tensorrt" or backend == "tensorrt-rtx"
    try:
        flavour = find_flavour(backend)
    except MissingDependencyError as error:
        raise BackendError(f"{error}, or choose --device cpu, which is slow") from error
    engine = TensorRtEngine(flavour)
    engine.refuse_misfit(gpu, bundle)
    return engine
