"""The differences between TensorRT and TensorRT for RTX when an engine runs. The rest of the code is the same.

| | TensorRT 10.12+, 11 | TensorRT for RTX |
|---|---|---|
| module | ``tensorrt`` | ``tensorrt_rtx``, or its bindings (`svd_trt.engine.tensorrt_import`) |
| an engine fits | the version and compute capability that built it | the version, and the runtime's check |
| kernels for a shape | chosen when the engine is built | compiled at the first run, kept in a cache file |
| CUDA graphs | captured by svd-trt | captured by svd-trt if the context allows it, else by the runtime |
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import platformdirs

from svd_trt.engine.driver import Gpu
from svd_trt.engine.temporary_files import create_file, remove_leftovers
from svd_trt.engine.tensorrt_import import TensorRt, served_capabilities
from svd_trt.runtime.cuda.tensorrt_context import EngineContext
from svd_trt.runtime.cuda.tensorrt_errors import Errors, logger_of

__all__ = ["Rtx", "Runtime", "RuntimeCache", "make_runtime"]


class Runtime:
    """TensorRT. Engines contain their kernels, and run on the kind of GPU and the version that built them."""

    def __init__(self, tensorrt: TensorRt) -> None:
        self.tensorrt = tensorrt
        self.trt = tensorrt.trt
        self.errors = Errors(self.trt)
        self.handle: Any = self.trt.Runtime(logger_of(self.trt))
        self.errors.attach(self.handle)

    def invalidity(self, header: bytes) -> tuple[str, ...] | None:  # noqa: ARG002
        """Ask whether an engine with this header can run on the current GPU.

        Returns:
            None if it can; else what is wrong, as TensorRT for RTX names it, and nothing if only `errors` says it.
        """
        return None

    @property
    def served(self) -> tuple[str, ...]:
        """The compute capabilities that engines can be built for, such as ``sm89``; empty if it is any GPU's own."""
        return ()

    @property
    def header_bytes(self) -> int:
        """How many bytes of a plan `invalidity` needs."""
        return 0

    captures_itself = False
    """Contexts can be told to capture their own runs."""

    def configure(self, engine: Any, cache: RuntimeCache | None, *, own_graphs: bool) -> Any:  # noqa: ARG002
        """Make the configuration for contexts of ``engine``: the caller provides their memory."""
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        return config

    def capturable(self, context: EngineContext, stream: int) -> bool:  # noqa: ARG002
        """Whether runs of ``context`` like the last one may be part of a CUDA graph."""
        return True

    def cache(self, key: str, gpu: Gpu) -> RuntimeCache | None:  # noqa: ARG002
        """Return the file for kernels that are compiled at run time; None, because there are none."""
        return None


class Rtx(Runtime):
    """TensorRT for RTX. Engines hold portable code that is compiled for the GPU and the shapes at their first run."""

    captures_itself = True

    def invalidity(self, header: bytes) -> tuple[str, ...] | None:
        """Ask the runtime. It writes to the log, and not to its recorder, what has no diagnostic of its own."""
        self.errors.clear()
        validity, problems = self.handle.get_engine_validity(header)
        if validity != self.trt.EngineValidity.INVALID:
            return None
        known = self.trt.EngineInvalidityDiagnostics.__members__.items()
        return tuple(name for name, member in known if int(problems) & int(member.value))

    @property
    def served(self) -> tuple[str, ...]:
        """The capabilities that the module lists."""
        return served_capabilities(self.trt)

    @property
    def header_bytes(self) -> int:
        """The runtime's own figure."""
        return int(self.handle.engine_header_size)

    def configure(self, engine: Any, cache: RuntimeCache | None, *, own_graphs: bool) -> Any:
        """Compile for the shapes before the first run, so that all runs, and graphs of them, use the same kernels."""
        config = super().configure(engine, cache, own_graphs=own_graphs)
        config.dynamic_shapes_kernel_specialization_strategy = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
        graphs = self.trt.CudaGraphStrategy
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if own_graphs else graphs.DISABLED
        if cache is not None:
            cache.attach(config)
        return config

    def capturable(self, context: EngineContext, stream: int) -> bool:
        """Ask the context."""
        return context.capturable(stream)

    def cache(self, key: str, gpu: Gpu) -> RuntimeCache | None:
        """Return a file for this engine on this kind of GPU."""
        name = f"{key[:24]}-{gpu.sm}-{self.tensorrt.version}.bin"
        return RuntimeCache(platformdirs.user_cache_path("svd-trt") / "runtime-cache" / name)


class RuntimeCache:
    """Kernels that TensorRT for RTX compiled, kept between processes. Failing to keep them is not an error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cache: Any = None
        self._saved = b""

    def attach(self, config: Any) -> None:
        """Make contexts of ``config`` use the file's content and add to it. All contexts of an engine share it."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with contextlib.suppress(OSError):
                content = self.path.read_bytes()
                if self._cache.deserialize(content):  # the runtime compares GPU, driver and version itself
                    self._saved = content
        config.set_runtime_cache(self._cache)

    def close(self) -> None:
        """Release the cache, after the contexts that use it."""
        self._cache = None

    def save(self) -> None:
        """Write new kernels to the file by a rename, because another process may use the file at the same time."""
        if self._cache is None:
            return
        serialized = self._cache.serialize()
        if serialized is None:  # the runtime failed, and the kernels are only compiled again next time
            return
        content = bytes(memoryview(serialized))
        if content == self._saved:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path.parent)
            partial, file = create_file(self.path, self.path.suffix)
            try:
                with file:
                    file.write(content)
                    file.flush()
                    partial.replace(self.path)
                self._saved = content
            finally:
                partial.unlink(missing_ok=True)


def make_runtime(tensorrt: TensorRt) -> Runtime:
    """Make the runtime of ``tensorrt``."""
    return (Rtx if tensorrt.name == "tensorrt-rtx" else Runtime)(tensorrt)
