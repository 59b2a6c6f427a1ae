# ruff: noqa: N802, N803  # the names of the driver, so that keyword arguments work too
"""The driver's functions for devices, contexts and errors."""

from __future__ import annotations

from typing import Any

from cuda.bindings import driver

from tests.standin.calls import Refused, driver_function, number
from tests.standin.core import Core
from tests.standin.streams import Context

__all__ = ["CONTEXT_BYTES", "Devices"]

CONTEXT_BYTES = 300_000_000

_STRINGS = {
    "CUDA_SUCCESS": "no error",
    "CUDA_ERROR_INVALID_VALUE": "invalid argument",
    "CUDA_ERROR_OUT_OF_MEMORY": "out of memory",
    "CUDA_ERROR_NOT_INITIALIZED": "initialization error",
    "CUDA_ERROR_NO_DEVICE": "no CUDA-capable device is detected",
    "CUDA_ERROR_INVALID_DEVICE": "invalid device ordinal",
    "CUDA_ERROR_INVALID_CONTEXT": "invalid device context",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED": "context is destroyed",
    "CUDA_ERROR_INVALID_HANDLE": "invalid resource handle",
    "CUDA_ERROR_NOT_READY": "device not ready",
    "CUDA_ERROR_NOT_SUPPORTED": "operation not supported",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "an illegal memory access was encountered",
    "CUDA_ERROR_LAUNCH_FAILED": "unspecified launch failure",
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": "operation not permitted when stream is capturing",
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": "operation failed due to a previous error during capture",
}


class Devices(Core):
    """Devices with equal properties, and the primary context of each."""

    def __init__(self, devices: int, total_bytes: int, capability: tuple[int, int], driver_version: int) -> None:
        super().__init__(devices, total_bytes)
        self.capability = capability
        self.driver_version = driver_version

    @driver_function(needs="nothing")
    def cuInit(self, Flags: int) -> None:
        if not self._devices:
            raise Refused("CUDA_ERROR_NO_DEVICE")
        self._initialised = True

    @driver_function(1, needs="nothing")
    def cuDriverGetVersion(self) -> int:
        return self.driver_version

    @driver_function(1, needs="nothing")
    def cuGetErrorName(self, error: Any) -> bytes:
        return str(driver.CUresult(error).name).encode()

    @driver_function(1, needs="nothing")
    def cuGetErrorString(self, error: Any) -> bytes:
        name = str(driver.CUresult(error).name)
        return _STRINGS.get(name, name.removeprefix("CUDA_ERROR_").replace("_", " ").lower()).encode()

    @driver_function(1, needs="init")
    def cuDeviceGetCount(self) -> int:
        return self._devices

    @driver_function(1, needs="init")
    def cuDeviceGet(self, ordinal: int) -> Any:
        return driver.CUdevice(self._device(ordinal))

    @driver_function(1, needs="init")
    def cuDeviceGetName(self, length: int, dev: Any) -> bytes:
        return f"Stand-in GPU {self._device(dev)}".encode()[: length - 1].ljust(length, b"\0")

    @driver_function(1, needs="init")
    def cuDeviceGetAttribute(self, attrib: Any, dev: Any) -> int:
        self._device(dev)
        values = {
            "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": self.capability[0],
            "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": self.capability[1],
            "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT": 128,
            "CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT": 2,
            "CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING": 1,
            "CU_DEVICE_ATTRIBUTE_INTEGRATED": 0,
        }
        name = driver.CUdevice_attribute(attrib).name
        if name not in values:
            raise Refused("CUDA_ERROR_INVALID_VALUE")
        return values[name]

    @driver_function(1, needs="init")
    def cuDeviceTotalMem(self, dev: Any) -> int:
        self._device(dev)
        return self._memory.total_bytes

    @driver_function(1, needs="init")
    def cuDevicePrimaryCtxRetain(self, dev: Any) -> Any:
        device = self._device(dev)
        context = self._contexts.get(device)
        if context is None:
            if self._memory.free_bytes(device) < CONTEXT_BYTES:
                raise Refused("CUDA_ERROR_OUT_OF_MEMORY")
            self._memory.contexts[device] = CONTEXT_BYTES
            context = self._contexts[device] = Context(next(self._handles), device, 0)
        context.references += 1
        return driver.CUcontext(context.handle)

    @driver_function(needs="init")
    def cuDevicePrimaryCtxRelease(self, dev: Any) -> None:
        device = self._device(dev)
        if device not in self._contexts:
            raise self.violation(f"the context of device {device} was released more often than retained")
        context = self._contexts[device]
        if context.references == 1:
            self._finish_device(device)
            self._memory.contexts[device] = 0
            del self._contexts[device]
        context.references -= 1

    @driver_function(needs="init")
    def cuCtxSetCurrent(self, ctx: Any) -> None:
        known = {context.handle: context for context in self._contexts.values()}
        if number(ctx) and number(ctx) not in known:
            raise Refused("CUDA_ERROR_INVALID_CONTEXT")
        self._thread.context = known.get(number(ctx))

    @driver_function(1, needs="init")
    def cuCtxGetCurrent(self) -> Any:
        context = getattr(self._thread, "context", None)
        return driver.CUcontext(context.handle if context else 0)

    @driver_function(unsafe=True)
    def cuCtxSynchronize(self) -> None:
        self._finish_device(self._check_context().device)

    def _device(self, ordinal: Any) -> int:
        if not 0 <= number(ordinal) < self._devices:
            raise Refused("CUDA_ERROR_INVALID_DEVICE")
        return number(ordinal)
