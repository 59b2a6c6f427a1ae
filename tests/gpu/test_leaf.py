"""The CUDA leaf on the stand-in: what it calls, in which order, and what it does when a call fails."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.engine.driver import Driver, gpu_count, list_gpus, load_driver
from svd_trt.engine.vram import Request, smallest_budget
from svd_trt.errors import ArgumentError, BackendError, BudgetError, CudaError, DeviceMemoryError
from svd_trt.runtime.cuda.context import Context
from svd_trt.runtime.cuda.memory import DeviceMemory, PinnedBuffer
from svd_trt.runtime.cuda.streams import Event, Stream
from tests.gpu.conftest import Rig
from tests.gpu.test_pipeline import FAST, furthest
from tests.standin.cuda import StandInCuda

pytestmark = pytest.mark.xdist_group("dynamic")

# What a step may call once everything was made: nothing that allocates, frees, or waits for the whole stream.
IN_A_STEP = {
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuMemcpyDtoDAsync",
    "cuGraphLaunch",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuEventElapsedTime",
}


def test_a_step_allocates_nothing_and_waits_for_nothing_but_events(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    assert standin.cuda is not None
    cuda = standin.cuda
    marks: list[int] = []

    def note(stage: str, done: int, total: int) -> None:
        if stage == "denoise":
            marks.append(len(cuda.calls))

    with standin.open(dynamic_bundle) as pipe:
        pipe(picture, **FAST)
        pipe(picture, progress=note, **FAST)
        steps = [call.name for call in cuda.calls[marks[0] : marks[-1]]]
    assert set(steps) <= IN_A_STEP
    assert steps.count("cuGraphLaunch") == FAST["num_inference_steps"] - 2, "two are under way when one is done"
    assert steps.count("cuMemcpyDtoDAsync") == FAST["num_inference_steps"] - 2, "its row of coefficients"


def test_two_steps_are_under_way_and_no_more(standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image) -> None:
    """While one runs the next is queued, so the GPU does not idle; a run that is cancelled ends soon."""
    assert standin.cuda is not None
    cuda = standin.cuda
    queued: list[int] = []

    def note(stage: str, done: int, total: int) -> None:
        if stage == "denoise":
            assert standin.trt is not None
            queued.append(cuda.count("cuGraphLaunch") - done)

    asked = FAST | {"num_inference_steps": 8}
    with standin.open(dynamic_bundle) as pipe:
        pipe(picture, **asked)
        before = cuda.count("cuGraphLaunch")
        pipe(picture, progress=note, **asked)
    assert [count - before for count in queued] == [1] * 7 + [0]


def test_frames_are_copied_on_a_stream_of_their_own(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    assert standin.cuda is not None
    cuda = standin.cuda
    with standin.open(dynamic_bundle) as pipe:
        device: Any = pipe.device
        pipe(picture, **(FAST | {"decode_chunk_size": 1}))
        streams = {int(call.arguments[3]) for call in cuda.calls if call.name == "cuMemcpyDtoHAsync"}
        assert streams == {device._copies.handle}
        assert device.compute.handle not in streams
    assert {call.thread for call in cuda.calls if call.name == "cuMemcpyDtoHAsync"} >= {"decode"}


def test_a_stream_hands_out_frames_while_later_chunks_are_decoded(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    assert standin.cuda is not None
    asked = {k: v for k, v in FAST.items() if k != "output_type"} | {"num_frames": 9, "decode_chunk_size": 1}
    with standin.open(dynamic_bundle) as pipe:
        stream = pipe.stream(picture, **asked)
        next(stream)
        assert standin.trt is not None
        decoded = standin.trt.executions.count("vae_decoder")
        assert 1 <= decoded <= 4, "ahead, but not of all nine"
        assert len(list(stream)) == 8


def test_pinned_memory_does_not_grow_with_frames(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    assert standin.cuda is not None
    cuda = standin.cuda
    allocated = {}
    with standin.open(dynamic_bundle) as pipe:
        for frames in (4, 9):
            start = len(cuda.calls)
            list(
                pipe.stream(
                    picture,
                    **{
                        **{k: v for k, v in FAST.items() if k != "output_type"},
                        "num_frames": frames,
                        "decode_chunk_size": 2,
                    },
                )
            )
            frame = 72 * 96 * 3 * 2
            sizes = [int(c.arguments[0]) for c in cuda.calls[start:] if c.name == "cuMemHostAlloc"]
            allocated[frames] = sizes.count(frame)
    assert allocated == {4: 2, 9: 2}


def test_capture_that_is_refused_changes_nothing(
    standin: Rig, dynamic_bundle: Bundle, dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    assert standin.cuda is not None
    standin.cuda.refuse_capture = True
    with standin.open(dynamic_bundle) as pipe:
        frames = pipe(picture, **FAST).frames
        assert any("cuStreamBeginCapture" in reason for reason in pipe.device.refusals)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(frames, dynamic_pipe(picture, **FAST).frames)
    assert standin.cuda.count("cuGraphLaunch") == 0


def test_a_graph_that_cannot_be_made_changes_nothing(
    standin: Rig, dynamic_bundle: Bundle, dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    assert standin.cuda is not None
    standin.cuda.fail("cuGraphInstantiate", standin.cuda.CUresult.CUDA_ERROR_NOT_SUPPORTED)
    with standin.open(dynamic_bundle) as pipe:
        frames = pipe(picture, **FAST).frames
    np.testing.assert_array_equal(frames, dynamic_pipe(picture, **FAST).frames)


def test_contexts_that_cannot_be_captured_capture_themselves(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    """TensorRT for RTX then makes graphs of its own."""
    standin.install(dynamic_bundle)
    assert standin.trt is not None
    assert standin.cuda is not None
    standin.trt.refuse_capturable = True
    with standin.open(dynamic_bundle) as pipe:
        pipe(picture, **FAST)
        refused = pipe.device.refusals  # type: ignore[attr-defined]
    assert standin.cuda.count("cuGraphLaunch") == 0
    assert refused
    assert all("captured" in reason for reason in refused)


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_both_tensorrts_run_by_the_same_code(
    flavour: Any,
    standin: Rig,
    dynamic_bundle: Bundle,
    dynamic_pipe: VideoPipeline,
    picture: PIL.Image.Image,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plain TensorRT lacks all that only RTX has; a bundle for it is written as if it had built the plans."""
    import msgspec

    theirs = dynamic_pipe(picture, **FAST).frames
    built = dynamic_bundle.manifest.flavour
    assert built is not None
    changed = msgspec.structs.replace(built, name=flavour, version="10.13.0", target="sm89")
    bundle = Bundle(dynamic_bundle.path, msgspec.structs.replace(dynamic_bundle.manifest, flavour=changed))
    monkeypatch.setattr("svd_trt.runtime.engines.read_manifest", lambda path: bundle.manifest)
    with standin.open(bundle, backend=flavour) as pipe:
        assert flavour in pipe.device.name
        frames = pipe(picture, **FAST).frames
    np.testing.assert_array_equal(frames, theirs)


