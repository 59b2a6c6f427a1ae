"""Engines of the stand-in: their device memory, the configuration of contexts, and the runtime cache."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from typing import Any

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.memory import activation_bytes
from svd_trt.engine.spec import NetworkName, TensorSpec
from tests.standin.clock import Range
from tests.standin.cuda import StandInCuda
from tests.standin.rtx import real

__all__ = ["IRuntimeCache", "IRuntimeConfig", "Module", "Plan", "RtxRuntimeConfig", "take"]

_ALIGNMENT = 256
_STREAMED_AT_ONCE = 16  # one in so many weights is staged on the device while others are used


class Module:
    """State that all objects of one stand-in share."""

    __version__: str

    def __init__(self, cuda: StandInCuda, bundle: Bundle, *, rtx: bool) -> None:
        self.cuda = cuda
        self.bundle = bundle
        self.rtx = rtx
        self.refuse_capturable = False
        self.compiled: list[str] = []
        self.executions: list[str] = []


def take(owner: object, cuda: StandInCuda, nbytes: int) -> Range | None:
    """Allocate device memory that is freed when ``owner`` is garbage-collected. None if the device is full."""
    allocation = cuda.reserve(nbytes)
    if allocation is None:
        return None
    weakref.finalize(owner, cuda.free_later, allocation).atexit = False
    return allocation.address, nbytes


class Plan:
    """A deserialized plan. An engine and its contexts refer to it."""

    def __init__(self, module: Module, logger: Any, network: NetworkName) -> None:
        self.module = module
        self.cuda = module.cuda
        self.logger = logger
        self.entry = module.bundle.network(network)
        self.spec = self.entry.spec
        assert self.entry.plan is not None
        self.profile_count = len(self.entry.plan.profiles)
        self.weight_bytes = self.entry.plan.weight_bytes or self.entry.plan.file.size
        # Not all weights can be streamed, which catches code that takes all weights for the streamable part.
        can_stream = getattr(self.entry.plan, "weight_streaming", False)
        self.streamable_bytes = self.weight_bytes * 15 // 16 if can_stream else 0
        self.budget = self.streamable_bytes
        self.contexts: weakref.WeakSet[Any] = weakref.WeakSet()
        self.ranges: list[Range] = []  # of the weights on the device
        self._streamed_loaded = False

    def load(self) -> bool:
        """Load the weights that cannot be streamed."""
        if not self.cuda.has_context():
            self.error("no CUDA context is current in this thread")
            return False
        return self._take(self.weight_bytes - self.streamable_bytes)

    def load_streamed(self) -> bool:
        """Load as many of the other weights as the budget allows. The first context does this."""
        if self._streamed_loaded or not self.budget:
            return True
        self._streamed_loaded = self._take(self.budget)
        return self._streamed_loaded

    def tensor(self, name: str) -> TensorSpec | None:
        try:
            return self.spec.tensor(name)
        except KeyError:
            self.error(f"{self.spec.name} has no tensor {name}")
            return None

    def error(self, message: str) -> None:
        self.logger.log(real.ILogger.ERROR, message)

    @property
    def scratch_bytes(self) -> int:
        """The memory that a context needs to stage streamed weights."""
        return _aligned(self.weight_bytes // _STREAMED_AT_ONCE) if self.budget < self.streamable_bytes else 0

    def activation_bytes(self, sizes: Mapping[str, int]) -> int:
        """The memory that a context needs at these sizes. Symbols without a size count at their largest."""
        return _aligned(activation_bytes(self.entry, sizes) or 0) + self.scratch_bytes

    def _take(self, nbytes: int) -> bool:
        taken = take(self, self.cuda, nbytes)
        if taken is None:
            self.error(f"Error Code 2: OutOfMemory (Requested size was {nbytes} bytes: out of memory.)")
            return False
        self.ranges.append(taken)
        return True


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class IRuntimeConfig:
    """The configuration of plain TensorRT. It has slots, so that names of RTX alone cannot be set."""

    __slots__ = ("_module", "_strategy")

    def __init__(self, module: Module) -> None:
        self._module = module
        self._strategy = real.ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(
        self, strategy: Any = real.ExecutionContextAllocationStrategy.STATIC
    ) -> None:
        self._strategy = real.ExecutionContextAllocationStrategy(strategy)

    def get_execution_context_allocation_strategy(self) -> Any:
        return self._strategy


class RtxRuntimeConfig(IRuntimeConfig):
    __slots__ = ("_cache", "_graphs", "_kernels")

    def __init__(self, module: Module) -> None:
        super().__init__(module)
        self._graphs = real.CudaGraphStrategy.DISABLED
        self._kernels = real.DynamicShapesKernelSpecializationStrategy.LAZY
        self._cache: IRuntimeCache | None = None

    @property
    def cuda_graph_strategy(self) -> Any:
        return self._graphs

    @cuda_graph_strategy.setter
    def cuda_graph_strategy(self, strategy: Any) -> None:
        if not isinstance(strategy, real.CudaGraphStrategy):
            raise TypeError("cuda_graph_strategy takes a CudaGraphStrategy")
        self._graphs = strategy

    @property
    def dynamic_shapes_kernel_specialization_strategy(self) -> Any:
        return self._kernels

    @dynamic_shapes_kernel_specialization_strategy.setter
    def dynamic_shapes_kernel_specialization_strategy(self, strategy: Any) -> None:
        if not isinstance(strategy, real.DynamicShapesKernelSpecializationStrategy):
            raise TypeError("the property takes a DynamicShapesKernelSpecializationStrategy")
        self._kernels = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache(self._module)

    def set_runtime_cache(self, cache: IRuntimeCache | None = None) -> bool:
        self._cache = cache
        return True

    def get_runtime_cache(self) -> IRuntimeCache | None:
        return self._cache


class IRuntimeCache:
    """The compiled kernels, here only their names."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._kernels: set[str] = set()

    def serialize(self) -> memoryview:
        """The cache as a buffer, like the host memory of the real class."""
        return memoryview(json.dumps({"made by": self._environment(), "kernels": sorted(self._kernels)}).encode())

    def deserialize(self, blob: Any) -> bool:
        """Load a buffer of `serialize`. False if it is from another version or kind of GPU, or damaged."""
        try:
            content = json.loads(bytes(memoryview(blob)))
            if content["made by"] != self._environment() or not self._module.cuda.has_context():
                return False
            self._kernels = set(content["kernels"])
        except (ValueError, LookupError, TypeError):
            return False
        return True

    def reset(self) -> bool:
        self._kernels.clear()
        return True

    def _compile(self, kernel: str) -> bool:
        """Add a kernel. False if the cache had it."""
        new = kernel not in self._kernels
        self._kernels.add(kernel)
        return new

    def _environment(self) -> list[Any]:
        return [self._module.__version__, *self._module.cuda.capability]
