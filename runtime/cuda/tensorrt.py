"""Networks as TensorRT engines."""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.driver import Gpu
from svd_trt.engine.spec import NetworkName, NetworkSpec
from svd_trt.engine.tensorrt_import import TensorRt
from svd_trt.errors import BackendError, DeviceMemoryError, first_line
from svd_trt.runtime.closeable import closed_error
from svd_trt.runtime.cuda.buffers import CudaBuffer, as_cuda
from svd_trt.runtime.cuda.cuda_device import CudaDevice, GpuBackend
from svd_trt.runtime.cuda.tensorrt_runtime import Runtime, RuntimeCache, make_runtime, refuse_invalid
from svd_trt.runtime.device import Buffer, Session
from svd_trt.runtime.layer_times import LayerTimes, add_layer_time

__all__ = ["TensorRtBackend", "TensorRtSession"]


_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|amount of (gpu )?memory|insufficient (gpu )?memory", re.IGNORECASE)


class TensorRtBackend(GpuBackend):
    """Runs plans, for both TensorRTs. The GPU's context must be current when the backend is made.

    Raises:
        BackendError: the runtime says that the bundle's engines cannot run on ``gpu``.
    """

    uses_block = True
    reports_layers = True

    def __init__(self, tensorrt: TensorRt, gpu: Gpu, bundle: Bundle) -> None:
        self._tensorrt = tensorrt
        self._runtime: Runtime | None = make_runtime(tensorrt, _logger(tensorrt.trt))
        refuse_invalid(self._runtime, gpu, bundle)

    @property
    def name(self) -> str:
        return f"{self._tensorrt.name} {self._tensorrt.version}"

    def load(self, device: CudaDevice, bundle: Bundle, network: NetworkName, streamed_bytes: int) -> TensorRtSession:
        """Load the plan of one network."""
        assert self._runtime is not None, "the engine is closed"
        return TensorRtSession(device, self._runtime, bundle, network, streamed_bytes)

    def close(self) -> None:
        """Release the runtime."""
        self._runtime = None