def test_compiled_kernels_are_kept_between_processes(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    compiled = []
    for _ in range(2):
        standin.install(dynamic_bundle, version="1.7.1.116")
        assert standin.trt is not None
        with standin.open(dynamic_bundle) as pipe:
            pipe(picture, **FAST)
        compiled.append(len(standin.trt.compiled))
        standin.trt = None
    assert compiled[0] > 0
    assert compiled[1] == 0


def test_the_thread_keeps_its_own_context(standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image) -> None:
    """A program that uses the GPU for other things finds its context as it was."""
    assert standin.cuda is not None
    cuda = standin.cuda
    with standin.open(dynamic_bundle) as pipe:
        pipe(picture, **FAST)
        _, current = cuda.cuCtxGetCurrent()
        assert int(current) == 0


def test_two_gpus(dynamic_bundle: Bundle, picture: PIL.Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, StandInCuda(devices=2))
    with rig.open(dynamic_bundle, device="cuda:0") as one, rig.open(dynamic_bundle, device="cuda:1") as two:
        assert "GPU 1" in two.device.name
        np.testing.assert_array_equal(one(picture, **FAST).frames, two(picture, **FAST).frames)
    with pytest.raises(BackendError, match=r"there is no cuda:2; this machine has cuda:0 .*, cuda:1 "):
        rig.open(dynamic_bundle, device="cuda:2")
    rig.check()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"version": "1.5.0"},
            r"from tensorrt-rtx 1\.7\.1\.116, and 1\.5\.0 is installed; build it again: svd-trt build",
        ),
        ({"flavour": "tensorrt"}, "its engines are for tensorrt-rtx, and tensorrt was asked for"),
    ],
)
def test_engines_of_another_tensorrt_are_refused(
    options: dict[str, Any], problem: str, standin: Rig, dynamic_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert standin.cuda is not None
    standin.install(dynamic_bundle, **options)
    if "flavour" in options:
        monkeypatch.setattr(standin.trt, "__version__", "10.13.0")
    with pytest.raises(BackendError, match=problem):
        VideoPipeline.open(dynamic_bundle, backend=options.get("flavour", "auto"))
    assert standin.cuda.count("cuDevicePrimaryCtxRetain") == 0, "before anything is allocated"


def test_what_the_runtime_says_of_an_engine_is_told(standin: Rig, dynamic_bundle: Bundle) -> None:
    import tests.standin.rtx as rtx

    standin.install(dynamic_bundle)
    assert standin.trt is not None
    assert standin.cuda is not None
    diagnostics = rtx.real.EngineInvalidityDiagnostics
    standin.trt.validity = (rtx.real.EngineValidity.INVALID, int(diagnostics.UNSUPPORTED_CC.value))
    with pytest.raises(BackendError, match=r"refuses its engines on .*\(sm89\): they were not built for this compute"):
        VideoPipeline.open(dynamic_bundle)
    standin.trt.validity = (rtx.real.EngineValidity.SUBOPTIMAL, 0)
    VideoPipeline.open(dynamic_bundle).close()
    assert standin.cuda.count("cuMemAlloc") == 0


def test_machines_without_what_it_takes(standin: Rig, dynamic_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert standin.cuda is not None
    with VideoPipeline.open(dynamic_bundle, device="cpu") as pipe:
        assert "CPU" in pipe.device.name
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"pip install 'svd-trt\[tensorrt\]', or choose --device cpu"):
        VideoPipeline.open(dynamic_bundle, backend="tensorrt")
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", StandInCuda(devices=0))
    assert gpu_count() == 0
    with pytest.raises(BackendError, match="shows no GPU"):
        VideoPipeline.open(dynamic_bundle, device="cuda")
    with VideoPipeline.open(dynamic_bundle) as pipe:
        assert "CPU" in pipe.device.name
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(ImportError, match=r"svd-trt\[gpu\]"):
        VideoPipeline.open(dynamic_bundle, device="cuda")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"device": "gpu"}, "write cpu, cuda, or cuda:1"),
        ({"device": "cuda:x"}, "write cpu, cuda, or cuda:1"),
        ({"backend": "tensorrt", "provider": "cuda"}, "part of ONNX Runtime"),
        ({"backend": "tensorrt", "device": "cpu"}, "does not run on cpu"),
        ({"provider": "cpu", "device": "cuda"}, "does not run on cuda"),
        ({"provider": "cuda", "device": "cpu"}, "does not run on cpu"),
        ({"vram_budget": 0}, "number of bytes above 0"),
        ({"vram_budget": "8GB"}, "number of bytes above 0"),
    ],
)
def test_contradictions(options: dict[str, Any], problem: str, dynamic_bundle: Bundle) -> None:
    with pytest.raises(ArgumentError, match=problem):
        VideoPipeline.open(dynamic_bundle, **options)


