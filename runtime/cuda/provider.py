"""Networks in ONNX Runtime's GPU providers, for machines without TensorRT and bundles without engines."""

from __future__ import annotations

import contextlib
import ctypes
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import onnxruntime

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.spec import NetworkName, NetworkSpec
from svd_trt.errors import BackendError, first_line
from svd_trt.runtime.closeable import closed_error
from svd_trt.runtime.cpu_device import load_onnx, run_bound
from svd_trt.runtime.cuda.buffers import CudaBuffer, as_cuda
from svd_trt.runtime.cuda.cuda_device import CudaDevice, GpuBackend
from svd_trt.runtime.device import Buffer, Session

__all__ = ["OPTIONS", "GpuProvider", "OrtBackend", "OrtSession"]

GpuProvider: TypeAlias = Literal["cuda", "tensorrt"]

_PROVIDERS: dict[str, str] = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}

OPTIONS: dict[str, dict[str, str]] = {
    _PROVIDERS["cuda"]: {
        # On by default, it rounds the factors of products of fp32 to 10 bits, and fp32 is asked for to be exact.
        "use_tf32": "0",
        # ONNX Runtime's defaults for these three ran out of the 80 GB of an H100 in a video of full size.
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "cudnn_conv_use_max_workspace": "0",
    },
    _PROVIDERS["tensorrt"]: {},
}
"""Of each provider, by its name."""


class OrtBackend(GpuBackend):
    """Runs ONNX graphs.

    Raises:
        BackendError: the installed onnxruntime does not have the provider.
    """

    def __init__(self, provider: GpuProvider) -> None:
        self._providers = [_PROVIDERS["tensorrt"]] if provider == "tensorrt" else []
        self._providers.append(_PROVIDERS["cuda"])
        missing = [name for name in self._providers if name not in onnxruntime.get_available_providers()]
        if missing:
            raise BackendError(
                f"the installed onnxruntime has no {missing[0]}; "
                "replace it: pip uninstall onnxruntime && pip install onnxruntime-gpu"
            )
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find, and the system may have it
            onnxruntime.preload_dlls()  # finds the libraries of CUDA in pip's packages

    @property
    def name(self) -> str:
        return f"onnxruntime {onnxruntime.__version__} {self._providers[0]}"

    def load(self, device: CudaDevice, bundle: Bundle, network: NetworkName, streamed_bytes: int) -> OrtSession:
        """Load the ONNX form of one network."""
        del streamed_bytes  # ONNX Runtime does not stream weights
        options = {"device_id": str(device.context.gpu.index), "user_compute_stream": str(device.compute.handle)}
        session = load_onnx(bundle, network, self._providers, [options | OPTIONS[name] for name in self._providers])
        used = session.get_providers()[0]
        if used != self._providers[0]:  # ONNX Runtime only logs that a library is missing, and uses the next provider
            raise BackendError(
                f"onnxruntime cannot use its {self._providers[0]} here and takes {used}: "
                f"{_obstacle(self._providers[0])}; install the libraries of CUDA, cuDNN or TensorRT that it needs, the "
                "first two by pip install 'onnxruntime-gpu[cuda,cudnn]'"
            )
        return OrtSession(device, bundle.network(network).spec, session)


def _obstacle(provider: str) -> str:
    """Why a provider cannot be used, which ONNX Runtime only logs."""
    name = f"libonnxruntime_providers_{provider.removesuffix('ExecutionProvider').lower()}.so"
    try:
        ctypes.CDLL(str(Path(onnxruntime.__file__).with_name("capi") / name))
    except OSError as error:
        return first_line(error)
    return "its libraries are there"


class OrtSession(Session):
    """One network in ONNX Runtime, on the stream and the memory of the device."""

    memory = "cuda"

    def __init__(self, device: CudaDevice, spec: NetworkSpec, session: Any) -> None:
        self.spec = spec
        self._device = device
        self._session = session

    def enqueue(self, tensors: Mapping[str, Buffer]) -> None:
        """Run once. See `svd_trt.runtime.device.Session.enqueue`."""
        if self._session is None:
            raise closed_error(self.spec.name)
        if self._device.graph is not None:
            self._device.graph.refuse("ONNX Runtime allocates while it runs, so it cannot be captured")
        binding = self._session.io_binding()
        for tensor in self.spec.inputs:
            binding.bind_input(*self._bound(tensor.name, as_cuda(tensors[tensor.name])))
        for tensor in self.spec.outputs:
            binding.bind_output(*self._bound(tensor.name, as_cuda(tensors[tensor.name])))
        options = onnxruntime.RunOptions()
        # The order of the compute stream is sufficient.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        with self._device.context.current():
            run_bound(self._session, binding, options, self.spec.name)

    def close(self) -> None:
        """Release the network after its last run."""
        if self._session is not None:
            self._device.synchronize()
            self._session = None

    def _bound(self, name: str, buffer: CudaBuffer) -> tuple[Any, ...]:
        return name, self.memory, self._device.context.gpu.index, buffer.dtype.type, buffer.shape, buffer.address
