"""Which device runs the networks: the place where a leaf is entered."""

from __future__ import annotations

from typing import Literal, TypeAlias

from svd_trt.errors import BackendError
from svd_trt.runtime.device import Device

__all__ = ["RUN_BACKENDS", "RunBackend", "open_device"]

RunBackend: TypeAlias = Literal["auto", "onnxruntime"]

RUN_BACKENDS: tuple[RunBackend, ...] = ("auto", "onnxruntime")


def open_device(backend: RunBackend) -> Device:
    """Open the device of ``backend``; ``auto`` is the fastest that works here, today always ONNX Runtime.

    Raises:
        BackendError: there is no such backend.
    """
    if backend not in RUN_BACKENDS:
        raise BackendError(f"there is no backend {backend!r}; choose one of: {', '.join(RUN_BACKENDS)}")
    from svd_trt.runtime.ort import CpuDevice

    return CpuDevice()
