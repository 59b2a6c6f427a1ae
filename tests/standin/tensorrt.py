"""TensorRT without a GPU: engines of a bundle that compute with ONNX Runtime on the memory of `StandInCuda`."""

from __future__ import annotations

import functools
import hashlib
from typing import Any, Literal

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.spec import NETWORKS
from tests.standin.context import IExecutionContext, RtxExecutionContext
from tests.standin.cuda import StandInCuda
from tests.standin.engine import IRuntimeConfig, Module, Plan, RtxRuntimeConfig
from tests.standin.rtx import real

__all__ = ["ICudaEngine", "RtxRuntime", "Runtime", "StandInTensorRT"]


class StandInTensorRT(Module):
    """A stand-in for the part of the module ``tensorrt`` or ``tensorrt_rtx`` that runs engines.

    Enumerations, ``Dims`` and the logger's base class are those of the real TensorRT for RTX. The stand-in
    for plain TensorRT lacks the names that only RTX has, both in the module and in its classes.

    Attributes:
        cuda: the stand-in driver with the memory and streams of the engines.
        refuse_capturable: contexts cannot be captured.
        validity: the result of `get_engine_validity` for a plan of the bundle.
        compiled: the kernels that were not in a runtime cache and had to be compiled, as ``network sizes``.
        executions: the network's name for every `execute_async_v3` that was enqueued or captured.
    """

    ILogger = real.ILogger
    IProfiler = real.IProfiler
    Logger = real.Logger
    Dims = real.Dims
    DataType = real.DataType
    TensorIOMode = real.TensorIOMode
    ExecutionContextAllocationStrategy = real.ExecutionContextAllocationStrategy

    def __init__(
        self,
        cuda: StandInCuda,
        bundle: Bundle,
        *,
        tensorrt: Literal["tensorrt", "tensorrt-rtx"],
        version: str | None = None,
    ) -> None:
        super().__init__(cuda, bundle, rtx=tensorrt == "tensorrt-rtx")
        built_with = bundle.manifest.tensorrt
        self.__version__ = version or (built_with.version if built_with else str(real.__version__))
        self.validity = (real.EngineValidity.VALID, 0)
        self.Runtime = functools.partial(RtxRuntime if self.rtx else Runtime, self)
        if self.rtx:
            self.EngineValidity = real.EngineValidity
            self.EngineInvalidityDiagnostics = real.EngineInvalidityDiagnostics
            self.CudaGraphStrategy = real.CudaGraphStrategy
            self.DynamicShapesKernelSpecializationStrategy = real.DynamicShapesKernelSpecializationStrategy


class Runtime:
    def __init__(self, module: StandInTensorRT, logger: Any) -> None:
        if not isinstance(logger, real.ILogger):
            raise TypeError("Runtime takes an ILogger")
        if not module.cuda.has_context():
            raise module.cuda.violation("a runtime was made without a current context, so it would use GPU 0")
        self._module = module
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        """The engine of a plan of the bundle. Other content gives None and an error in the log."""
        module = self._module
        digest = hashlib.sha256(memoryview(serialized_engine)).hexdigest()
        for name in NETWORKS:
            entry = module.bundle.network(name)
            if entry.plan is not None and entry.plan.file.sha256 == digest:
                plan = Plan(module, self._logger, name)
                return ICudaEngine(plan, self) if plan.load() else None
        self._logger.log(real.ILogger.ERROR, "Error Code 2: Internal Error (this plan cannot be deserialized)")
        return None


class RtxRuntime(Runtime):
    @property
    def engine_header_size(self) -> int:
        return 64

    def get_engine_validity(self, buffer: Any) -> tuple[Any, int]:
        """Whether a plan with this header runs here, and the bits of `EngineInvalidityDiagnostics`."""
        header = bytes(memoryview(buffer)[: self.engine_header_size])
        for name in NETWORKS:
            path = self._module.bundle.plan_path(name)
            if path is not None and len(header) == self.engine_header_size:
                with path.open("rb") as file:
                    if file.read(self.engine_header_size) == header:
                        return self._module.validity
        return real.EngineValidity.INVALID, int(real.EngineInvalidityDiagnostics.MALFORMED_ENGINE)


class ICudaEngine:
    """An engine. Its memory is freed when it and its contexts are garbage-collected."""

    def __init__(self, plan: Plan, runtime: Runtime) -> None:
        self._plan = plan
        self._runtime = runtime  # the real engine keeps a reference too

    @property
    def num_io_tensors(self) -> int:
        return len(self._plan.spec.tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return self._plan.profile_count

    @property
    def name(self) -> str:
        return self._plan.spec.name

    def get_tensor_name(self, index: int) -> str:
        return self._plan.spec.tensors[index].name

    def get_tensor_mode(self, name: str) -> Any:
        modes = real.TensorIOMode
        tensor = self._plan.tensor(name)
        if tensor is None:
            return modes.NONE
        return modes.INPUT if tensor in self._plan.spec.inputs else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        tensor = self._plan.tensor(name)
        return real.DataType.UINT8 if tensor is not None and tensor.dtype == "uint8" else real.DataType.FLOAT

    def get_tensor_shape(self, name: str) -> Any:
        tensor = self._plan.tensor(name)
        return real.Dims([a if isinstance(a, int) else -1 for a in tensor.shape] if tensor is not None else [])

    @property
    def device_memory_size_v2(self) -> int:
        return self._plan.activation_bytes({})

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self._plan.activation_bytes({}) if profile_index < self._plan.profile_count else 0

    @property
    def streamable_weights_size(self) -> int:
        return self._plan.streamable_bytes

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._plan.budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        if self._plan.contexts:
            raise self._plan.cuda.violation(f"{self.name}: the budget of the weights was set after a context was made")
        if budget < 0:
            raise self._plan.cuda.violation(f"{self.name}: the budget of the weights is negative ({budget})")
        self._plan.budget = min(int(budget), self.streamable_weights_size)

    @property
    def weight_streaming_scratch_memory_size(self) -> int:
        return self._plan.scratch_bytes

    def create_runtime_config(self) -> IRuntimeConfig:
        module = self._plan.module
        return (RtxRuntimeConfig if module.rtx else IRuntimeConfig)(module)

    def create_execution_context(self, runtime_config: Any = None) -> IExecutionContext | None:
        """A context. If the device has too little free memory, None and an error in the log."""
        plan = self._plan
        strategies = real.ExecutionContextAllocationStrategy
        config = runtime_config
        if not isinstance(config, IRuntimeConfig):
            config = self.create_runtime_config()
            if runtime_config is not None:
                config.set_execution_context_allocation_strategy(runtime_config)
        context = (RtxExecutionContext if plan.module.rtx else IExecutionContext)(plan, self, config)
        own = config.get_execution_context_allocation_strategy() != strategies.USER_MANAGED
        if not plan.load_streamed() or (own and not context._allocate_own()):
            return None
        plan.contexts.add(context)
        return context
