"""Choose the backend, the device and the provider that run a bundle, and open the device."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.driver import Driver, Gpu, list_gpus, load_driver
from svd_trt.engine.rebuild import engine_options, rebuild_command
from svd_trt.engine.tensorrt_import import TensorRt, find_tensorrt
from svd_trt.errors import ArgumentError, BackendError, MissingDependencyError, NoGpuError
from svd_trt.runtime.device import Device

if TYPE_CHECKING:
    from svd_trt.runtime.cuda.cuda_device import GpuBackend

__all__ = ["PROVIDERS", "RUN_BACKENDS", "Choice", "Provider", "RunBackend", "choose", "open_device"]

RunBackend: TypeAlias = Literal["auto", "onnxruntime", "tensorrt", "tensorrt-rtx"]
Provider: TypeAlias = Literal["cpu", "cuda", "tensorrt"]

RUN_BACKENDS: tuple[RunBackend, ...] = ("auto", "onnxruntime", "tensorrt", "tensorrt-rtx")
PROVIDERS: tuple[Provider, ...] = ("cpu", "cuda", "tensorrt")

_DEVICE = re.compile(r"cpu|cuda(?::(\d{1,9}))?")
_DEVICE_NODE = Path("/dev/nvidiactl")  # exists if an NVIDIA driver is loaded


class Choice(NamedTuple):
    """One of the five ways to run a bundle, and the GPU to run it on.

    Attributes:
        backend: ``onnxruntime``, ``tensorrt`` or ``tensorrt-rtx``.
        provider: of ONNX Runtime; None for TensorRT.
        gpu: index of the GPU; None for the CPU.
    """

    backend: Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
    provider: Provider | None
    gpu: int | None


def open_device(
    bundle: Bundle,
    backend: RunBackend = "auto",
    device: str | None = None,
    provider: Provider | None = None,
    stream: Any = None,
) -> Device:
    """Open the device that runs ``bundle``.

    Args:
        bundle: its engines decide between TensorRT and TensorRT for RTX.
        backend: see `choose`.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None leaves the choice to the other arguments.
        provider: of ONNX Runtime; a provider implies ``backend="onnxruntime"``.
        stream: the caller's CUDA stream, on which networks run; None makes one.

    Raises:
        ArgumentError: the arguments contradict each other or do not exist.
        BackendError: the device cannot be used here; the message says why and what to do.
        MissingDependencyError: a package is not installed.
    """
    choice = choose(bundle, backend, device, provider)
    if choice.gpu is None:
        from svd_trt.runtime.cpu_device import CpuDevice

        if stream is not None:
            raise ArgumentError("stream is for a GPU, and this pipeline runs on the CPU; leave it out")
        return CpuDevice()
    return _open_gpu(bundle, choice, choice.gpu, stream)


def choose(
    bundle: Bundle, backend: RunBackend = "auto", device: str | None = None, provider: Provider | None = None
) -> Choice:
    """Turn the three arguments, most of whose combinations are invalid, into one valid `Choice`.

    ``auto`` is the bundle's TensorRT if the machine has a GPU and the bundle has engines, and ONNX Runtime on the CPU
    otherwise. A GPU that exists but cannot be used is an error, because the CPU would take hours for a video.

    Raises:
        ArgumentError, BackendError, MissingDependencyError: see `open_device`.
    """
    _check(backend, device, provider)
    wants_gpu = device is not None and device.startswith("cuda")
    gpu = int((device or "").partition(":")[2] or 0)
    if provider == "cpu" or device == "cpu":
        return Choice("onnxruntime", "cpu", None)
    if provider is not None:
        return Choice("onnxruntime", provider, gpu)
    if backend == "onnxruntime":
        return Choice("onnxruntime", "cuda", gpu) if wants_gpu else Choice("onnxruntime", "cpu", None)
    if backend != "auto":
        return Choice(backend, None, gpu)
    built = bundle.manifest.tensorrt
    if (wants_gpu or _has_gpu()) and built is not None:
        return Choice(built.name, None, gpu)
    if wants_gpu:
        # The first build made no engines, so this one must name a backend; TensorRT builds for any GPU.
        build = rebuild_command(bundle.manifest, bundle.path, *engine_options("tensorrt", gpu))
        raise BackendError(
            f"{bundle.path} holds no engines to run on a GPU; build them with {build}, "
            "or use --backend onnxruntime --provider cuda"
        )
    return Choice("onnxruntime", "cpu", None)


def _check(backend: str, device: str | None, provider: str | None) -> None:
    if backend not in RUN_BACKENDS:
        raise BackendError(f"there is no backend {backend!r}; choose one of: {', '.join(RUN_BACKENDS)}")
    if provider is not None and provider not in PROVIDERS:
        raise BackendError(f"there is no provider {provider!r}; choose one of: {', '.join(PROVIDERS)}")
    if device is not None and not (isinstance(device, str) and _DEVICE.fullmatch(device)):
        raise ArgumentError(f"{device!r} is not a device; write cpu, cuda, or cuda:1 for the second GPU")
    if provider is not None and backend not in ("auto", "onnxruntime"):
        raise ArgumentError(f"only ONNX Runtime has providers, and the backend is {backend}; leave one of them out")
    on_gpu = backend.startswith("tensorrt") or provider in ("cuda", "tensorrt")
    if (device == "cpu" and on_gpu) or (provider == "cpu" and device is not None and device != "cpu"):
        raise ArgumentError(f"{backend}{f' with provider {provider}' if provider else ''} does not run on {device}")


def _has_gpu() -> bool:
    """Check for a GPU.

    Raises:
        BackendError: there is a GPU, but its driver does not work, or cuda-python is not installed.
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


