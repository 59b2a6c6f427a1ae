"""The CUDA driver through cuda-python: every call checked, and the GPUs of this machine.

It uses the low-level bindings rather than ``cuda.core``: on a machine without a GPU a stand-in can replace their
functions one by one, and they are the same in CUDA 12 and 13.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from svd_trt.errors import CudaError, DeviceMemoryError, MissingDependencyError, NoGpuError

__all__ = ["Driver", "Gpu", "gpu_count", "list_gpus", "load_driver", "select_gpu"]

_NO_GPU = ("CUDA_ERROR_NO_DEVICE", "CUDA_ERROR_STUB_LIBRARY")
_MISMATCH = "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"


class Driver:
    """``cuda.bindings.driver`` with every return checked."""

    def __init__(self, bindings: Any) -> None:
        self.bindings = bindings

    def call(self, name: str, *arguments: Any, what: str = "", nbytes: int | None = None) -> Any:
        """Call the driver's function ``name`` and return its results without the status: one, or a tuple of several.

        Args:
            name: such as ``cuMemAlloc``.
            arguments: of the function.
            what: the tensor or object that the call is for, for the error's message.
            nbytes: the size of ``what``, for the message.

        Raises:
            DeviceMemoryError: the GPU has too little free memory.
            CudaError: any other status than success.
        """
        status, *results = getattr(self.bindings, name)(*arguments)
        if status != self.bindings.CUresult.CUDA_SUCCESS:
            raise self._error(name, status, what, nbytes)
        return results[0] if len(results) == 1 else tuple(results)

    def _error(self, name: str, status: Any, what: str, nbytes: int | None) -> CudaError:
        result = self.bindings.CUresult
        if status == result.CUDA_ERROR_OUT_OF_MEMORY:
            known, free, total = self.bindings.cuMemGetInfo()
            known = known == result.CUDA_SUCCESS
            return DeviceMemoryError(name, what, nbytes, int(free) if known else None, int(total) if known else None)
        _, text = self.bindings.cuGetErrorString(status)
        reason = text.decode() if isinstance(text, bytes) else str(text)
        return CudaError(name, what, nbytes, getattr(status, "name", str(status)), reason)


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU, as the driver describes it."""

    index: int
    name: str
    capability: tuple[int, int]
    total_bytes: int
    driver_version: int
    """Newest CUDA that the driver supports, as 13000 for 13.0."""

    @property
    def sm(self) -> str:
        """Compute capability as ``sm90``."""
        return "sm{}{}".format(*self.capability)


def load_driver() -> Driver:
    """Load and initialise the driver.

    Raises:
        MissingDependencyError: cuda-python is not installed.
        NoGpuError: there is no NVIDIA driver, or it reports no GPU.
        CudaError: there is a driver and it does not work.
    """
    try:
        bindings = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise MissingDependencyError("running on a GPU", "gpu") from error
    driver = Driver(bindings)
    try:
        driver.call("cuInit", 0)
    except RuntimeError as error:  # raised by cuda-python if libcuda is missing
        raise NoGpuError("there is no NVIDIA driver on this machine (libcuda is missing)") from error
    except CudaError as error:
        if error.status in _NO_GPU:
            raise NoGpuError(f"the NVIDIA driver shows no GPU ({error.status})") from error
        if error.status == _MISMATCH:  # there is a GPU, and the CPU would take hours for a video
            reason = "the NVIDIA driver was updated while its old kernel module is still loaded; restart the machine"
            raise CudaError("cuInit", "", None, _MISMATCH, reason) from error
        raise
    return driver


def gpu_count() -> int:
    """Number of NVIDIA GPUs that the driver reports; 0 without a driver or without cuda-python.

    Raises:
        CudaError: there is a driver and it does not work.
    """
    try:
        return int(load_driver().call("cuDeviceGetCount"))
    except (NoGpuError, MissingDependencyError):
        return 0


def list_gpus(driver: Driver) -> list[Gpu]:
    """Every GPU that the driver reports, without creating a context."""
    return [_describe(driver, index) for index in range(driver.call("cuDeviceGetCount"))]


def select_gpu(driver: Driver, index: int) -> None:
    """Make a GPU the current one of this thread, for libraries that use the current one; for the whole process's life.

    Raises:
        CudaError: the GPU cannot be used.
    """
    driver.call("cuCtxSetCurrent", driver.call("cuDevicePrimaryCtxRetain", driver.call("cuDeviceGet", index)))


def _describe(driver: Driver, index: int) -> Gpu:
    handle = driver.call("cuDeviceGet", index)
    names = driver.bindings.CUdevice_attribute
    major, minor = (
        int(driver.call("cuDeviceGetAttribute", attribute, handle))
        for attribute in (
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return Gpu(
        index=index,
        name=driver.call("cuDeviceGetName", 256, handle).split(b"\0")[0].decode(),
        capability=(major, minor),
        total_bytes=int(driver.call("cuDeviceTotalMem", handle)),
        driver_version=int(driver.call("cuDriverGetVersion")),
    )
