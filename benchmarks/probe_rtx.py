"""A small engine of TensorRT for RTX, or of TensorRT: does it build, load and run on this GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from svd_trt.benchmarks.probe_steps import ProbeError, ProbeJob, Report, SkippedError
from svd_trt.engine.driver import Driver, Gpu, gpu_count, list_gpus, load_driver
from svd_trt.engine.tensorrt_import import find_tensorrt
from svd_trt.errors import NoGpuError
from svd_trt.runtime.cuda.buffers import CudaBuffer, PinnedBuffer
from svd_trt.runtime.cuda.context import Context
from svd_trt.runtime.cuda.streams import Stream
from svd_trt.runtime.device import Array

__all__ = ["build_engine", "reference", "run_small_engine"]

CHANNELS, SIDE = 64, 8
TOKENS = SIDE * SIDE
BATCHES = (1, 5, 16)
_BOUND = 0.02  # of the relative error; half precision gives 0.001
_TARGETS = {"current": "CURRENT", "8.0": "SM80", "8.9": "SM89", "12.0": "SM120"}


def run_small_engine(job: ProbeJob, report: Report, *, target: str) -> None:
    """Build an fp16 engine for ``target``, ask whether it fits this GPU, and compare its results with numpy in fp32.

    ``target`` is ``unset``, ``current`` or a compute capability. In a dry run without a GPU the engine is only built.
    """
    if target != "unset" and job.backend == "tensorrt":
        raise SkippedError("TensorRT builds for the GPU that it runs on, and takes no compute capability")
    if target == "current" and gpu_count() == 0:
        raise SkippedError("there is no current GPU to build for")
    tensorrt = find_tensorrt(job.backend)
    trt = tensorrt.trt
    logger = _logger(trt)
    report(tensorrt=f"{tensorrt.name} {tensorrt.version}")
    try:
        plan = build_engine(trt, logger, target)
    finally:
        report(log=logger.lines)
    report(plan_bytes=len(plan))
    try:
        driver = load_driver()
    except NoGpuError:
        report(note="there is no GPU to run the engine on")
        return
    gpu = list_gpus(driver)[0]
    report(gpu=f"{gpu.name} {gpu.sm}", driver=gpu.driver_version)
    try:
        _run(trt, logger, plan, driver, gpu, report)
    finally:
        report(log=logger.lines)


def build_engine(trt: Any, logger: Any, target: str) -> bytes:
    """Build a convolution and an attention on its pixels, ``x`` ``[b, C, 8, 8]`` to ``y`` ``[b, 64, C]``, b of 1 to 16.

    Raises:
        ProbeError: TensorRT refused.
    """
    builder = trt.Builder(logger)
    flags = trt.NetworkDefinitionCreationFlag
    strong = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    network = builder.create_network(strong)
    weights = _weights()
    x = network.add_input("x", trt.float16, (-1, CHANNELS, SIDE, SIDE))
    convolution = network.add_convolution_nd(x, CHANNELS, (3, 3), trt.Weights(weights["conv"]), trt.Weights())
    convolution.padding_nd = (1, 1)
    tokens = network.add_shuffle(convolution.get_output(0))
    tokens.reshape_dims = (0, CHANNELS, TOKENS)
    tokens.second_transpose = (0, 2, 1)
    tokens = tokens.get_output(0)
    plain, transposed = trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE

    def product(a: Any, b: Any, operation: Any = plain) -> Any:
        return network.add_matrix_multiply(a, plain, b, operation).get_output(0)

    def projected(name: str) -> Any:
        constant = network.add_constant((1, CHANNELS, CHANNELS), trt.Weights(weights[name]))
        return product(tokens, constant.get_output(0))

    softmax = network.add_softmax(product(projected("query"), projected("key"), transposed))
    softmax.axes = 1 << 2
    y = product(softmax.get_output(0), tokens)
    y.name = "y"
    network.mark_output(y)
    config = builder.create_builder_config()
    if target != "unset":
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(getattr(trt.ComputeCapability, _TARGETS[target]), 0):
            raise ProbeError(f"TensorRT does not take {target} as a compute capability")
    profile = builder.create_optimization_profile()
    profile.set_shape("x", *((n, CHANNELS, SIDE, SIDE) for n in (1, 4, 16)))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ProbeError("TensorRT did not build the engine; see the log")
    return bytes(memoryview(plan))


def reference(x: Array) -> Array:
    """What the engine computes, in fp32: ``[b, C, 8, 8]`` to ``[b, 64, C]``."""
    weights = {name: values.astype(np.float32) for name, values in _weights().items()}
    padded = np.pad(x.astype(np.float32), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))  # [b, C, 8, 8, 3, 3]
    tokens = np.einsum("bchwij,ocij->bhwo", windows, weights["conv"]).reshape(len(x), TOKENS, CHANNELS)
    scores = (tokens @ weights["query"][0]) @ (tokens @ weights["key"][0]).transpose(0, 2, 1)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    result: Array = (shares / shares.sum(-1, keepdims=True)) @ tokens
    return result


def _weights() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shapes = {"conv": (CHANNELS, CHANNELS, 3, 3), "query": (1, CHANNELS, CHANNELS), "key": (1, CHANNELS, CHANNELS)}
    return {name: (0.05 * rng.standard_normal(shape)).astype(np.float16) for name, shape in shapes.items()}


def _run(trt: Any, logger: Any, plan: bytes, driver: Driver, gpu: Gpu, report: Report) -> None:
    with Context(driver, gpu) as context, context.current():
        runtime = trt.Runtime(logger)
        if hasattr(runtime, "get_engine_validity"):
            report(validity=str(runtime.get_engine_validity(plan[: int(runtime.engine_header_size)])))
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise ProbeError("the engine cannot be loaded here; see the log")
        execution = engine.create_execution_context()
        errors = {f"batch_{n}": _relative_error(execution, context, n) for n in BATCHES}
        report(relative_error=errors)
        del execution, engine, runtime
    if not max(errors.values()) <= _BOUND:  # an error that is not a number is none that is small
        raise ProbeError(f"the engine's results are wrong: {errors}")


def _relative_error(execution: Any, context: Context, batch: int) -> float:
    x = np.random.default_rng(batch).standard_normal((batch, CHANNELS, SIDE, SIDE)).astype(np.float16)
    shape = (batch, TOKENS, CHANNELS)
    with (
        Stream(context, "probe") as stream,
        CudaBuffer.allocate(context, x.shape, np.float16, "x") as inputs,
        CudaBuffer.allocate(context, shape, np.float16, "y") as outputs,
        PinnedBuffer(context, x.shape, np.float16, "x") as host_x,
        PinnedBuffer(context, shape, np.float16, "y") as host_y,
    ):
        host_x.array[...] = x
        stream.copy_in(inputs.address, host_x.address, inputs.nbytes, "x")
        execution.set_input_shape("x", x.shape)
        execution.set_tensor_address("x", inputs.address)
        execution.set_tensor_address("y", outputs.address)
        if not execution.execute_async_v3(stream.handle):
            raise ProbeError(f"the engine does not run with a batch of {batch}; see the log")
        stream.copy_out(host_y.address, outputs.address, outputs.nbytes, "y")
        stream.synchronize()
        expected = reference(x)
        return float(np.linalg.norm(host_y.array.astype(np.float32) - expected) / np.linalg.norm(expected))


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class comes from a module found at run time
        """Keeps warnings and errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.WARNING, trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.lines.append(message.strip())
                del self.lines[:-10]

    return Logger()
