"""Networks as TensorRT engines."""

from __future__ import annotations

import mmap
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.driver import Gpu
from svd_trt.engine.memory import streaming_buffers
from svd_trt.engine.rebuild import rebuild_command
from svd_trt.engine.spec import NetworkName, NetworkSpec
from svd_trt.engine.tensorrt_import import TensorRt
from svd_trt.runtime.closeable import closed_error
from svd_trt.runtime.cuda.buffers import CudaBuffer, as_cuda
from svd_trt.runtime.cuda.cuda_device import CudaDevice, CudaGraph, GpuBackend
from svd_trt.runtime.cuda.misfit import refuse_invalid
from svd_trt.runtime.cuda.tensorrt_context import EngineContext
from svd_trt.runtime.cuda.tensorrt_errors import Errors
from svd_trt.runtime.cuda.tensorrt_runtime import Runtime, RuntimeCache, make_runtime
from svd_trt.runtime.device import Buffer, Session
from svd_trt.runtime.layer_times import LayerTimes, add_layer_time

__all__ = ["TensorRtBackend", "TensorRtSession"]

_DAMAGED = re.compile(r"\bSerialization\b|magicTag")  # what another build mends
_TRIES = 4  # to set a budget that TensorRT rounds


class TensorRtBackend(GpuBackend):
    """Runs plans, for both TensorRTs. The GPU's context must be current when the backend is made.

    Raises:
        BackendError: the runtime says that the bundle's engines cannot run on ``gpu``.
    """

    uses_block = True
    reports_layers = True

    def __init__(self, tensorrt: TensorRt, gpu: Gpu, bundle: Bundle) -> None:
        self._tensorrt = tensorrt
        self._runtime: Runtime | None = make_runtime(tensorrt)
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
    """One engine and its execution contexts, which compute in the device's block one after another.

    A context keeps its profile. Each run in a CUDA graph has a context of its own, because a graph goes on using what
    its context had when it was captured; nothing about such a context changes as long as the graph lives. Other runs
    borrow a context that is free.
    """

    def __init__(
        self, device: CudaDevice, runtime: Runtime, bundle: Bundle, network: NetworkName, streamed_bytes: int
    ) -> None:
        entry = bundle.network(network)
        assert entry.plan is not None, "refuse_misfit checks it"
        self.spec: NetworkSpec = entry.spec
        inputs, profiles = self.spec.inputs, entry.plan.profiles
        self._limits = [{t.name: self.spec.profile(t, profile.ranges) for t in inputs} for profile in profiles]
        self._device = device
        self._runtime = runtime
        self._errors = Errors(runtime.trt)
        self._weight_bytes = entry.plan.weight_bytes or 0
        self._taken = max(self._weight_bytes - streamed_bytes, 0)
        self._streams = False
        self._engine: Any = None
        self._configs: dict[bool, Any] = {}
        self._free: defaultdict[tuple[int, bool], list[EngineContext]] = defaultdict(list)
        self._in_graphs: dict[CudaGraph, _InGraph] = {}
        self._cache: RuntimeCache | None = None
        device.context.take(self._taken, f"the weights of {network}")
        try:
            self._engine = self._deserialize(bundle)
            self._stream_weights(streamed_bytes)
            self._cache = runtime.cache(entry.plan.key, device.context.gpu)
        except BaseException:
            self.close()
            raise

    def enqueue(self, tensors: Mapping[str, Buffer]) -> None:
        """Run once on the compute stream. See `svd_trt.runtime.device.Session.enqueue`."""
        if self._engine is None:
            raise closed_error(self.spec.name)
        buffers = {tensor.name: as_cuda(tensors[tensor.name]) for tensor in self.spec.tensors}
        profile = self._choose_profile({tensor.name: buffers[tensor.name].shape for tensor in self.spec.inputs})
        graph, stream = self._device.graph, self._device.compute.handle
        with self._device.context.current():
            if graph is not None:
                self._run_in_graph(graph, profile, buffers, stream)
                return
            context = self._borrow(profile, own_graphs=False)
            try:
                context.run(buffers, stream)
            finally:
                self._give_back(context)

    def profile_bytes(self) -> tuple[int, ...]:
        """Ask the engine."""
        streaming = int(self._engine.weight_streaming_scratch_memory_size) if self._streams else 0
        planned = min(streaming, streaming_buffers(self._weight_bytes))
        return tuple(self._bytes_of(profile) - planned for profile in range(len(self._limits)))

    def save(self) -> None:
        """Write the kernels that were compiled for this GPU to the user's cache."""
        if self._cache is not None and self._engine is not None:
            with self._device.context.current():
                self._cache.save()

    def close(self) -> None:
        """Release the engine after its last run."""
        if self._taken < 0:
            return
        taken, self._taken = self._taken, -1
        with self._device.context.current():
            try:
                if self._engine is not None:
                    self._device.drop_graphs()
                    self._device.synchronize()
                    if self._cache is not None:
                        self._cache.save()
            finally:
                for graph in list(self._in_graphs):
                    graph.forget(self)
                    self._release_graph(graph)
                # First, because a context must not outlive its engine or its cache.
                for context in chain.from_iterable(self._free.values()):
                    context.close()
                self._free.clear()
                self._configs.clear()
                if self._cache is not None:
                    self._cache.close()
                self._engine = None
                self._device.context.give(taken)

    def _run_in_graph(self, graph: CudaGraph, profile: int, buffers: Mapping[str, CudaBuffer], stream: int) -> None:
        """Run in the context that this place in the graph keeps.

        The first run of a graph is not captured. After it, with the shapes and in the state that would be captured,
        TensorRT is asked whether the context can be.
        """
        if graph not in self._in_graphs:
            self._in_graphs[graph] = _InGraph()
            graph.when_closed(self, lambda: self._release_graph(graph))
        kept, place = self._in_graphs[graph], graph.next_place()
        context = kept.contexts.get(place)
        if context is None or (context.profile, context.own_graphs) != (profile, kept.own_graphs):
            if context is not None:
                self._give_back(kept.contexts.pop(place))
            context = kept.contexts[place] = self._borrow(profile, own_graphs=kept.own_graphs)
        context.run(buffers, stream)
        if graph.capturing or kept.own_graphs or not self._device.use_graphs:
            return
        if not self._runtime.capturable(context, stream):
            # TensorRT captures again if an address changes; those of this context do not. With streamed weights,
            # their copies would be captured too.
            kept.own_graphs = self._runtime.captures_itself and not self._streams
            if kept.own_graphs:
                graph.leave_to_backend(f"TensorRT for RTX makes the CUDA graphs of {self.spec.name} itself")
            else:
                graph.refuse(f"TensorRT does not let {self.spec.name} be captured")

    def _release_graph(self, graph: CudaGraph) -> None:
        kept = self._in_graphs.pop(graph, None)
        for context in kept.contexts.values() if kept else ():
            self._give_back(context)

    def _borrow(self, profile: int, *, own_graphs: bool) -> EngineContext:
        free = self._free[profile, own_graphs]
        return free.pop() if free else self._make_context(profile, own_graphs=own_graphs)

    def _give_back(self, context: EngineContext) -> None:
        """Let other runs have ``context``, without waiting: they are on the same stream, so after its last run."""
        self._free[context.profile, context.own_graphs].append(context)

    def _choose_profile(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The index of the first profile that holds ``shapes``; the last one, which is the widest, refuses others."""
        for index, limits in enumerate(self._limits):
            if all(_within(shapes[name], low, high) for name, (low, _, high) in limits.items()):
                return index
        return len(self._limits) - 1

    def _deserialize(self, bundle: Bundle) -> Any:
        path = bundle.plan_path(self.spec.name)
        assert path is not None
        errors = self._runtime.errors
        errors.clear()
        # Mapped and not read: the engine copies what it needs, so the whole plan is never in this process's memory.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            view = memoryview(plan)
            try:
                engine = self._runtime.handle.deserialize_cuda_engine(view)
            finally:
                view.release()
        if engine is None:
            what = f"the weights of {self.spec.name}"
            message = f"TensorRT cannot load {path}: {errors.reason}"
            if _DAMAGED.search(errors.reason):
                message += f"; build it again: {rebuild_command(bundle.manifest, bundle.path)}"
            raise errors.failure(self._device.context, "loading an engine", message, what, self._taken)
        self._errors.attach(engine)
        return engine

    def _stream_weights(self, streamed_bytes: int) -> None:
        """Make TensorRT keep ``streamed_bytes`` of the weights in host memory. Call it before there is a context.

        TensorRT may round the budget, or take another one. What it says then is what counts.
        """
        streamable = int(self._engine.streamable_weights_size)
        resident = streamable
        if streamable:
            wanted = ask = max(streamable - streamed_bytes, 0)
            for _ in range(_TRIES):
                self._errors.clear()
                self._engine.weight_streaming_budget_v2 = ask
                if self._errors.recorded:  # the setter returns nothing, and keeps the old budget if it fails
                    message = f"TensorRT does not stream weights of {self.spec.name}: {self._errors.reason}"
                    what = f"the weights of {self.spec.name}"
                    raise self._errors.failure(self._device.context, "streaming weights", message, what)
                resident = int(self._engine.weight_streaming_budget_v2)
                if resident <= wanted or ask == 0:
                    break
                ask = max(ask - (resident - wanted), 0)
        self._streams = resident < streamable
        taken = max(self._weight_bytes - (streamable - resident), 0)
        if taken > self._taken:
            self._device.context.take(taken - self._taken, f"the weights of {self.spec.name}")
        else:
            self._device.context.give(self._taken - taken)
        self._taken = taken

    def _bytes_of(self, profile: int) -> int:
        return int(self._engine.get_device_memory_size_for_profile_v2(profile))

    def _make_context(self, profile: int, *, own_graphs: bool) -> EngineContext:
        if own_graphs not in self._configs:
            config = self._runtime.configure(self._engine, self._cache, own_graphs=own_graphs)
            self._configs[own_graphs] = config
        self._errors.clear()
        handle = self._engine.create_execution_context(self._configs[own_graphs])
        if handle is None:
            message = f"TensorRT makes no context for {self.spec.name}: {self._errors.reason}"
            raise self._errors.failure(self._device.context, "making a context", message, self.spec.name)
        if self._device.layer_times is not None:
            # While a profiler is set, `execute_async_v3` waits for the run and reports its layers.
            handle.profiler = _profiler(self._runtime.trt, self.spec.name, self._device.layer_times)
        return EngineContext(
            handle,
            self._device,
            self.spec,
            self._errors,
            profile=profile,
            profile_bytes=self._bytes_of(profile),
            own_graphs=own_graphs,
        )


@dataclass
class _InGraph:
    """The contexts of the runs in one graph, by place; ``own_graphs``: TensorRT captures them itself."""

    contexts: dict[int, EngineContext] = field(default_factory=dict)
    own_graphs: bool = False


def _within(shape: tuple[int, ...], low: tuple[int, ...], high: tuple[int, ...]) -> bool:
    return len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))


def _profiler(trt: Any, network: NetworkName, times: LayerTimes) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc]  # the base class comes from a module found at run time
        """Adds what TensorRT reports after each run to ``times``."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            add_layer_time(times, network, layer_name, float(ms))

    return Profiler()
