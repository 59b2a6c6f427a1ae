"""ONNX Runtime on the CPU: the leaf that runs everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnxruntime

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.spec import NetworkName, NetworkSpec
from svd_trt.errors import BackendError, first_line
from svd_trt.runtime.device import Array, Buffer

__all__ = ["CpuBuffer", "CpuDevice", "CpuSession"]

_ERRORS_ONLY = 3  # onnxruntime's log level: its warnings speak of graph details that no user can act on


class CpuBuffer:
    """A numpy array."""

    def __init__(self, array: Array) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype


class CpuSession:
    """An ONNX network in ONNX Runtime; inputs and outputs are used in place."""

    def __init__(self, bundle: Bundle, network: NetworkName) -> None:
        self.spec: NetworkSpec = bundle.network(network).spec
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        path = bundle.onnx_path(network)
        try:
            self._session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BackendError(f"onnxruntime cannot load {path}: {first_line(error)}") from error
        # Runs in a thread so that Ctrl-C reaches Python while a network computes; a step can take minutes.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=network)

    def enqueue(self, tensors: Mapping[str, Buffer]) -> None:
        """Run once and wait. See `svd_trt.runtime.device.Session.enqueue`."""
        if self._session is None:
            raise BackendError(f"{self.spec.name} was released; open the pipeline again")
        binding = self._session.io_binding()
        for tensor in self.spec.inputs:
            binding.bind_input(*_bound(tensor.name, tensors[tensor.name]))
        for tensor in self.spec.outputs:
            binding.bind_output(*_bound(tensor.name, tensors[tensor.name]))
        options = onnxruntime.RunOptions()
        future = self._thread.submit(self._session.run_with_iobinding, binding, options)
        try:
            future.result()
        except (KeyboardInterrupt, SystemExit):
            options.terminate = True
            future.exception()
            raise
        except Exception as error:
            raise BackendError(f"onnxruntime failed in {self.spec.name}: {first_line(error)}") from error

    def close(self) -> None:
        """Release the network."""
        self._thread.shutdown()
        self._session = None


class CpuDevice:
    """The CPU, through ONNX Runtime. Implements `svd_trt.runtime.device.Device`."""

    name = "onnxruntime (CPU)"

    def open(self, bundle: Bundle, network: NetworkName) -> CpuSession:
        """Load the ONNX form of one network."""
        return CpuSession(bundle, network)

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> CpuBuffer:
        """A new array."""
        return CpuBuffer(np.empty(tuple(shape), dtype))

    def upload(self, array: Array) -> CpuBuffer:
        """A contiguous copy, so that later changes to ``array`` are not seen."""
        return CpuBuffer(np.array(array, order="C"))

    def upload_rows(self, table: Array) -> Sequence[CpuBuffer]:
        """Views of one copy."""
        return [CpuBuffer(row) for row in np.array(table, order="C")]

    def download(self, buffer: Buffer) -> Array:
        """A copy."""
        assert isinstance(buffer, CpuBuffer)
        return buffer.array.copy()

    def close(self) -> None:
        """Nothing to release: arrays go with their last reference."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _bound(name: str, buffer: Buffer) -> tuple[Any, ...]:
    """Arguments of bind_input and bind_output for memory that is used in place."""
    assert isinstance(buffer, CpuBuffer)
    array = buffer.array
    assert array.flags.c_contiguous
    return name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
