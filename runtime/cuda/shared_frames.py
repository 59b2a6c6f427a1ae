"""Frames that stay on the GPU and belong to the caller: other libraries read them in place, through DLPack."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from svd_trt.runtime.cuda.buffers import CudaBuffer, PinnedBuffer
from svd_trt.runtime.cuda.context import Context
from svd_trt.runtime.cuda.dlpack import CUDA, HOST, make_capsule
from svd_trt.runtime.cuda.streams import Stream
from svd_trt.runtime.device import Array, SharedFrames

__all__ = ["CudaFrames", "DeviceArray"]


class CudaFrames(SharedFrames):
    """Memory for frames ``[n, H, W, 3]``, freed when the last array that shares it is gone, also after the pipeline.

    It keeps the GPU's context for itself, and counts in the pipeline's budget.

    Args:
        pipeline: the context of the pipeline.
        shape: of the frames.
        late: gets the memory if it must not be freed at once; see `free`.
        is_capturing: whether work is being captured now. The driver would end the capture if memory was freed.
    """

    buffer: CudaBuffer

    def __init__(self, pipeline: Context, shape: Sequence[int], late: deque[CudaFrames], is_capturing: Any) -> None:
        self._process = os.getpid()
        self._pipeline = pipeline
        self._late = late
        self._is_capturing = is_capturing
        self._nbytes = max(math.prod(shape), 1)
        name = "frames for the caller"
        pipeline.take(self._nbytes, name)
        try:
            self.context = Context(pipeline.driver, pipeline.gpu)
            try:
                self.buffer = CudaBuffer.allocate(self.context, shape, np.uint8, name)
            except BaseException:
                self.context.close()
                raise
        except BaseException:
            pipeline.give(self._nbytes)
            self._nbytes = 0
            raise

    def arrays(self) -> list[Any]:
        """One `DeviceArray` for each frame."""
        step = math.prod(self.buffer.shape[1:])
        return [DeviceArray(self, index * step, self.buffer.shape[1:]) for index in range(self.buffer.shape[0])]

    def free(self) -> None:
        """Free the memory after all work of the GPU, because the caller's work may still read it."""
        nbytes, self._nbytes = self._nbytes, 0
        if nbytes:
            self.context.call("cuCtxSynchronize")
            self.buffer.close()
            self.context.close()
            self._pipeline.give(nbytes)

    def __del__(self) -> None:
        if getattr(self, "_nbytes", 0) == 0 or os.getpid() != self._process:
            return
        if self._is_capturing():
            self._late.append(self)
            return
        with suppress(Exception):  # the interpreter may be exiting, and nobody could handle it
            self.free()


class DeviceArray:
    """One frame on a GPU, uint8 ``[H, W, 3]``, which `torch.from_dlpack` and the like read without a copy.

    It is finished when the caller gets it, so no stream has to wait for it. Its memory, that of its whole decode chunk,
    is freed when nothing refers to it any more. ``numpy.asarray`` copies it to the host.

    Attributes:
        shape: ``(H, W, 3)``.
        dtype: uint8.
    """

    def __init__(self, frames: CudaFrames, offset: int, shape: tuple[int, ...]) -> None:
        self._frames = frames
        self._offset = offset
        self.shape = shape
        self.dtype = np.dtype(np.uint8)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        address = self._frames.buffer.address + self._offset
        return {"shape": self.shape, "typestr": "|u1", "data": (address, False), "version": 3, "stream": None}

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self._frames.context.gpu.index

    def __dlpack__(
        self,
        *,
        stream: Any = None,  # the frame is finished, so no stream has to wait for it
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Share the frame; for ``dl_device=(1, 0)``, the host, share a copy.

        Raises:
            BufferError: another device is asked for, or a copy where there is none, or none where there must be one.
        """
        device = self.__dlpack_device__()
        if dl_device is not None and tuple(dl_device) == (HOST, 0) and copy is not False:
            host: Any = self.__array__()
            return host.__dlpack__(**({} if max_version is None else {"max_version": max_version}))
        if copy or (dl_device is not None and tuple(dl_device) != device):
            raise BufferError(f"the frame is on {device}; copy it with the library that reads it")
        return make_capsule(self._frames.buffer.address, self._offset, self.shape, device, owner=self)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("a frame on a GPU cannot be an array of numpy without a copy")
        context = self._frames.context
        nbytes = math.prod(self.shape)
        with Stream(context, "copy") as stream, PinnedBuffer(context, self.shape, np.uint8, "a frame") as host:
            address = self._frames.buffer.address + self._offset
            stream.copy_out(host.address, address, nbytes, "a frame")
            stream.synchronize()
            return host.array.astype(np.uint8 if dtype is None else dtype)

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype=uint8, device=cuda:{self._frames.context.gpu.index})"
