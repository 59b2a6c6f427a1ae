"""TensorRT without a GPU: engines of a bundle that compute with ONNX Runtime on the memory of `StandInCuda`."""

from __future__ import annotations

import functools
import hashlib
from typing import Any, Literal

from svd_trt.engine.bundle import Bundle
from tests.standin.context import IExecutionContext, RtxExecutionContext
from tests.standin.cuda import StandInCuda
from tests.standin.engine import IRuntimeConfig, Module, Plan, Reporting, RtxRuntimeConfig
from tests.standin.rtx import real

__all__ = ["ICudaEngine", "RtxRuntime", "Runtime", "StandInTensorRT"]


class StandInTensorRT(Module):
    """A stand-in for the part of the module ``tensorrt`` or ``tensorrt_rtx`` that runs engines.

    Enumerations, ``Dims`` and the logger's base class are those of the real TensorRT for RTX. The stand-in
    for plain TensorRT lacks the names that only RTX has, both in the module and in its classes.

    Attributes:
        cuda: the stand-in driver with the memory and streams of the engines.
        capturable: whether contexts of a network can be captured with these sizes.
        first_logger: the logger of the process, which is the first that a runtime was made with.
        validity: the result of `get_engine_validity` for a plan of the bundle.
        validity_log: what `get_engine_validity` logs as an error.
        activation_factor: how much more memory than its builder reported an engine needs for activations.
        unknown_sizes: networks for which `update_device_memory_size_for_shapes` fails.
        refused_memory: networks whose contexts do not take memory.
        budget_step: budgets for weights are rounded up to a multiple of this many bytes.
        compiled: the kernels that were not in a runtime cache and had to be compiled, as ``network profile sizes``.
        executions: the network's name for every `execute_async_v3` that was enqueued or captured.
        profiles: the network and the profile of each of them.
        own_captures: the network's name for every capture that RTX made itself.
        asked_in_capture: how often a context was asked during a capture whether it can be captured.
    """

    ILogger = real.ILogger
    IProfiler = real.IProfiler
    IErrorRecorder = real.IErrorRecorder
    ErrorCodeTRT = real.ErrorCodeTRT
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
        self.validity_log = ""
        self.Runtime = functools.partial(RtxRuntime if self.rtx else Runtime, self)
        if self.rtx:
            self.ComputeCapability = real.ComputeCapability
            self.EngineValidity = real.EngineValidity
            self.EngineInvalidityDiagnostics = real.EngineInvalidityDiagnostics
            self.CudaGraphStrategy = real.CudaGraphStrategy
            self.DynamicShapesKernelSpecializationStrategy = real.DynamicShapesKernelSpecializationStrategy


class Runtime(Reporting):
    def __init__(self, module: StandInTensorRT, logger: Any) -> None:
        super().__init__(module, None)
        if not isinstance(logger, real.ILogger):
            raise TypeError("Runtime takes an ILogger")
        if not module.cuda.has_context():
            raise module.cuda.violation("a runtime was made without a current context, so it would use GPU 0")
        self._trt = module
        self._logger = logger
        module.first_logger = module.first_logger or logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        """The engine of a plan of the bundle. Other content gives None and an error."""
        digest = hashlib.sha256(memoryview(serialized_engine)).hexdigest()
        for name in self._trt.bundle.manifest.networks:
            entry = self._trt.bundle.network(name)
            if entry.plan is not None and entry.plan.file.sha256 == digest:
                plan = Plan(self._trt, name)
                if (problem := plan.load()) is None:
                    return ICudaEngine(plan, self)
                self._error(problem, "FAILED_ALLOCATION" if "OutOfMemory" in problem else "UNSPECIFIED_ERROR")
                return None
        self._error("IRuntime::deserializeCudaEngine: Error Code 1: Serialization (this plan cannot be deserialized)")
        return None


class RtxRuntime(Runtime):
    @property
    def engine_header_size(self) -> int:
        return 64

    def get_engine_validity(self, buffer: Any) -> tuple[Any, int]:
        """Whether a plan with this header runs here, and the bits of `EngineInvalidityDiagnostics`."""
        header = bytes(memoryview(buffer)[: self.engine_header_size])
        for name in self._trt.bundle.manifest.networks:
            path = self._trt.bundle.plan_path(name)
            if path is not None and len(header) == self.engine_header_size:
                with path.open("rb") as file:
                    if file.read(self.engine_header_size) == header:
                        if self._trt.validity_log:  # logged, and not recorded (seen with TensorRT for RTX 1.7.1)
                            self._logger.log(real.ILogger.INTERNAL_ERROR, self._trt.validity_log)
                        return self._trt.validity
        return real.EngineValidity.INVALID, int(real.EngineInvalidityDiagnostics.MALFORMED_ENGINE)


class ICudaEngine(Reporting):
    """An engine. Its memory is freed when it and its contexts are garbage-collected."""

    def __init__(self, plan: Plan, runtime: Runtime) -> None:
        super().__init__(plan.module, runtime.error_recorder)
        self._plan = plan
        self._runtime = runtime  # the real engine keeps a reference too

    @property
    def num_io_tensors(self) -> int:
        return len(self._plan.spec.tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._plan.profiles)

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
        return max(self._plan.activation_bytes(index, {}) for index in range(self.num_optimization_profiles))

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        if not 0 <= profile_index < self.num_optimization_profiles:
            self._error(f"there is no profile {profile_index}", "INVALID_ARGUMENT")
            return 0
        return self._plan.activation_bytes(profile_index, {})

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
        step = self._plan.module.budget_step
        self._plan.budget = min(-(-int(budget) // step) * step, self.streamable_weights_size)

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
        if (problem := plan.load_streamed()) is not None:
            self._error(problem, "FAILED_ALLOCATION")
            return None
        if own and not context._allocate_own():
            return None
        plan.contexts.add(context)
        return context
