"""Networks as TensorRT engines."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.driver import Gpu
from svd_trt.engine.flavour import Flavour
from svd_trt.engine.spec import NetworkName, NetworkSpec
from svd_trt.errors import BackendError, DeviceMemoryError
from svd_trt.runtime._released import Released
from svd_trt.runtime.cuda.device import CudaDevice
from svd_trt.runtime.cuda.flavours import Runtime, make_runtime, refuse_misfit
from svd_trt.runtime.cuda.memory import CudaBuffer, as_cuda
from svd_trt.runtime.device import Buffer

__all__ = ["TensorRtEngine", "TensorRtSession"]


class TensorRtEngine(Released):
    """Loads plans. Implements `svd_trt.runtime.cuda.device.Engine` for both TensorRTs."""

    uses_block = True

    def __init__(self, flavour: Flavour) -> None:
        self._flavour = flavour
        self._runtime: Runtime | None = make_runtime(flavour, _logger(flavour.trt))

    @property
    def name(self) -> str:
        return f"{self._flavour.name} {self._flavour.version}"

    def refuse_misfit(self, gpu: Gpu, bundle: Bundle) -> None:
        """Check that the bundle's engines can run on ``gpu``, before anything is allocated on it.

        Raises:
            BackendError: they cannot; the message says why, and what builds them again.
        """
        assert self._runtime is not None, "the engine is closed"
        refuse_misfit(self._runtime, gpu, bundle)

    def load(self, device: CudaDevice, bundle: Bundle, network: NetworkName, streamed_bytes: int) -> TensorRtSession:
        """Load the plan of one network."""
        assert self._runtime is not None, "the engine is closed"
        return TensorRtSession(device, self._runtime, bundle, network, streamed_bytes)

    def close(self) -> None:
        """Let go of the runtime."""
        self._runtime = None


class TensorRtSession(Released):
    """One engine with one execution context. Implements `svd_trt.runtime.device.Session`.

    TensorRT is told of shapes and addresses only when they change, which in a loop is never.
    """

    def __init__(
        self, device: CudaDevice, runtime: Runtime, bundle: Bundle, network: NetworkName, streamed_bytes: int
    ) -> None:
        entry = bundle.network(network)
        assert entry.plan is not None, "refuse_misfit checks it"
        self.spec: NetworkSpec = entry.spec
        self._device = device
        self._runtime = runtime
        self._taken = max((entry.plan.weight_bytes or 0) - streamed_bytes, 0)
        self._engine: Any = None
        self._context: Any = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._needs = 0
        self._block_moves = -1
        self._own_graphs = False
        device.context.take(self._taken, f"the weights of {network}")
        try:
            self._engine = self._deserialize(bundle)
            self._stream_weights(streamed_bytes)
            self._cache = runtime.cache(entry.plan.key, device.context.gpu)
            self._context = self._make_context()
        except BaseException:
            self.close()
            raise

    def enqueue(self, tensors: Mapping[str, Buffer]) -> None:
        """Run once on the compute stream. See `svd_trt.runtime.device.Session.enqueue`."""
        if self._context is None:
            raise BackendError(f"{self.spec.name} was released; open the pipeline again")
        buffers = {tensor.name: as_cuda(tensors[tensor.name]) for tensor in self.spec.tensors}
        stream = self._device.compute.handle
        with self._device.context.current():
            self._set_shapes(buffers)
            self._set_addresses(buffers)
            if self._device.capturing and (self._own_graphs or not self._runtime.capturable(self._context, stream)):
                raise BackendError(f"TensorRT does not let {self.spec.name} be captured")
            if not self._context.execute_async_v3(stream):
                raise BackendError(f"TensorRT failed in {self.spec.name}: {self._reason()}")

    def cancel(self) -> None:
        """What is enqueued runs; it takes no longer than a step or a chunk."""

    def close(self) -> None:
        """Release the engine once it is not running."""
        if self._taken < 0:
            return
        taken, self._taken = self._taken, -1
        with self._device.context.current():
            try:
                if self._context is not None:
                    self._device.forget_recordings()
                    self._device.synchronize()
                    if self._cache is not None:
                        self._cache.save()
            finally:
                self._context = None
                self._engine = None  # last: a context must not outlive its engine
                self._device.context.give(taken)

    def _deserialize(self, bundle: Bundle) -> Any:
        name = self.spec.name
        path = bundle.plan_path(name)
        assert path is not None
        logger = _logger(self._runtime.trt)
        logger.errors.clear()
        # Mapped, not read: the engine copies what it needs, and the plan is never in our memory as a whole.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            view = memoryview(plan)
            try:
                engine = self._runtime.handle.deserialize_cuda_engine(view)
            finally:
                view.release()
        if engine is not None:
            return engine
        if any("memory" in message.lower() for message in logger.errors):
            free, total = self._device.context.memory()
            raise DeviceMemoryError("loading an engine", f"the weights of {name}", self._taken, free, total)
        raise BackendError(f"TensorRT cannot load {path}: {self._reason()}; run `svd-trt build` again")

    def _stream_weights(self, streamed_bytes: int) -> None:
        """Have TensorRT keep so many bytes of the weights in host memory; before there is a context."""
        streamable = int(self._engine.streamable_weights_size)
        if streamable:
            self._engine.weight_streaming_budget_v2 = max(streamable - streamed_bytes, 0)

    def _make_context(self) -> Any:
        context = self._engine.create_execution_context(self._configuration())
        if context is not None and not self._runtime.capturable(context, self._device.compute.handle):
            self._own_graphs = True
            context = None  # the old one first: two would need more memory
            context = self._engine.create_execution_context(self._configuration())
        if context is None:
            raise BackendError(f"TensorRT makes no context for {self.spec.name}: {self._reason()}")
        return context

    def _configuration(self) -> Any:
        return self._runtime.configure(self._engine, self._cache, own_graphs=self._own_graphs)

    def _set_shapes(self, buffers: Mapping[str, CudaBuffer]) -> None:
        shapes = {tensor.name: buffers[tensor.name].shape for tensor in self.spec.inputs}
        changed = shapes != self._shapes
        if changed:
            self._shapes = {}  # should one of them be refused, all are set again
            self._needs = self._accept(shapes, buffers)
            self._shapes = shapes
        block = self._device.activations
        block.reserve(self._needs, f"activations of {self.spec.name}")
        if self._needs and (changed or self._block_moves != block.moves):
            self._context.set_device_memory(block.address, block.nbytes)
            self._block_moves = block.moves

    def _accept(self, shapes: Mapping[str, tuple[int, ...]], buffers: Mapping[str, CudaBuffer]) -> int:
        """Set ``shapes`` of inputs; the bytes of activations that they need."""
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise BackendError(f"{self.spec.name} does not take {name} of shape {list(shape)}: {self._reason()}")
        self._check_outputs(buffers)
        return int(self._context.update_device_memory_size_for_shapes())

    def _check_outputs(self, buffers: Mapping[str, CudaBuffer]) -> None:
        missing = self._context.infer_shapes()
        if missing:
            raise BackendError(f"TensorRT does not know the shapes of {', '.join(missing)} in {self.spec.name}")
        for tensor in self.spec.outputs:
            given, wanted = buffers[tensor.name].shape, tuple(self._context.get_tensor_shape(tensor.name))
            if given != wanted:
                raise BackendError(f"{self.spec.name} gives {tensor.name} of shape {wanted}, not {given}")

    def _set_addresses(self, buffers: Mapping[str, CudaBuffer]) -> None:
        for name, buffer in buffers.items():
            if self._addresses.get(name) != buffer.address:
                if not self._context.set_tensor_address(name, buffer.address):
                    raise BackendError(f"{self.spec.name} does not take an address for {name}: {self._reason()}")
                self._addresses[name] = buffer.address

    def _reason(self) -> str:
        errors = _logger(self._runtime.trt).errors
        return errors[-1].strip() if errors else "it gives no reason"


@lru_cache
def _logger(trt: Any) -> Any:
    """One logger a process: TensorRT keeps the first that it is given and ignores the others."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class comes from a module found at run time
        """Keeps the latest errors, and prints nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
                del self.errors[:-20]

    return Logger()