def test_a_gpu_that_is_full_at_the_start(
    dynamic_bundle: Bundle, picture: PIL.Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is free is the budget, so the refusal comes before the first allocation."""
    least = smallest_budget(dynamic_bundle.manifest, Request(frames=4, height=72, width=96)) or 0
    context = 300 * 10**6
    rig = Rig(monkeypatch, StandInCuda(total_bytes=context + least))
    with rig.open(dynamic_bundle) as pipe, pytest.raises(BudgetError, match="smallest budget that works"):
        pipe(picture, **FAST)
    rig.check()
    rig = Rig(monkeypatch, StandInCuda(total_bytes=context + int(least / 0.95) + 1))
    with rig.open(dynamic_bundle) as pipe:
        assert not pipe(picture, **FAST).memory.resident
    rig.check()


@pytest.mark.parametrize("on", [1, 3, 8, 12, 18])
def test_out_of_memory_at_any_allocation_leaves_nothing(
    on: int, standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    assert standin.cuda is not None
    cuda = standin.cuda
    with standin.open(dynamic_bundle) as pipe:
        cuda.fail("cuMemAlloc", cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY, on=on)
        with pytest.raises(DeviceMemoryError, match=r"cuMemAlloc \([\d,]+ bytes of .*\) failed: .* GB free of .*vram"):
            pipe(picture, **FAST)
        assert cuda.live.allocations == 0
        assert cuda.live.engines == 0
        pipe(picture, **FAST)


@pytest.mark.parametrize(
    "call", ["cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuEventRecord", "cuStreamWaitEvent", "cuMemHostAlloc"]
)
@pytest.mark.parametrize("on", [1, 6])
def test_a_call_that_fails_is_named_and_leaves_nothing(
    call: str, on: int, standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    assert standin.cuda is not None
    cuda = standin.cuda
    with standin.open(dynamic_bundle) as pipe:
        cuda.fail(call, cuda.CUresult.CUDA_ERROR_LAUNCH_FAILED, on=on)
        with pytest.raises(CudaError, match=rf"{call}.* failed: CUDA_ERROR_LAUNCH_FAILED, "):
            pipe(picture, **(FAST | {"decode_chunk_size": 1}))
    assert threading.active_count() < 20


def test_opening_that_fails_half_way_leaves_nothing(standin: Rig, dynamic_bundle: Bundle) -> None:
    assert standin.cuda is not None
    cuda = standin.cuda
    for call in ("cuDevicePrimaryCtxRetain", "cuStreamCreate", "cuEventCreate"):
        cuda.fail(call, cuda.CUresult.CUDA_ERROR_UNKNOWN)
        with pytest.raises(CudaError, match=call):
            standin.open(dynamic_bundle)
        cuda.assert_clean()


def test_wrappers() -> None:
    """Each alone: what it makes, how it fails, and that it can be closed twice."""
    cuda = StandInCuda()
    driver = Driver(cuda)
    driver.call("cuInit", 0)
    (gpu,) = list_gpus(driver)
    assert gpu.sm == "sm89"
    with Context(driver, gpu) as context:
        with DeviceMemory(context, 1000, "a tensor") as memory:
            assert memory.address % 256 == 0
            assert context.taken == 1000
            context.budget = 1500
            with pytest.raises(
                DeviceMemoryError, match=r"\(600 bytes of another\) failed: out of memory, 0.00 GB free"
            ):
                DeviceMemory(context, 600, "another")
            memory.close()
            assert context.taken == 0
        with Stream(context, "test") as stream, Event(stream) as first, Event(stream) as second:
            with (
                PinnedBuffer(context, (4, 4), np.float32, "host") as source,
                PinnedBuffer(context, (4, 4), np.float32, "host") as target,
                DeviceMemory(context, 64, "device") as memory,
            ):
                source.array[...] = np.arange(16).reshape(4, 4)
                first.record()
                stream.copy_in(memory.address, source.address, 64, "a tensor")
                stream.copy_out(target.address, memory.address, 64, "a tensor")
                second.record()
                second.wait()
                np.testing.assert_array_equal(target.array, source.array)
                assert second.seconds_since(first) >= 0
                cuda.fail("cuMemcpyHtoDAsync", cuda.CUresult.CUDA_ERROR_INVALID_VALUE)
                with pytest.raises(CudaError, match=r"cuMemcpyHtoDAsync \(64 bytes of a tensor\) failed: CUDA_ERROR_"):
                    stream.copy_in(memory.address, source.address, 64, "a tensor")
            stream.begin_capture()
            stream.end_capture().close()
        stream.close()
        first.close()
    context.close()
    cuda.assert_clean()


def test_without_a_driver_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(flags: int) -> None:
        raise RuntimeError("no libcuda")  # as cuda-python does

    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", SimpleNamespace(cuInit=missing))
    with pytest.raises(BackendError, match="no NVIDIA driver"):
        load_driver()


def test_weights_are_streamed_where_nothing_else_fits(
    standin: Rig,
    dynamic_bundle: Bundle,
    dynamic_pipe: VideoPipeline,
    picture: PIL.Image.Image,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bundle built with --weight-streaming, as if its builder had been told so."""
    import msgspec

    asked = FAST | {"decode_chunk_size": 1}
    theirs = dynamic_pipe(picture, **asked).frames
    manifest = dynamic_bundle.manifest
    entry = manifest.networks["denoiser"]
    assert entry.plan is not None
    streamed = msgspec.structs.replace(entry, plan=msgspec.structs.replace(entry.plan, weight_streaming=True))
    networks = manifest.networks | {"denoiser": streamed}
    bundle = Bundle(dynamic_bundle.path, msgspec.structs.replace(manifest, networks=networks))
    monkeypatch.setattr("svd_trt.runtime.engines.read_manifest", lambda path: bundle.manifest)
    request = Request(frames=4, height=72, width=96, decode_chunk=1)
    least = smallest_budget(bundle.manifest, request)
    without = smallest_budget(manifest, request)
    assert least is not None
    assert without is not None
    assert least < without
    assert standin.cuda is not None
    with standin.open(bundle, vram_budget=least) as pipe:
        made = pipe(picture, **asked)
        assert made.memory.streamed_bytes > 0
        assert standin.cuda.peak_bytes - 300 * 10**6 <= least
        pipe.vram_budget = without
        pipe.device.set_budget(without)
        assert pipe(picture, **asked).memory.streamed_bytes == 0, "the engine is loaded again with all its weights"
    assert furthest(made.frames, theirs) <= 1