class TensorRtSession(Session):
    """One engine with one execution context.

    Shapes and addresses are passed to TensorRT only when they change, which in a loop is never.
    """

    def __init__(
        self, device: CudaDevice, runtime: Runtime, bundle: Bundle, network: NetworkName, streamed_bytes: int
    ) -> None:
        entry = bundle.network(network)
        assert entry.plan is not None, "refuse_misfit checks it"
        self.spec: NetworkSpec = entry.spec
        self._device = device
        self._runtime = runtime
        self._profile = len(entry.plan.profiles) - 1  # the whole range
        self._taken = max((entry.plan.weight_bytes or 0) - streamed_bytes, 0)
        self._engine: Any = None
        self._context: Any = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._needs = 0
        self._block_moves = -1
        self._own_graphs = False
        self._wants_own_graphs = False
        self._cache: RuntimeCache | None = None
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
            raise closed_error(self.spec.name)
        buffers = {tensor.name: as_cuda(tensors[tensor.name]) for tensor in self.spec.tensors}
        stream = self._device.compute.handle
        with self._device.context.current():
            if self._wants_own_graphs and not self._own_graphs and not self._device.capturing:
                self._capture_itself()
            self._set_shapes(buffers)
            self._set_addresses(buffers)
            self._require_capturable(stream)
            if not self._context.execute_async_v3(stream):
                raise self._failure("running an engine", "TensorRT failed in {name}: {reason}")

    def close(self) -> None:
        """Release the engine after its last run."""
        if self._taken < 0:
            return
        taken, self._taken = self._taken, -1
        with self._device.context.current():
            try:
                if self._context is not None:
                    self._device.drop_graphs()
                    self._device.synchronize()
                    if self._cache is not None:
                        self._cache.save()
            finally:
                self._context = None  # first, because a context must not outlive its engine or its cache
                if self._cache is not None:
                    self._cache.close()
                self._engine = None
                self._device.context.give(taken)

    def _deserialize(self, bundle: Bundle) -> Any:
        path = bundle.plan_path(self.spec.name)
        assert path is not None
        _logger(self._runtime.trt).errors.clear()
        # Mapped and not read: the engine copies what it needs, so the whole plan is never in this process's memory.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            view = memoryview(plan)
            try:
                engine = self._runtime.handle.deserialize_cuda_engine(view)
            finally:
                view.release()
        if engine is None:
            message = f"TensorRT cannot load {path}: {{reason}}; run `svd-trt build` again"
            raise self._failure("loading an engine", message, "the weights of ", self._taken)
        return engine

    def _stream_weights(self, streamed_bytes: int) -> None:
        """Make TensorRT keep ``streamed_bytes`` of the weights in host memory. Call it before there is a context."""
        streamable = int(self._engine.streamable_weights_size)
        if streamable:
            wanted = max(streamable - streamed_bytes, 0)
            self._engine.weight_streaming_budget_v2 = wanted
            if int(self._engine.weight_streaming_budget_v2) != wanted:
                raise BackendError(f"TensorRT does not stream the weights of {self.spec.name}: {self._reason()}")
        more = streamed_bytes - min(streamed_bytes, streamable)  # bytes that cannot be streamed
        self._device.context.take(more, f"the weights of {self.spec.name}")
        self._taken += more

    def _make_context(self) -> Any:
        errors = _logger(self._runtime.trt).errors
        errors.clear()
        config = self._runtime.configure(self._engine, self._cache, own_graphs=self._own_graphs)
        context = self._engine.create_execution_context(config)
        if context is None:
            raise self._failure("making a context", "TensorRT makes no context for {name}: {reason}")
        if not context.set_optimization_profile_async(self._profile, self._device.compute.handle):
            raise self._failure("choosing a profile", "TensorRT has no profile for {name}: {reason}")
        if self._device.layer_times is not None:
            # While a profiler is set, `execute_async_v3` waits for the run and reports its layers.
            context.profiler = _profiler(self._runtime.trt, self.spec.name, self._device.layer_times)
        return context

    def _require_capturable(self, stream: int) -> None:
        """During a capture, refuse a context that cannot be captured. TensorRT captures its next run itself."""
        if not self._device.capturing:
            return
        if self._own_graphs or not self._runtime.capturable(self._context, stream):
            self._wants_own_graphs = True
            raise BackendError(f"TensorRT does not let {self.spec.name} be captured")

    def _capture_itself(self) -> None:
        """Make TensorRT for RTX capture graphs itself, which needs a new context."""
        self._device.synchronize()
        self._own_graphs = True
        self._context = None  # free the old one first, because two need more memory
        self._context = self._make_context()
        self._shapes, self._addresses, self._block_moves = {}, {}, -1

    def _set_shapes(self, buffers: Mapping[str, CudaBuffer]) -> None:
        shapes = {tensor.name: buffers[tensor.name].shape for tensor in self.spec.inputs}
        changed = shapes != self._shapes
        if changed:
            self._shapes = {}  # if one of them is refused, all are set again next time
            self._needs = self._accept(shapes, buffers)
            self._shapes = shapes
        block = self._device.activations
        block.reserve(self._needs, f"activations of {self.spec.name}")
        if self._needs and (changed or self._block_moves != block.moves):
            self._context.set_device_memory(block.address, block.nbytes)
            self._block_moves = block.moves

    def _accept(self, shapes: Mapping[str, tuple[int, ...]], buffers: Mapping[str, CudaBuffer]) -> int:
        """Set the shapes of the inputs; return the bytes of activations that they need."""
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise BackendError(f"{self.spec.name} does not take {name} of shape {list(shape)}: {self._reason()}")
        self._check_outputs(buffers)
        return int(self._context.update_device_memory_size_for_shapes())

    def _check_outputs(self, buffers: Mapping[str, CudaBuffer]) -> None:
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise BackendError(f"TensorRT cannot infer the shapes of {self.spec.name}: {first_line(error)}") from error
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

    def _failure(self, call: str, message: str, what: str = "", nbytes: int | None = None) -> BackendError:
        """Make the error of a call that failed from TensorRT's log: memory ran out, or ``message`` with the reason."""
        errors = _logger(self._runtime.trt).errors
        name = self.spec.name
        if any(_OUT_OF_MEMORY.search(line) for line in errors):
            free, total = self._device.context.memory()
            return DeviceMemoryError(call, f"{what}{name}", nbytes, free, total)
        return BackendError(message.format(name=name, reason=self._reason()))

    def _reason(self) -> str:
        errors = _logger(self._runtime.trt).errors
        return errors[-1].strip() if errors else "it gives no reason"


def _profiler(trt: Any, network: NetworkName, times: LayerTimes) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc]  # the base class comes from a module found at run time
        """Adds what TensorRT reports after each run to ``times``."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            add_layer_time(times, network, layer_name, float(ms))

    return Profiler()


@lru_cache
def _logger(trt: Any) -> Any:
    """Make the logger, one for each process: TensorRT keeps the first logger that it gets and ignores others."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class comes from a module found at run time
        """Keeps the latest errors and prints nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
                del self.errors[:-20]

    return Logger()
