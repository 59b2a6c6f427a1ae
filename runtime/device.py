"""What the loop needs of a device: buffers, copies, and networks that run on them.

The pipeline is written once over these protocols. A leaf implements them for one kind of device; `runtime.ort` is
ONNX Runtime on the CPU. On a device with streams every call but `Device.download` may return before the work is
done; calls take effect in the order they were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.spec import NetworkName, NetworkSpec

__all__ = ["Array", "Buffer", "Device", "Session"]

Array = npt.NDArray[Any]


class Buffer(Protocol):
    """Memory on the device that holds one tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...


class Session(Protocol):
    """One network, loaded and ready to run."""

    @property
    def spec(self) -> NetworkSpec: ...

    def enqueue(self, tensors: Mapping[str, Buffer]) -> None:
        """Run once: ``tensors`` names a buffer for every input and output. No memory is allocated."""

    def close(self) -> None:
        """Release the network; harmless when repeated."""


class Device(Protocol):
    """A place where networks run."""

    @property
    def name(self) -> str:
        """For people: ``onnxruntime (CPU)``."""

    def open(self, bundle: Bundle, network: NetworkName) -> Session:
        """Load one network of a bundle.

        Raises:
            BackendError: this device cannot run it.
        """

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Buffer:
        """Allocate a buffer with undefined content."""

    def upload(self, array: Array) -> Buffer:
        """A new buffer with the content of ``array``."""

    def upload_rows(self, table: Array) -> Sequence[Buffer]:
        """One buffer for each row of ``table``, in one copy, each aligned as the device wants its inputs."""

    def download(self, buffer: Buffer) -> Array:
        """A host copy of ``buffer``; waits for the work that fills it."""

    def close(self) -> None:
        """Release everything that was allocated here; harmless when repeated."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
