"""Networks in ONNX Runtime's GPU providers: what runs where TensorRT is not installed, or has no engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import onnxruntime

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.spec import NetworkName, NetworkSpec
from svd_trt.errors import BackendError
from svd_trt.runtime.closeable import Closeable, closed_error
from svd_trt.runtime.cuda.buffers import CudaBuffer, as_cuda
from svd_trt.runtime.cuda.cuda_device import CudaDevice
from svd_trt.runtime.device import Buffer
from svd_trt.runtime.ort import load_onnx, run_bound

__all__ = ["GpuProvider", "OrtEngine", "OrtSession"]

GpuProvider: TypeAlias = Literal["cuda", "tensorrt"]

_PROVIDERS: dict[str, str] = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


class OrtEngine(Closeable):
    """Loads ONNX graphs. Implements `svd_trt.runtime.cuda.cuda_device.Engine`.

    Raises:
        BackendError: the installed onnxruntime does not have the provider.
    """

    uses_block = False

    def __init__(self, provider: GpuProvider) -> None:
        self._providers = [_PROVIDERS["tensorrt"]] if provider == "tensorrt" else []
        self._providers.append(_PROVIDERS["cuda"])
        missing = [name for name in self._providers if name not in onnxruntime.get_available_providers()]
        if missing:
            raise BackendError(
                f"the installed onnxruntime has no {missing[0]}; "
                "replace it: pip uninstall onnxruntime && pip install onnxruntime-gpu"
            )

    @property
    def name(self) -> str:
        return f"onnxruntime {onnxruntime.__version__} {self._providers[0]}"

    def load(self, device: CudaDevice, bundle: Bundle, network: NetworkName, streamed_bytes: int) -> OrtSession:
        """Load the ONNX form of one network."""
        del streamed_bytes  # ONNX Runtime does not stream weights
        options = {"device_id": str(device.context.gpu.index), "user_compute_stream": str(device.compute.handle)}
        session = load_onnx(bundle, network, self._providers, [options] * len(self._providers))
        used = session.get_providers()[0]
        if used != self._providers[0]:  # it only logs that a library is missing, and takes the next
            raise BackendError(
                f"onnxruntime cannot use its {self._providers[0]} here and takes {used}; "
                "install the CUDA, cuDNN or TensorRT libraries that it names when it starts"
            )
        return OrtSession(device, bundle.network(network).spec, session)

    def close(self) -> None:
        """Nothing is shared."""


class OrtSession(Closeable):
    """One network in ONNX Runtime, on our stream and our memory. Implements `svd_trt.runtime.device.Session`."""

    memory = "cuda"

    def __init__(self, device: CudaDevice, spec: NetworkSpec, session: Any) -> None:
        self.spec = spec
        self._device = device
        self._session = session

    def enqueue(self, tensors: Mapping[str, Buffer]) -> None:
        """Run once. See `svd_trt.runtime.device.Session.enqueue`."""
        if self._session is None:
            raise closed_error(self.spec.name)
        if self._device.capturing:
            raise BackendError("ONNX Runtime allocates while it runs, so it cannot be captured")
        binding = self._session.io_binding()
        for tensor in self.spec.inputs:
            binding.bind_input(*self._bound(tensor.name, as_cuda(tensors[tensor.name])))
        for tensor in self.spec.outputs:
            binding.bind_output(*self._bound(tensor.name, as_cuda(tensors[tensor.name])))
        options = onnxruntime.RunOptions()
        # The work is on our stream, whose order is all that is needed.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        with self._device.context.current():
            run_bound(self._session, binding, options, self.spec.name)

    def cancel(self) -> None:
        """What is enqueued runs."""

    def close(self) -> None:
        """Release the network once it is not running."""
        if self._session is not None:
            self._device.synchronize()
            self._session = None

    def _bound(self, name: str, buffer: CudaBuffer) -> tuple[Any, ...]:
        return name, self.memory, self._device.context.gpu.index, buffer.dtype.type, buffer.shape, buffer.address