def _open_gpu(bundle: Bundle, choice: Choice, index: int, caller: Any) -> Device:
    from svd_trt.runtime.cuda.context import Context
    from svd_trt.runtime.cuda.cuda_device import CudaDevice
    from svd_trt.runtime.cuda.streams import callers_stream

    try:
        driver = load_driver()
    except NoGpuError as error:
        raise NoGpuError(f"{error}; without --backend, --provider and --device it runs on the CPU, slowly") from error
    gpu = _find_gpu(driver, index)
    tensorrt = _matching_tensorrt(bundle, gpu, choice)
    with ExitStack() as stack:
        context = stack.enter_context(Context(driver, gpu))
        stream = None if caller is None else callers_stream(caller, context)
        with context.current():  # TensorRT asks for the current GPU, and must not find another one
            backend = stack.enter_context(_make_backend(bundle, gpu, tensorrt, choice.provider))
        stack.pop_all()  # the device closes them
        return CudaDevice(context, backend, stream)


def _find_gpu(driver: Driver, index: int) -> Gpu:
    gpus = list_gpus(driver)
    if index >= len(gpus):
        found = ", ".join(f"cuda:{gpu.index} ({gpu.name})" for gpu in gpus)
        raise BackendError(f"there is no cuda:{index}; this machine has {found or 'no GPU'}")
    return gpus[index]


def _matching_tensorrt(bundle: Bundle, gpu: Gpu, choice: Choice) -> TensorRt | None:
    """Find the TensorRT of ``choice``, and check that the bundle's engines were built with it and for ``gpu``."""
    from svd_trt.runtime.cuda.misfit import refuse_misfit

    if choice.backend == "onnxruntime":
        return None
    try:
        tensorrt = find_tensorrt(choice.backend)
    except MissingDependencyError as error:
        raise _or_cpu(error) from error
    refuse_misfit(tensorrt, gpu, bundle)
    return tensorrt


def _make_backend(bundle: Bundle, gpu: Gpu, tensorrt: TensorRt | None, provider: Provider | None) -> GpuBackend:
    if tensorrt is None:
        from svd_trt.runtime.cuda.provider import OrtBackend

        assert provider == "cuda" or provider == "tensorrt", "the CPU is another device"
        return OrtBackend(provider)
    from svd_trt.runtime.cuda.tensorrt import TensorRtBackend

    return TensorRtBackend(tensorrt, gpu, bundle)
