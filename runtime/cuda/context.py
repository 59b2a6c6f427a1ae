"""One GPU's primary context, made current for every call, and a count of the memory that is allocated in it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from svd_trt.engine.driver import Driver, Gpu
from svd_trt.errors import DeviceMemoryError
from svd_trt.runtime.closeable import Closeable, closed_error

__all__ = ["Context"]


class Context(Closeable):
    """The primary context of ``gpu``: shared with other libraries in this process that use the GPU, such as torch.

    Attributes:
        gpu: the GPU of the context.
        taken: bytes of device memory that this pipeline has allocated.
        budget: the most bytes that it may allocate; None for no limit.
    """

    def __init__(self, driver: Driver, gpu: Gpu) -> None:
        self.driver = driver
        self.gpu = gpu
        self.taken = 0
        self.budget: int | None = None
        # Frames that a caller drops are given back in its thread, which may be this one in the middle of a count.
        self._counting = threading.RLock()
        self._device = driver.call("cuDeviceGet", gpu.index)
        self._handle: Any = driver.call("cuDevicePrimaryCtxRetain", self._device, what=gpu.name)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current in this thread while the block runs, and then the previous one again.

        Raises:
            BackendError: the context is closed.
        """
        if self._handle is None:
            raise closed_error(self.gpu.name)
        before = self.driver.call("cuCtxGetCurrent")
        if int(before) == int(self._handle):
            yield
            return
        self.driver.call("cuCtxSetCurrent", self._handle)
        try:
            yield
        finally:
            self.driver.call("cuCtxSetCurrent", before)

    def call(self, name: str, *arguments: Any, what: str = "", nbytes: int | None = None) -> Any:
        """`Driver.call` in this context."""
        with self.current():
            return self.driver.call(name, *arguments, what=what, nbytes=nbytes)

    def owns(self, stream: Any) -> bool:
        """Whether ``stream``, a ``CUstream``, belongs to this context."""
        return int(self.call("cuStreamGetCtx", stream, what="the caller's stream")) == int(self._handle)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the GPU."""
        free, total = self.call("cuMemGetInfo")
        return int(free), int(total)

    def take(self, nbytes: int, what: str) -> None:
        """Count ``nbytes`` before they are allocated.

        Raises:
            DeviceMemoryError: the budget does not allow it.
        """
        with self._counting:
            if self.budget is not None and self.taken + nbytes > self.budget:
                left = max(self.budget - self.taken, 0)
                raise DeviceMemoryError("staying in the budget", what, nbytes, left, self.budget)
            self.taken += nbytes

    def give(self, nbytes: int) -> None:
        """Stop counting ``nbytes`` after they were freed."""
        with self._counting:
            self.taken -= nbytes

    def close(self) -> None:
        """Release the context. The driver keeps it while other libraries use it."""
        if self._handle is not None:
            self._handle = None
            self.driver.call("cuDevicePrimaryCtxRelease", self._device, what=self.gpu.name)
