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
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.driver import Gpu
from svd_trt.engine.tensorrt_import import TensorRt
from svd_trt.errors import BackendError

__all__ = ["Rtx", "Runtime", "RuntimeCache", "make_runtime", "refuse_invalid", "refuse_misfit"]


class Runtime:
    """TensorRT. Engines contain their kernels, and run on the kind of GPU and the version that built them."""

    def __init__(self, tensorrt: TensorRt, logger: Any) -> None:
        self.tensorrt = tensorrt
        self.trt = tensorrt.trt
        self.handle: Any = self.trt.Runtime(logger)

    def invalidity(self, gpu: Gpu, header: bytes) -> str | None:  # noqa: ARG002
        """Say why an engine with this header cannot run on ``gpu``; None if the runtime finds no reason."""
        return None

    @property
    def header_bytes(self) -> int:
        """How many bytes of a plan `invalidity` needs."""
        return 0

    def configure(self, engine: Any, cache: RuntimeCache | None, *, own_graphs: bool) -> Any:  # noqa: ARG002
        """Make the configuration for contexts of ``engine``: the caller provides their memory."""
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        return config

    def capturable(self, context: Any, stream: int) -> bool:  # noqa: ARG002
        """Whether runs of ``context`` may be part of a CUDA graph."""
        return True

    def cache(self, key: str, gpu: Gpu) -> RuntimeCache | None:  # noqa: ARG002
        """Return the file for kernels that are compiled at run time; None, because there are none."""
        return None


class Rtx(Runtime):
    """TensorRT for RTX. Engines hold portable code that is compiled for the GPU and the shapes at their first run."""

    def invalidity(self, gpu: Gpu, header: bytes) -> str | None:
        """Ask the runtime."""
        validity, problems = self.handle.get_engine_validity(header)
        if validity != self.trt.EngineValidity.INVALID:
            return None
        found = [_REASONS.get(name, name.lower()) for name in _diagnostics(self.trt, problems)]
        reasons = ", ".join(found) or "the runtime does not say why"
        return f"TensorRT for RTX {self.tensorrt.version} refuses its engines on {gpu.name} ({gpu.sm}): {reasons}"

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

    def capturable(self, context: Any, stream: int) -> bool:
        """Ask the context."""
        return bool(context.is_stream_capturable(stream))

    def cache(self, key: str, gpu: Gpu) -> RuntimeCache | None:
        """Return a file for this engine on this kind of GPU."""
        name = f"{key[:24]}-{gpu.sm}-{self.tensorrt.version}.bin"
        return RuntimeCache(platformdirs.user_cache_path("svd-trt") / "runtime-cache" / name)


class RuntimeCache:
    """Kernels that TensorRT for RTX compiled, kept between processes. Failing to keep them is not an error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cache: Any = None
        self._loaded = b""

    def attach(self, config: Any) -> None:
        """Make contexts of ``config`` use the file's content and add to it."""
        self._cache = config.create_runtime_cache()
        with contextlib.suppress(OSError):
            content = self.path.read_bytes()
            if self._cache.deserialize(content):  # the runtime compares GPU, driver and version itself
                self._loaded = content
        config.set_runtime_cache(self._cache)

    def close(self) -> None:
        """Release the cache, after the contexts that use it."""
        self._cache = None

    def save(self) -> None:
        """Write new kernels to the file by a rename, because another process may use the file at the same time."""
        if self._cache is None:
            return
        content = bytes(memoryview(self._cache.serialize()))
        if content == self._loaded:
            return
        partial = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}")
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_bytes(content)
                partial.replace(self.path)
            finally:
                partial.unlink(missing_ok=True)


def make_runtime(tensorrt: TensorRt, logger: Any) -> Runtime:
    """Make the runtime of ``tensorrt``."""
    return (Rtx if tensorrt.name == "tensorrt-rtx" else Runtime)(tensorrt, logger)


def refuse_misfit(tensorrt: TensorRt, gpu: Gpu, bundle: Bundle) -> None:
    """Check that ``tensorrt`` and ``gpu`` are what the bundle's engines were built with and for.

    Raises:
        BackendError: they were not; the message says why, and which command builds them again.
    """
    built = bundle.manifest.tensorrt
    if built is None:
        reason = "it holds no engines"
    elif built.name != tensorrt.name:
        reason = f"its engines are for {built.name}, and {tensorrt.name} was asked for"
    elif built.version != tensorrt.version:
        reason = f"its engines are from {built.name} {built.version}, and {tensorrt.version} is installed"
    elif built.target not in ("", gpu.sm):
        reason = f"its engines are for {built.target}, and this GPU is {gpu.sm} ({gpu.name})"
    else:
        return
    raise BackendError(_misfit(tensorrt, gpu, bundle, reason))


def refuse_invalid(runtime: Runtime, gpu: Gpu, bundle: Bundle) -> None:
    """Ask ``runtime`` whether the engines can run on the GPU whose context is current, without loading them.

    Raises:
        BackendError: they cannot; the message says why, and which command builds them again.
    """
    reason = runtime.invalidity(gpu, _header(bundle, runtime.header_bytes))
    if reason is not None:
        raise BackendError(_misfit(runtime.tensorrt, gpu, bundle, reason))


def _misfit(tensorrt: TensorRt, gpu: Gpu, bundle: Bundle, reason: str) -> str:
    again = f"svd-trt build {bundle.manifest.source.model} -o {bundle.path} --backend {tensorrt.name}"
    return f"{bundle.path} cannot run on cuda:{gpu.index}: {reason}; rebuild it: {again}"


def _header(bundle: Bundle, nbytes: int) -> bytes:
    path = bundle.plan_path("denoiser")
    assert path is not None
    with path.open("rb") as file:
        return file.read(nbytes)


_REASONS = {
    "VERSION_MISMATCH": "they are from another version",
    "UNSUPPORTED_CC": "they were not built for this compute capability",
    "OLD_CUDA_DRIVER": "the driver is too old: update it",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old",
    "INSUFFICIENT_GPU_MEMORY": "the GPU's memory is too small",
    "MALFORMED_ENGINE": "the plan is damaged",
    "CUDA_ERROR": "CUDA does not work here",
}


def _diagnostics(trt: Any, problems: Any) -> Iterator[str]:
    """List the names of the bits that are set in a diagnostics mask."""
    for name, member in trt.EngineInvalidityDiagnostics.__members__.items():
        if int(problems) & int(member.value):
            yield name
