"""Memory of the GPU and pinned memory of the host."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from svd_trt.runtime.closeable import Closeable
from svd_trt.runtime.cuda.context import Context
from svd_trt.runtime.device import Array, Buffer, HostBuffer

__all__ = ["CudaBuffer", "DeviceMemory", "PinnedBuffer", "as_cuda"]


class DeviceMemory(Closeable):
    """One allocation on the GPU; its address is aligned to 256 bytes and more.

    Raises:
        DeviceMemoryError: too little is free, or the budget does not allow it.
    """

    def __init__(self, context: Context, nbytes: int, what: str) -> None:
        self._context = context
        self.name = what
        self.nbytes = max(nbytes, 1)  # the driver refuses to allocate nothing
        context.take(self.nbytes, what)
        try:
            self._pointer: Any = context.call("cuMemAlloc", self.nbytes, what=what, nbytes=self.nbytes)
        except BaseException:
            context.give(self.nbytes)
            raise
        self.address = int(self._pointer)

    def close(self) -> None:
        """Free it. No work that uses it may be running."""
        if self._pointer is not None:
            pointer, self._pointer = self._pointer, None
            self._context.call("cuMemFree", pointer)
            self._context.give(self.nbytes)


class CudaBuffer(Buffer):
    """A tensor on the GPU: an allocation of its own, or rows of the allocation of another tensor."""

    def __init__(
        self, memory: DeviceMemory, offset: int, shape: Sequence[int], dtype: npt.DTypeLike, *, owns: bool
    ) -> None:
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)
        self.address = memory.address + offset
        self._memory = memory
        self._offset = offset
        self._owns = owns

    @classmethod
    def allocate(cls, context: Context, shape: Sequence[int], dtype: npt.DTypeLike, what: str) -> CudaBuffer:
        """Allocate memory for one tensor."""
        memory = DeviceMemory(context, math.prod(shape) * np.dtype(dtype).itemsize, what)
        return cls(memory, 0, shape, dtype, owns=True)

    @property
    def name(self) -> str:
        """Name of the tensor in error messages."""
        return self._memory.name

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> CudaBuffer:
        """Rows ``start`` to ``stop`` of the first axis, in place."""
        assert 0 <= start < stop <= self.shape[0]
        row = self.nbytes // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        return CudaBuffer(self._memory, self._offset + start * row, shape, self.dtype, owns=False)

    def close(self) -> None:
        """Free the allocation if this buffer made it."""
        if self._owns:
            self._memory.close()


class PinnedBuffer(HostBuffer):
    """A tensor in host memory that the system may not move, so that copies run beside other work."""

    def __init__(self, context: Context, shape: Sequence[int], dtype: npt.DTypeLike, what: str) -> None:
        nbytes = max(math.prod(shape) * np.dtype(dtype).itemsize, 1)
        self._context = context
        self._pointer: Any = context.call("cuMemHostAlloc", nbytes, 0, what=f"{what} (pinned)", nbytes=nbytes)
        self.address = int(self._pointer)
        self.nbytes = nbytes
        content = (ctypes.c_ubyte * nbytes).from_address(self.address)
        self.array: Array = np.frombuffer(memoryview(content), dtype, count=math.prod(shape)).reshape(shape)

    def close(self) -> None:
        """Free it. No copy may be running, and ``array`` must not be used afterwards."""
        if self._pointer is not None:
            pointer, self._pointer = self._pointer, None
            self._context.call("cuMemFreeHost", pointer)


def as_cuda(buffer: Buffer) -> CudaBuffer:
    """Narrow the type of a buffer that a `CudaDevice` made."""
    assert isinstance(buffer, CudaBuffer)
    return buffer
