"""Finding TensorRT and TensorRT for RTX, which share an API.

They differ in the Python module, and in whether they need a GPU to build engines.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from svd_trt.engine.driver import Gpu, gpu_count, list_gpus, load_driver
from svd_trt.engine.manifest import TensorRtName
from svd_trt.errors import ArgumentError, BackendError, MissingDependencyError

__all__ = ["BuildBackend", "TensorRt", "find_tensorrt", "select_tensorrt", "served_capabilities"]

BuildBackend: TypeAlias = Literal["auto", "tensorrt", "tensorrt-rtx", "onnxruntime"]

_MINIMUM_TENSORRT = (10, 12)


@dataclass(frozen=True)
class TensorRt:
    """An importable TensorRT."""

    name: TensorRtName
    trt: Any
    """The Python module: ``tensorrt``, ``tensorrt_rtx`` or ``tensorrt_rtx_bindings``."""
    version: str
    target: str = ""
    """GPUs that its engines are for, as ``sm90`` or ``sm89,sm120``; empty if they run on several kinds."""
    device: int = 0
    """Index of the GPU that engines are built on; TensorRT for RTX needs none."""
    gpu: str = ""
    """Name of that GPU: TensorRT chooses kernels by their times on it."""


def find_tensorrt(name: TensorRtName, device: int = 0, targets: Sequence[str] = ()) -> TensorRt:
    """Import TensorRT or TensorRT for RTX.

    Args:
        name: which of the two.
        device: index of the GPU that TensorRT builds on.
        targets: compute capabilities that TensorRT for RTX builds for, as ``sm89``.

    Raises:
        ArgumentError: TensorRT for RTX does not build for one of ``targets``.
        MissingDependencyError: it is not installed.
        BackendError: it is installed but does not load or is too old, or there is no such GPU.
    """
    trt = _import_tensorrt() if name == "tensorrt" else _import_tensorrt_rtx()
    version = str(trt.__version__)
    if name == "tensorrt" and tuple(int(part) for part in version.split(".")[:2]) < _MINIMUM_TENSORRT:
        raise BackendError(f"TensorRT {version} is too old; svd-trt needs 10.12 or newer: pip install -U tensorrt")
    if name == "tensorrt":
        gpu = _gpu_of(device)
        return TensorRt(name, trt, version, gpu.sm if gpu else "", device, gpu.name if gpu else "")
    known = served_capabilities(trt)
    for target in targets:
        if target not in known:
            raise ArgumentError(
                f"--target {target}: TensorRT for RTX {version} builds for {', '.join(known)}; "
                "for another GPU build on that GPU, with --backend tensorrt"
            )
    return TensorRt(name, trt, version, ",".join(targets))


def select_tensorrt(backend: BuildBackend, device: str | None = None, targets: Sequence[str] = ()) -> TensorRt | None:
    """The TensorRT that ``backend`` asks for; None if the bundle is to have no engines.

    ``device`` is ``cuda`` or ``cuda:N``, for TensorRT; ``targets`` are for TensorRT for RTX, see `find_tensorrt`.

    ``auto`` is TensorRT if it is installed and there is a GPU, else TensorRT for RTX if that is installed (it needs
    no GPU to build), else none.

    Raises:
        ArgumentError: ``device`` is no GPU's name, or an option is for another backend than the one that is chosen.
        MissingDependencyError: a backend asked for by name is not installed.
        BackendError: a TensorRT is installed but is broken or too old, or it needs a GPU and there is none, or with
            ``auto`` only TensorRT for RTX is installed, and it serves none of this machine's GPUs.
    """
    index = _gpu_index(device)
    tensorrt = _select(backend, index, targets)
    kind = tensorrt.name if tensorrt else "onnxruntime"
    if device is not None and kind != "tensorrt":
        raise ArgumentError(f"--device is for --backend tensorrt, and the backend is {kind}; add that, or leave it out")
    if targets and kind != "tensorrt-rtx":
        raise ArgumentError(
            f"--target is for --backend tensorrt-rtx, and the backend is {kind}; add that, or leave it out"
        )
    return tensorrt


def _select(backend: BuildBackend, device: int, targets: Sequence[str]) -> TensorRt | None:
    if backend == "onnxruntime":
        return None
    if backend == "tensorrt":
        tensorrt = find_tensorrt("tensorrt", device)
        if gpu_count() == 0:
            raise BackendError(
                "TensorRT builds on a GPU and none is visible; use --backend tensorrt-rtx, which builds without one"
            )
        return tensorrt
    names: tuple[TensorRtName, ...] = ("tensorrt", "tensorrt-rtx")
    if backend == "tensorrt-rtx":
        return find_tensorrt("tensorrt-rtx", targets=targets)
    for name in names if gpu_count() else names[1:]:
        try:
            tensorrt = find_tensorrt(name, device, targets)
        except MissingDependencyError:
            continue
        if name == "tensorrt-rtx" and not targets:
            _check_served(tensorrt)
        return tensorrt
    return None


def served_capabilities(trt: Any) -> tuple[str, ...]:
    """The compute capabilities, such as ``sm89``, that ``trt``, a TensorRT for RTX, lists."""
    return tuple(name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM"))


def _check_served(tensorrt: TensorRt) -> None:
    """Refuse TensorRT for RTX, which nobody asked for by name, if no GPU of this machine could run its engines.

    On Hopper (sm90) it builds engines, and refuses to load them.
    """
    gpus = list_gpus(load_driver()) if gpu_count() else []
    served = served_capabilities(tensorrt.trt)
    newest = max(int(sm[2:]) for sm in served)
    if gpus and not any(gpu.sm in served or int(gpu.sm[2:]) > newest for gpu in gpus):
        found = ", ".join(f"{gpu.name} ({gpu.sm})" for gpu in gpus)
        raise BackendError(
            f"TensorRT for RTX serves {', '.join(served)}, and this machine has {found}. "
            "Install TensorRT: pip install 'svd-trt[tensorrt]'. "
            "Or name what to build: --backend tensorrt-rtx for other GPUs, or --backend onnxruntime"
        )


def _gpu_index(device: str | None) -> int:
    match = re.fullmatch(r"cuda(?::(\d{1,9}))?", device or "cuda")
    if match is None:
        raise ArgumentError(f"--device {device}: engines are built on a GPU; write cuda, or cuda:1 for the second")
    return int(match[1] or 0)


def _gpu_of(index: int) -> Gpu | None:
    """The GPU of this index; None if there is no GPU at all.

    Raises:
        BackendError: there are GPUs, but not this one.
    """
    if not gpu_count():
        return None
    gpus = list_gpus(load_driver())
    if index >= len(gpus):
        found = ", ".join(f"cuda:{gpu.index} ({gpu.name})" for gpu in gpus)
        raise BackendError(f"there is no cuda:{index}; this machine has {found}")
    return gpus[index]


def _import_tensorrt() -> Any:
    try:
        return importlib.import_module("tensorrt")
    except ModuleNotFoundError as error:
        raise MissingDependencyError("the tensorrt backend", "tensorrt") from error
    except (ImportError, OSError) as error:
        raise BackendError(f"tensorrt is installed but does not load: {error}") from error


def _import_tensorrt_rtx() -> Any:
    """NVIDIA's full package, or its bindings with the libraries from the wheel of ONNX Runtime's plugin."""
    try:
        return importlib.import_module("tensorrt_rtx")
    except ModuleNotFoundError:
        pass
    except (ImportError, OSError) as error:
        raise BackendError(f"tensorrt_rtx is installed but does not load: {error}") from error
    try:
        importlib.import_module("onnxruntime_ep_nv_tensorrt_rtx")  # loads the libraries that the bindings link to
        return importlib.import_module("tensorrt_rtx_bindings")
    except ModuleNotFoundError as error:
        raise MissingDependencyError("the tensorrt-rtx backend", "rtx") from error
    except (ImportError, OSError) as error:
        raise BackendError(f"TensorRT for RTX is installed but does not load: {error}") from error
