"""Execution contexts of the stand-in. They raise an exception if a call is undefined behaviour in TensorRT."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from svd_trt.engine.spec import Symbol, TensorSpec
from tests.standin.calls import number
from tests.standin.clock import Range
from tests.standin.engine import IRuntimeCache, IRuntimeConfig, Plan, Reporting, RtxRuntimeConfig, take
from tests.standin.network import Run, bytes_of, solve
from tests.standin.rtx import real

__all__ = ["IExecutionContext", "RtxExecutionContext"]

_ALIGNMENT = 256
_NO_PROFILE = -1
SUCCESS = 0


class IExecutionContext(Reporting):
    """The state of an engine's runs: a profile, shapes, addresses, and a block for activations."""

    def __init__(self, plan: Plan, engine: Any, config: IRuntimeConfig) -> None:
        super().__init__(plan.module, engine.error_recorder)
        self._config = config
        self._plan = plan
        self._engine = engine  # the real context keeps a reference too
        self._name = plan.spec.name
        self._addresses: dict[str, int] = {}
        self._block: Range | None = None
        self._own_block = False
        self.profiler: Any = None
        self.enqueue_emits_profile = True
        # As documented: the first context of an engine has the first profile, and others have to select one.
        self._select(_NO_PROFILE if plan.contexts else 0)

    def _select(self, profile: int) -> None:
        self._profile = profile
        self._shapes = {t.name: t.resolve({}) for t in self._plan.spec.inputs if not t.dynamic}
        self._executed = False  # with the current shapes
        # Until `update_device_memory_size_for_shapes`, activations are laid out for the largest shapes.
        if not self._own_block:
            self._needed = self._plan.activation_bytes(max(profile, 0), {})

    def _allocate_own(self) -> bool:
        """Allocate the block for activations. False if the device is full."""
        self._block = take(self, self._plan.cuda, max(self._needed, 1))
        self._own_block = self._block is not None
        if not self._own_block:
            self._engine._error(f"Requested amount of GPU memory ({self._needed} bytes): out of memory")
        return self._own_block

    # Preparing a run.

    @property
    def active_optimization_profile(self) -> int:
        return self._profile

    def get_runtime_config(self) -> IRuntimeConfig:
        return self._config

    def set_optimization_profile_async(self, profile_index: int, stream_handle: Any) -> bool:
        if self._plan.cuda.is_capturing(stream_handle):
            raise self._plan.cuda.violation(f"{self._name}: a profile was selected in a capture")
        if not 0 <= profile_index < len(self._plan.profiles):
            self._error(f"IExecutionContext::setOptimizationProfileAsync: there is no profile {profile_index}")
            return False
        if profile_index != self._profile:
            self._select(profile_index)
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        tensor = self._plan.tensor(name)
        if tensor is None or tensor not in self._plan.spec.inputs:
            self._error(f"{name} is no input")
            return False
        if self._profile == _NO_PROFILE:
            self._error(f"{self._name} has no profile to set the shape of {name} in")
            return False
        wanted = tuple(int(n) for n in shape)
        low, high = self._limits(tensor)
        if len(wanted) != len(low) or not all(a <= n <= b for a, n, b in zip(low, wanted, high, strict=True)):
            self._error(f"{name}: {wanted} is not in profile {self._profile}'s range of {low} to {high}")
            return False
        if self._shapes.get(name) != wanted:
            self._shapes[name] = wanted
            self._executed = False
            if not self._own_block:
                self._needed = self._plan.activation_bytes(self._profile, {})
        return True

    def _limits(self, tensor: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ranges, _ = self._plan.profiles[self._profile]
        low, high = ({symbol: getattr(r, end) for symbol, r in ranges.items()} for end in ("min", "max"))
        return tensor.resolve(low), tensor.resolve(high)

    def set_tensor_address(self, name: str, memory: Any) -> bool:
        if self._plan.tensor(name) is None:
            self._error(f"{self._name} has no tensor {name}")
            return False
        self._addresses[name] = number(memory)
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def get_tensor_shape(self, name: str) -> Any:
        """The shape, with -1 for axes that are not known yet."""
        tensor = self._plan.tensor(name)
        if tensor is None:
            self._error(f"{self._name} has no tensor {name}")
            return real.Dims([])
        if tensor.name in self._shapes:
            return real.Dims(list(self._shapes[tensor.name]))
        return real.Dims([self._axis(axis) for axis in tensor.shape])

    def infer_shapes(self) -> list[str]:
        """The inputs without a shape. Raises RuntimeError if the shapes contradict each other."""
        try:
            solve(self._plan.spec, self._shapes)
        except ValueError as error:
            raise RuntimeError(str(error)) from error
        return [tensor.name for tensor in self._plan.spec.inputs if tensor.name not in self._shapes]

    def update_device_memory_size_for_shapes(self) -> int:
        """The bytes that the current shapes need; 0 and an error if that cannot be found out."""
        if missing := self.infer_shapes():
            raise self._plan.cuda.violation(f"{self._name}: memory was asked for without shapes of {missing}")
        if self._name in self._module.unknown_sizes:
            self._error(f"IExecutionContext::updateDeviceMemorySizeForShapes: no layout of {self._name} was found")
            return 0
        self._needed = self._plan.activation_bytes(self._profile, solve(self._plan.spec, self._shapes))
        return self._needed

    def set_device_memory(self, memory: Any, size: int) -> None:
        """Take the block. If it is too small or not aligned, that is only reported, and the old block stays."""
        if self._own_block:
            raise self._plan.cuda.violation(f"{self._name}: this context allocates its own memory")
        if number(memory) % _ALIGNMENT or int(size) < self._needed or self._name in self._module.refused_memory:
            self._error(
                f"IExecutionContext::setDeviceMemoryV2: {int(size)} bytes at {number(memory):#x} are not "
                f"{self._needed} bytes of aligned memory",
                "INVALID_ARGUMENT",
            )
            return
        self._block = (number(memory), int(size))

    # Running.

    def execute_async_v3(self, stream_handle: Any) -> bool:
        if missing := self.infer_shapes():
            raise self._plan.cuda.violation(f"{self._name} was run without shapes of {missing}")
        sizes = solve(self._plan.spec, self._shapes)
        run = Run(
            self._plan.module.bundle.onnx_path(self._plan.spec.name),
            {t: (self._address(t, t.resolve(sizes)), t.resolve(sizes)) for t in self._plan.spec.inputs},
            {t: (self._address(t, t.resolve(sizes)), t.resolve(sizes)) for t in self._plan.spec.outputs},
            self._activations(),
        )
        if self._refused(stream_handle, sizes):
            return False
        reads = [(address, bytes_of(t, shape)) for t, (address, shape) in run.inputs.items()] + self._plan.ranges
        writes = [(address, bytes_of(t, shape)) for t, (address, shape) in run.outputs.items()] + [run.block]
        status = self._plan.cuda.enqueue(stream_handle, self._name, run, reads, writes, stale=self._staleness())
        if int(status) != SUCCESS:
            self._error(f"Error Code 1: Cuda Runtime ({self._name}: {status.name})")
            return False
        self._module.executions.append(self._name)
        self._module.profiles.append((self._name, self._profile))
        self._executed = True
        self._compile(sizes)
        return self._report_layers(stream_handle)

    def _refused(self, stream: Any, sizes: dict[str, int]) -> bool:
        """True if the stream captures and the context cannot be captured. The capture is then invalid."""
        cuda = self._plan.cuda
        if not cuda.is_capturing(stream):
            return False
        if not self._executed:
            reason = "after a change of shapes, a context has to run once before it is captured"
        elif not self._capturable(sizes):
            reason = "this context is not stream capturable"
        elif self.profiler is not None and self.enqueue_emits_profile:
            reason = "a run that reports its layers waits for the stream, which a capture does not allow"
        else:
            return False
        cuda.invalidate_capture(stream)
        self._error(f"Error Code 1: Cuda Runtime ({self._name}: {reason})")
        return True

    def _capturable(self, sizes: dict[str, int]) -> bool:
        return self._module.capturable(self._plan.spec.name, sizes)

    def _staleness(self) -> Callable[[], str | None]:
        """What a graph of this run asks when it is launched: why it would not compute what was captured, or None.

        TensorRT documents that a graph has to be captured again after its context was changed.
        """
        name, state, context = self._name, self._state(), weakref.ref(self)

        def stale() -> str | None:
            alive = context()
            if alive is None:
                return f"the context of {name} was released after it was captured"
            return None if alive._state() == state else f"the context of {name} was changed after it was captured"

        return stale

    def _state(self) -> tuple[Any, ...]:
        return self._profile, dict(self._shapes), dict(self._addresses), self._block

    def _report_layers(self, stream: Any) -> bool:
        """Wait for the run and report two layers, if there is a profiler. False if the run failed."""
        if self.profiler is None or not self.enqueue_emits_profile:
            return True
        status, *_ = self._plan.cuda.cuStreamSynchronize(stream)
        for index, milliseconds in enumerate((0.5, 2.0)):
            self.profiler.report_layer_time(f"__myl_{self._plan.spec.name}_{index}", milliseconds)
        return int(status) == SUCCESS

    def _address(self, tensor: TensorSpec, shape: tuple[int, ...]) -> int:
        cuda, what = self._plan.cuda, f"{self._plan.spec.name}'s {tensor.name}"
        if not self._addresses.get(tensor.name):
            raise cuda.violation(f"{what} has no address")
        address = self._addresses[tensor.name]
        if address % _ALIGNMENT:
            raise cuda.violation(f"{what}: {address:#x} is not a multiple of {_ALIGNMENT}")
        cuda.locate((address, bytes_of(tensor, shape)), what)
        return address

    def _activations(self) -> Range:
        cuda, what = self._plan.cuda, f"{self._plan.spec.name}'s device memory"
        if not self._needed:
            return 0, 0
        if self._block is None:
            raise cuda.violation(f"{what} was not set")
        address, nbytes = self._block
        if nbytes < self._needed:
            raise cuda.violation(f"{what} is {nbytes} bytes, {self._needed} are needed")
        cuda.locate(self._block, what, ("device", "engine"))
        return address, self._needed

    def _compile(self, sizes: dict[str, int]) -> None:
        """Plain TensorRT compiles nothing when it runs."""

    def _axis(self, axis: int | Symbol) -> int:
        if isinstance(axis, int):
            return axis
        return solve(self._plan.spec, self._shapes).get(axis.symbol, -axis.divisor) // axis.divisor


class RtxExecutionContext(IExecutionContext):
    """RTX compiles kernels for new shapes and keeps them in the cache of the configuration, or else in its own.

    It captures its runs itself if the configuration says so, and again after each change of an address or a shape.
    """

    def __init__(self, plan: Plan, engine: Any, config: IRuntimeConfig) -> None:
        super().__init__(plan, engine, config)
        assert isinstance(config, RtxRuntimeConfig)
        self._cache = config.get_runtime_cache() or IRuntimeCache(plan.module)
        self._captures = config.cuda_graph_strategy == real.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._captured: tuple[Any, ...] | None = None

    def is_stream_capturable(self, stream: Any) -> bool:
        """Whether a run with the current shapes can be captured. Before the first one with them it cannot be."""
        if self._plan.cuda.is_capturing(stream):
            self._module.asked_in_capture += 1
        return self._executed and self._capturable(solve(self._plan.spec, self._shapes))

    def _compile(self, sizes: dict[str, int]) -> None:
        extents = " ".join(f"{symbol}={n}" for symbol, n in sorted(sizes.items()))
        kernel = f"{self._name} profile {self._profile} {extents}"
        if self._cache._compile(kernel):
            self._module.compiled.append(kernel)
        if self._captures and self._captured != self._state():
            self._captured = self._state()
            self._module.own_captures.append(self._name)
