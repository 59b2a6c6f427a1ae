"""The stand-in for TensorRT has the names of the real module, computes, and raises on undefined behaviour."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest

from svd_trt.engine.bundle import Bundle
from tests.standin.context import RtxExecutionContext
from tests.standin.cuda import StandInCuda
from tests.standin.devices import CONTEXT_BYTES
from tests.standin.engine import IRuntimeCache, RtxRuntimeConfig
from tests.standin.helpers import THREAD_LOCAL, ok, status, with_context
from tests.standin.rtx import real
from tests.standin.tensorrt import ICudaEngine, RtxRuntime, StandInTensorRT


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (RtxRuntime, real.Runtime),
        (ICudaEngine, real.ICudaEngine),
        (RtxExecutionContext, real.IExecutionContext),
        (RtxRuntimeConfig, real.IRuntimeConfig),
        (IRuntimeCache, real.IRuntimeCache),
    ],
)
def test_names_exist_in_tensorrt(ours: type, theirs: type) -> None:
    public = {name for name in dir(ours) if not name.startswith("_")}
    assert public <= set(dir(theirs))


class Logger(real.ILogger):
    def __init__(self) -> None:
        real.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: Any, msg: str) -> None:
        assert isinstance(severity, real.ILogger.Severity)
        self.lines.append(msg)


class Recorder(real.IErrorRecorder):
    def __init__(self) -> None:
        real.IErrorRecorder.__init__(self)
        self.errors: list[tuple[str, str]] = []

    def report_error(self, code: Any, text: str) -> bool:
        self.errors.append((code.name, text))
        return False


@pytest.fixture
def bundle(small_bundle: Path) -> Bundle:
    return Bundle.open(small_bundle, verify=False)


@pytest.fixture
def trt(cuda: StandInCuda, bundle: Bundle) -> StandInTensorRT:
    return StandInTensorRT(cuda, bundle, tensorrt="tensorrt-rtx")


def opened(trt: StandInTensorRT, logger: Logger, name: Any = "vae_encoder") -> Any:
    path = trt.bundle.plan_path(name)
    assert path is not None
    return trt.Runtime(logger).deserialize_cuda_engine(path.read_bytes())


def context_of(trt: StandInTensorRT, engine: Any) -> Any:
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    return engine.create_execution_context(config)


@pytest.fixture
def ready(trt: StandInTensorRT) -> tuple[Any, dict[str, tuple[int, ...]], dict[str, int]]:
    """A context of the VAE encoder that is ready to run, and the shapes and addresses of its tensors."""
    engine = opened(trt, Logger())
    context = context_of(trt, engine)
    spec = trt.bundle.network("vae_encoder").spec
    low = {symbol: r.min for symbol, r in spec.ranges.items()}
    shapes = {tensor.name: tensor.resolve(low) for tensor in spec.tensors}
    addresses = {}
    for tensor in spec.inputs:
        assert context.set_input_shape(tensor.name, shapes[tensor.name])
    for name, shape in shapes.items():
        addresses[name] = int(ok(trt.cuda.cuMemAlloc(4 * int(np.prod(shape)))))
        assert context.set_tensor_address(name, addresses[name])
    needed = context.update_device_memory_size_for_shapes()
    context.set_device_memory(int(ok(trt.cuda.cuMemAlloc(needed))), needed)
    return context, shapes, addresses


def test_an_engine_computes(trt: StandInTensorRT, stream: int, ready: Any) -> None:
    context, shapes, addresses = ready
    picture = np.random.default_rng(0).standard_normal(shapes["image"]).astype(np.float32)
    trt.cuda.view(addresses["image"], shapes["image"], np.float32)[...] = picture
    assert context.execute_async_v3(stream)
    latents = trt.cuda.view(addresses["image_latents"], shapes["image_latents"], np.float32)
    assert latents.view(np.uint8)[0, 0, 0, 0] == 0xCD  # nothing has run yet
    ok(trt.cuda.cuStreamSynchronize(stream))
    session = onnxruntime.InferenceSession(trt.bundle.onnx_path("vae_encoder"), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(latents, session.run(None, {"image": picture})[0], rtol=1e-5, atol=1e-6)
    assert trt.executions == ["vae_encoder"]
    assert len(trt.compiled) == 1


def test_an_engine_can_be_captured_only_after_a_run(trt: StandInTensorRT, stream: int, ready: Any) -> None:
    context, shapes, addresses = ready
    cuda = trt.cuda
    cuda.view(addresses["image"], shapes["image"], np.float32)[...] = 0
    ok(cuda.cuStreamBeginCapture(stream, THREAD_LOCAL))
    assert not context.execute_async_v3(stream)
    assert status(cuda.cuStreamEndCapture(stream)) == "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
    assert context.execute_async_v3(stream)
    ok(cuda.cuStreamBeginCapture(stream, THREAD_LOCAL))
    assert context.is_stream_capturable(stream)
    assert context.execute_async_v3(stream)
    graph = ok(cuda.cuGraphInstantiate(ok(cuda.cuStreamEndCapture(stream)), 0))
    ok(cuda.cuGraphLaunch(graph, stream))
    ok(cuda.cuStreamSynchronize(stream))
    assert cuda.ran == ["vae_encoder", "vae_encoder (of a graph)"]


def test_a_run_without_memory_or_valid_addresses_is_refused(trt: StandInTensorRT, stream: int, ready: Any) -> None:
    context, shapes, addresses = ready
    context.set_tensor_address("image_latents", addresses["image_latents"] + 4)
    with pytest.raises(AssertionError, match="multiple of 256"):
        context.execute_async_v3(stream)
    ok(trt.cuda.cuMemFree(addresses["image"]))
    with pytest.raises(AssertionError, match="not inside live device memory"):
        context.execute_async_v3(stream)
    assert not context.set_input_shape("image", (1, 3, 4, 4))
    other = context_of(trt, context._engine)
    assert not other.set_input_shape("image", shapes["image"]), "only the first context has a profile by itself"
    assert other.set_optimization_profile_async(0, stream)
    assert not other.set_optimization_profile_async(1, stream)
    assert other.set_input_shape("image", shapes["image"])
    for name, address in addresses.items():
        other.set_tensor_address(name, address)
    with pytest.raises(AssertionError, match=r"not inside live device memory|was not set"):
        other.execute_async_v3(stream)


def test_shapes_outside_the_active_profile_are_refused(trt: StandInTensorRT, stream: int) -> None:
    """The first profile is exact: 3 frames. The last one is the range: 2 to 6. Its memory is that of its largest."""
    engine = opened(trt, Logger(), "denoiser")
    context, spec = context_of(trt, engine), trt.bundle.network("denoiser").spec
    assert (context.active_optimization_profile, engine.num_optimization_profiles) == (0, 2)
    sizes = {symbol: r.opt for symbol, r in spec.ranges.items()}
    exact, longer = (spec.tensor("latents").resolve({**sizes, "frames": frames}) for frames in (3, 4))
    assert context.set_input_shape("latents", exact)
    assert not context.set_input_shape("latents", longer)
    assert context.set_optimization_profile_async(1, stream)
    assert "latents" in context.infer_shapes(), "another profile forgets the shapes"
    assert context.set_input_shape("latents", longer)
    needs = [engine.get_device_memory_size_for_profile_v2(index) for index in (0, 1)]
    assert 0 < needs[0] < needs[1] == engine.device_memory_size_v2
    assert engine.get_device_memory_size_for_profile_v2(2) == 0


def test_memory_that_is_too_small_or_not_aligned_is_only_reported(
    trt: StandInTensorRT, stream: int, ready: Any
) -> None:
    """The context keeps its old memory, so its next run uses that."""
    context, _, addresses = ready
    errors = Recorder()
    context.error_recorder = errors
    kept = context._block
    context.set_device_memory(addresses["image"], 256)
    context.set_device_memory(kept[0] + 128, kept[1])
    assert [code for code, _ in errors.errors if "INVALID" in code] == ["INVALID_ARGUMENT"] * 4
    assert context._block == kept
    trt.cuda.view(addresses["image"], (1,), np.float32)[...] = 0
    assert context.execute_async_v3(stream)
    ok(trt.cuda.cuStreamSynchronize(stream))


def test_what_is_recorded_is_not_logged_and_others_inherit_the_recorder(trt: StandInTensorRT) -> None:
    logger, recorder = Logger(), Recorder()
    runtime = trt.Runtime(logger)
    runtime.error_recorder = recorder
    assert runtime.deserialize_cuda_engine(b"junk") is None
    assert recorder.errors[0][1].endswith("(this plan cannot be deserialized)")
    assert len(recorder.errors) == 2, "the general message follows"
    path = trt.bundle.plan_path("vae_encoder")
    assert path is not None
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    assert engine.error_recorder is recorder
    assert context_of(trt, engine).error_recorder is recorder
    assert logger.lines == []


def test_a_process_has_one_logger(trt: StandInTensorRT) -> None:
    first, second = Logger(), Logger()
    runtimes = [trt.Runtime(first), trt.Runtime(second)]
    assert runtimes[1].deserialize_cuda_engine(b"junk") is None
    assert (len(first.lines), len(second.lines)) == (2, 0)


def test_a_size_that_is_not_known_is_zero(trt: StandInTensorRT, ready: Any) -> None:
    context = ready[0]
    context.error_recorder = Recorder()
    trt.unknown_sizes = {"vae_encoder"}
    assert context.update_device_memory_size_for_shapes() == 0
    assert "updateDeviceMemorySizeForShapes" in context.error_recorder.errors[0][1]


def test_a_graph_is_stale_after_its_context_was_changed(trt: StandInTensorRT, stream: int, ready: Any) -> None:
    context, _, addresses = ready
    cuda = trt.cuda
    assert not context.is_stream_capturable(stream), "it has not run yet"
    assert context.execute_async_v3(stream)
    assert context.is_stream_capturable(stream)
    ok(cuda.cuStreamBeginCapture(stream, THREAD_LOCAL))
    assert context.execute_async_v3(stream)
    graph = ok(cuda.cuGraphInstantiate(ok(cuda.cuStreamEndCapture(stream)), 0))
    ok(cuda.cuGraphLaunch(graph, stream))
    address = int(ok(cuda.cuMemAlloc(1 << 20)))
    context.set_tensor_address("image_latents", address)
    with pytest.raises(AssertionError, match="the context of vae_encoder was changed after it was captured"):
        cuda.cuGraphLaunch(graph, stream)
    context.set_tensor_address("image_latents", addresses["image_latents"])
    ok(cuda.cuGraphLaunch(graph, stream))
    ok(cuda.cuStreamSynchronize(stream))


def test_capturability_depends_on_the_sizes(trt: StandInTensorRT, stream: int, ready: Any) -> None:
    context = ready[0]
    trt.capturable = lambda network, sizes: network != "vae_encoder" or sizes.get("height", 32) > 4096
    assert context.execute_async_v3(stream)
    assert not context.is_stream_capturable(stream)
    ok(trt.cuda.cuStreamSynchronize(stream))


def test_the_shared_block_on_two_streams_is_a_race(trt: StandInTensorRT, stream: int, other: int, ready: Any) -> None:
    context, _, _ = ready
    assert context.execute_async_v3(stream)
    with pytest.raises(AssertionError, match="race"):
        context.execute_async_v3(other)


def test_an_engine_holds_memory_until_it_is_collected(trt: StandInTensorRT) -> None:
    plan = trt.bundle.network("denoiser").plan
    assert plan is not None
    engine = opened(trt, Logger(), "denoiser")
    context = context_of(trt, engine)
    assert trt.cuda.bytes_in_use == plan.weight_bytes
    del engine
    gc.collect()
    assert trt.cuda.bytes_in_use == plan.weight_bytes
    del context
    gc.collect()
    assert trt.cuda.live.engines == 0


def test_releasing_an_engine_that_runs_is_recorded(trt: StandInTensorRT, stream: int, ready: Any) -> None:
    engine, logger = opened(trt, Logger()), Logger()
    config = engine.create_runtime_config()  # by default, the context allocates its own block
    context, (_, shapes, addresses) = engine.create_execution_context(config), ready
    assert context.set_input_shape("image", shapes["image"])
    for name, address in addresses.items():
        context.set_tensor_address(name, address)
    assert context.execute_async_v3(stream)
    del engine, context, logger
    gc.collect()
    assert trt.cuda.live.engines == 1  # the engine of `ready`
    assert "may be running" in trt.cuda.violations[0]


def test_engines_that_do_not_load_are_none(bundle: Bundle) -> None:
    weights = bundle.network("denoiser").plan.weight_bytes  # type: ignore[union-attr]
    cuda = with_context(total_bytes=CONTEXT_BYTES + weights - 1)
    trt, logger = StandInTensorRT(cuda, bundle, tensorrt="tensorrt-rtx"), Logger()
    assert opened(trt, logger, "denoiser") is None
    assert "out of memory" in logger.lines[0]
    assert trt.Runtime(logger).deserialize_cuda_engine(b"junk") is None
    assert "cannot be deserialized" in logger.lines[2]


def test_engine_validity_and_runtime_cache(trt: StandInTensorRT) -> None:
    runtime = trt.Runtime(Logger())
    path = trt.bundle.plan_path("denoiser")
    assert path is not None
    assert runtime.get_engine_validity(path.read_bytes()[: runtime.engine_header_size]) == (trt.EngineValidity.VALID, 0)
    assert runtime.get_engine_validity(b"x" * 64) == (trt.EngineValidity.INVALID, 32)  # like the real module
    config = opened(trt, Logger()).create_runtime_config()
    cache = config.create_runtime_cache()
    assert config.set_runtime_cache(cache)
    assert cache.deserialize(bytes(cache.serialize()))
    assert not cache.deserialize(b"junk")


RTX_ONLY = ("EngineValidity", "EngineInvalidityDiagnostics", "CudaGraphStrategy")


def test_plain_tensorrt_lacks_the_names_of_rtx(cuda: StandInCuda, bundle: Bundle) -> None:
    trt = StandInTensorRT(cuda, bundle, tensorrt="tensorrt", version="10.13.0")
    runtime, engine = trt.Runtime(Logger()), opened(trt, Logger())
    config, context = engine.create_runtime_config(), context_of(trt, engine)
    assert not any(hasattr(trt, name) for name in (*RTX_ONLY, "DynamicShapesKernelSpecializationStrategy"))
    assert not any(hasattr(runtime, name) for name in ("get_engine_validity", "engine_header_size"))
    assert not any(hasattr(config, name) for name in ("create_runtime_cache", "set_runtime_cache"))
    assert not hasattr(context, "is_stream_capturable")
    with pytest.raises(AttributeError):
        config.cuda_graph_strategy = 0


def test_weights_are_streamed_within_the_budget(cuda: StandInCuda, bundle: Bundle) -> None:
    entry = bundle.network("denoiser")
    plan = msgspec.structs.replace(entry.plan, weight_streaming=True)
    networks = bundle.manifest.networks | {"denoiser": msgspec.structs.replace(entry, plan=plan)}
    streaming = Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, networks=networks))
    trt = StandInTensorRT(cuda, streaming, tensorrt="tensorrt-rtx")
    engine = opened(trt, Logger(), "denoiser")
    assert engine.weight_streaming_budget_v2 == engine.streamable_weights_size  # nothing is streamed by default
    whole = engine.device_memory_size_v2
    engine.weight_streaming_budget_v2 = engine.streamable_weights_size - 4096
    assert engine.device_memory_size_v2 == whole + engine.weight_streaming_scratch_memory_size > whole
    context = context_of(trt, engine)
    assert cuda.bytes_in_use == plan.weight_bytes - 4096
    with pytest.raises(AssertionError, match="after a context was made"):
        engine.weight_streaming_budget_v2 = 0
    assert context is not None


def test_capturing_a_context_that_refuses_invalidates_the_capture(
    trt: StandInTensorRT, stream: int, ready: Any
) -> None:
    context = ready[0]
    assert context.execute_async_v3(stream)
    trt.capturable = lambda network, sizes: False
    assert not context.is_stream_capturable(stream)
    ok(trt.cuda.cuStreamBeginCapture(stream, THREAD_LOCAL))
    assert not context.execute_async_v3(stream)
    assert status(trt.cuda.cuStreamEndCapture(stream)) == "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
