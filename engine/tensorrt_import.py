"""Finding TensorRT and TensorRT for RTX, which share an API.

They differ in the Python module, and in whether they need a GPU to build engines.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from svd_trt.engine.driver import gpu_count, list_gpus, load_driver
from svd_trt.engine.manifest import TensorRtName
from svd_trt.errors import BackendError, MissingDependencyError

__all__ = ["BuildBackend", "TensorRt", "find_tensorrt", "select_tensorrt"]

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
    """GPU that its engines are for, as ``sm90``; empty if they run on several kinds."""


def find_tensorrt(name: TensorRtName) -> TensorRt:
    """Import TensorRT or TensorRT for RTX.

    Raises:
        MissingDependencyError: it is not installed.
        BackendError: it is installed but does not load or is too old.
    """
    trt = _import_tensorrt() if name == "tensorrt" else _import_tensorrt_rtx()
    version = str(trt.__version__)
    if name == "tensorrt" and tuple(int(part) for part in version.split(".")[:2]) < _MINIMUM_TENSORRT:
        raise BackendError(f"TensorRT {version} is too old; svd-trt needs 10.12 or newer: pip install -U tensorrt")
    return TensorRt(name, trt, version, _current_gpu() if name == "tensorrt" else "")


def select_tensorrt(backend: BuildBackend) -> TensorRt | None:
    """The TensorRT that ``backend`` asks for; None if the bundle is to have no engines.

    ``auto`` is TensorRT if it is installed and there is a GPU, else TensorRT for RTX if that is installed (it needs
    no GPU to build), else none.

    Raises:
        MissingDependencyError: a backend asked for by name is not installed.
        BackendError: a TensorRT is installed but is broken or too old, or it needs a GPU and there is none.
    """
    if backend == "onnxruntime":
        return None
    if backend == "tensorrt":
        tensorrt = find_tensorrt("tensorrt")
        if gpu_count() == 0:
            raise BackendError(
                "TensorRT builds on a GPU and none is visible; use --backend tensorrt-rtx, which builds without one"
            )
        return tensorrt
    if backend == "tensorrt-rtx":
        return find_tensorrt("tensorrt-rtx")
    names: tuple[TensorRtName, ...] = ("tensorrt", "tensorrt-rtx") if gpu_count() else ("tensorrt-rtx",)
    for name in names:
        try:
            return find_tensorrt(name)
        except MissingDependencyError:
            continue
    return None


def _current_gpu() -> str:
    """Compute capability of the first GPU, as ``sm90``; empty without one."""
    return list_gpus(load_driver())[0].sm if gpu_count() else ""


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
