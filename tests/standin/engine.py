"""Engines of the stand-in: their device memory, the configuration of contexts, and the runtime cache."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.spec import NetworkName, Range, TensorSpec
from tests.standin.clock import Range as Bytes
from tests.standin.cuda import StandInCuda
from tests.standin.rtx import real

__all__ = ["IRuntimeCache", "IRuntimeConfig", "Module", "Plan", "Reporting", "RtxRuntimeConfig", "take"]

_ALIGNMENT = 256
_STREAMED_AT_ONCE = 16  # one in so many weights is staged on the device while others are used
_GENERAL = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime"


class Module:
    """State that all objects of one stand-in share. `StandInTensorRT` describes what tests may set."""

    __version__: str

    def __init__(self, cuda: StandInCuda, bundle: Bundle, *, rtx: bool) -> None:
        self.cuda = cuda
        self.bundle = bundle
        self.rtx = rtx
        self.capturable: Callable[[NetworkName, Mapping[str, int]], bool] = lambda network, sizes: True
        self.first_logger: Any = None
        self.activation_factor: dict[NetworkName, float] = {}
        self.unknown_sizes: set[NetworkName] = set()
        self.refused_memory: set[NetworkName] = set()
        self.budget_step = 1
        self.compiled: list[str] = []
        self.executions: list[str] = []
        self.profiles: list[tuple[str, int]] = []
        self.own_captures: list[str] = []
        self.asked_in_capture = 0


def take(owner: object, cuda: StandInCuda, nbytes: int) -> Bytes | None:
    """Allocate device memory that is freed when ``owner`` is garbage-collected. None if the device is full."""
    allocation = cuda.reserve(nbytes)
    if allocation is None:
        return None
    weakref.finalize(owner, cuda.free_later, allocation).atexit = False
    return allocation.address, nbytes


class Plan:
    """A deserialized plan. An engine and its contexts refer to it."""

    def __init__(self, module: Module, network: NetworkName) -> None:
        self.module = module
        self.cuda = module.cuda
        self.entry = module.bundle.network(network)
        self.spec = self.entry.spec
        assert self.entry.plan is not None
        self.weight_bytes = self.entry.plan.weight_bytes or self.entry.plan.file.size
        # Not all weights can be streamed, which catches code that takes all weights for the streamable part.
        can_stream = getattr(self.entry.plan, "weight_streaming", False)
        self.streamable_bytes = self.weight_bytes * 15 // 16 if can_stream else 0
        self.budget = self.streamable_bytes
        self.contexts: weakref.WeakSet[Any] = weakref.WeakSet()
        self.ranges: list[Bytes] = []  # of the weights on the device
        self._streamed_loaded = False

    @property
    def profiles(self) -> list[tuple[Mapping[str, Range], int]]:
        """The ranges of every profile, and the builder's figure for the activations of its largest sizes."""
        assert self.entry.plan is not None
        return [(profile.ranges, profile.activation_bytes or 0) for profile in self.entry.plan.profiles]

    def load(self) -> str | None:
        """Load the weights that cannot be streamed. Returns the error if that failed."""
        if not self.cuda.has_context():
            return "no CUDA context is current in this thread"
        return self._take(self.weight_bytes - self.streamable_bytes)

    def load_streamed(self) -> str | None:
        """Load as many of the other weights as the budget allows. The first context does this."""
        if self._streamed_loaded or not self.budget:
            return None
        problem = self._take(self.budget)
        self._streamed_loaded = problem is None
        return problem

    def tensor(self, name: str) -> TensorSpec | None:
        return next((tensor for tensor in self.spec.tensors if tensor.name == name), None)

    @property
    def scratch_bytes(self) -> int:
        """The memory that a context needs to stage streamed weights."""
        return _aligned(self.weight_bytes // _STREAMED_AT_ONCE) if self.budget < self.streamable_bytes else 0

    def activation_bytes(self, profile: int, sizes: Mapping[str, int]) -> int:
        """The memory that a context needs at these sizes. Symbols without a size count at their largest.

        It is the builder's figure, in proportion to the product of the sizes, as was measured with the real builder.
        ``activation_factor`` makes the engine disagree with its builder.
        """
        ranges, most = self.profiles[profile]
        of = math.prod(r.max for r in ranges.values())
        share = math.prod(sizes.get(symbol, r.max) for symbol, r in ranges.items())
        nbytes = most * share * self.module.activation_factor.get(self.spec.name, 1) / of
        return _aligned(math.ceil(nbytes)) + self.scratch_bytes

    def _take(self, nbytes: int) -> str | None:
        taken = take(self, self.cuda, nbytes)
        if taken is None:
            return f"Error Code 2: OutOfMemory (Requested size was {nbytes} bytes: out of memory.)"
        self.ranges.append(taken)
        return None


class Reporting:
    """An object that reports errors to its recorder, and without one to the logger that the process had first.

    Seen with TensorRT for RTX 1.7.1: what is recorded is not logged, the message that says what happened comes first,
    and a general one follows. Objects that another object makes inherit its recorder.
    """

    def __init__(self, module: Module, recorder: Any) -> None:
        self._module = module
        self.error_recorder = recorder

    def _error(self, message: str, code: str = "UNSPECIFIED_ERROR") -> None:
        for text in (message, _GENERAL):
            if self.error_recorder is not None:
                self.error_recorder.report_error(real.ErrorCodeTRT.__members__[code], text)
            else:
                self._module.first_logger.log(real.ILogger.ERROR, text)


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
