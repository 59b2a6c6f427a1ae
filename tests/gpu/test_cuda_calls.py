"""The CUDA device on the stand-in: the driver calls that it makes, their order, and what happens if one fails."""

from __future__ import annotations

import gc
import threading
from typing import Any

import msgspec
import numpy as np
import PIL.Image
import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.engine.driver import list_gpus, load_driver
from svd_trt.engine.memory import MemoryRequest, smallest_budget
from svd_trt.errors import ArgumentError, BackendError, BudgetError, CudaError, DeviceMemoryError
from svd_trt.runtime.cuda.buffers import CudaBuffer, DeviceMemory, PinnedBuffer
from svd_trt.runtime.cuda.context import Context
from svd_trt.runtime.cuda.streams import CudaEvent, Stream
from tests.gpu.conftest import Rig
from tests.gpu.test_pipeline import FAST, STREAMED, largest_difference
from tests.standin.cuda import StandInCuda
from tests.standin.devices import CONTEXT_BYTES

# The calls that a step may make after the first run: none allocates, frees, or waits for the whole stream.
IN_A_STEP = {
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuMemcpyDtoDAsync",
    "cuGraphLaunch",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuEventElapsedTime",
}


def with_changed_plans(bundle: Bundle, plans: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """``bundle`` with changed entries in its manifest, such as another size of the activations of a plan."""
    networks: dict[Any, Any] = dict(bundle.manifest.networks)
    for name, changes in plans.items():
        plan = networks[name].plan
        if (needed := changes.pop("activation_bytes", None)) is not None:
            profiles = tuple(msgspec.structs.replace(p, activation_bytes=needed) for p in plan.profiles)
            plan = msgspec.structs.replace(plan, profiles=profiles)
        plan = msgspec.structs.replace(plan, **changes)
        networks[name] = msgspec.structs.replace(networks[name], plan=plan)
    changed = Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, networks=networks))
    monkeypatch.setattr("svd_trt.runtime.engines.read_manifest", lambda path: changed.manifest)
    return changed


def test_a_step_allocates_nothing_and_waits_only_for_events(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    cuda = standin.cuda
    calls_at_steps: list[int] = []

    def note(stage: str, done: int, total: int) -> None:
        if stage == "denoise" and done:
            calls_at_steps.append(len(cuda.calls))

    with standin.open(dynamic_bundle) as pipe:
        pipe(picture, **FAST)
        pipe(picture, progress=note, **FAST)
        steps = [call.name for call in cuda.calls[calls_at_steps[0] : calls_at_steps[-1]]]
    assert set(steps) <= IN_A_STEP
    assert steps.count("cuGraphLaunch") == FAST["num_inference_steps"] - 2, (
        "two steps are in flight when the first is done"
    )
    assert steps.count("cuMemcpyDtoDAsync") == FAST["num_inference_steps"] - 2, "a step copies its row of coefficients"


def test_at_most_two_steps_are_in_flight(standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image) -> None:
    """The next step is queued while one runs, so the GPU does not idle, and a cancelled run still ends soon."""
    cuda = standin.cuda
    queued: list[int] = []

    def note(stage: str, done: int, total: int) -> None:
        if stage == "denoise" and done:
            queued.append(cuda.count("cuGraphLaunch") - done)

    arguments = FAST | {"num_inference_steps": 8}
    with standin.open(dynamic_bundle) as pipe:
        pipe(picture, **arguments)
        before = cuda.count("cuGraphLaunch")
        pipe(picture, progress=note, **arguments)
    assert [count - before for count in queued] == [1] * 7 + [0]


def test_frames_are_copied_on_a_separate_stream(standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image) -> None:
    cuda = standin.cuda
    with standin.open(dynamic_bundle) as pipe:
        device: Any = pipe.device
        pipe(picture, **(FAST | {"decode_chunk_size": 1}))
        streams = {int(call.arguments[3]) for call in cuda.calls if call.name == "cuMemcpyDtoHAsync"}
        assert streams == {device._copies.handle}
        assert device.compute.handle not in streams
    assert {call.thread for call in cuda.calls if call.name == "cuMemcpyDtoHAsync"} >= {"decode"}


def test_a_stream_yields_frames_while_later_chunks_are_decoded(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    arguments = STREAMED | {"num_frames": 9, "decode_chunk_size": 1}
    with standin.open(dynamic_bundle) as pipe:
        stream = pipe.stream(picture, **arguments)
        next(stream)
        decoded = standin.trt.executions.count("vae_decoder")
        assert 1 <= decoded <= 4, "the decode runs ahead, but does not decode all nine chunks"
        assert len(list(stream)) == 8


def test_pinned_memory_does_not_grow_with_the_number_of_frames(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    cuda = standin.cuda
    allocated = {}
    with standin.open(dynamic_bundle) as pipe:
        for frames in (4, 9):
            start = len(cuda.calls)
            list(
                pipe.stream(
                    picture,
                    **{
                        **STREAMED,
                        "num_frames": frames,
                        "decode_chunk_size": 2,
                    },
                )
            )
            frame = 72 * 96 * 3 * 2
            sizes = [int(c.arguments[0]) for c in cuda.calls[start:] if c.name == "cuMemHostAlloc"]
            allocated[frames] = sizes.count(frame)
    assert allocated == {4: 2, 9: 2}


def test_frames_are_the_same_if_capture_is_refused(
    standin: Rig, dynamic_bundle: Bundle, dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    standin.cuda.refuse_capture = True
    with standin.open(dynamic_bundle) as pipe:
        frames = pipe(picture, **FAST).frames
        assert any("cuStreamBeginCapture" in reason for reason in pipe.device.refusals)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(frames, dynamic_pipe(picture, **FAST).frames)
    assert standin.cuda.count("cuGraphLaunch") == 0


def test_frames_are_the_same_if_no_graph_can_be_instantiated(
    standin: Rig, dynamic_bundle: Bundle, dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    standin.cuda.fail("cuGraphInstantiate", standin.cuda.CUresult.CUDA_ERROR_NOT_SUPPORTED)
    with standin.open(dynamic_bundle) as pipe:
        frames = pipe(picture, **FAST).frames
    np.testing.assert_array_equal(frames, dynamic_pipe(picture, **FAST).frames)


@pytest.mark.parametrize("tensorrt", ["tensorrt", "tensorrt-rtx"])
def test_tensorrt_and_tensorrt_rtx_give_the_same_frames(
    tensorrt: Any,
    standin: Rig,
    dynamic_bundle: Bundle,
    dynamic_pipe: VideoPipeline,
    picture: PIL.Image.Image,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stand-in for plain TensorRT lacks the names of RTX. The manifest says that it built the plans."""
    theirs = dynamic_pipe(picture, **FAST).frames
    built = dynamic_bundle.manifest.tensorrt
    assert built is not None
    changed = msgspec.structs.replace(built, name=tensorrt, version="10.13.0", target="sm89")
    bundle = Bundle(dynamic_bundle.path, msgspec.structs.replace(dynamic_bundle.manifest, tensorrt=changed))
    monkeypatch.setattr("svd_trt.runtime.engines.read_manifest", lambda path: bundle.manifest)
    with standin.open(bundle, backend=tensorrt) as pipe:
        assert tensorrt in pipe.device.name
        frames = pipe(picture, **FAST).frames
    np.testing.assert_array_equal(frames, theirs)


def test_compiled_kernels_are_cached_on_disk(standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image) -> None:
    compiled = []
    for _ in range(2):
        standin.install(dynamic_bundle, version="1.7.1.116")
        with standin.open(dynamic_bundle) as pipe:
            pipe(picture, **FAST)
        compiled.append(len(standin.trt.compiled))
        standin.trt = None
    assert compiled[0] > 0
    assert compiled[1] == 0


def test_the_thread_of_the_caller_keeps_its_context(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    """A program that uses the GPU for other work as well has the same context after a run."""
    cuda = standin.cuda
    with standin.open(dynamic_bundle) as pipe:
        pipe(picture, **FAST)
        _, current = cuda.cuCtxGetCurrent()
        assert int(current) == 0


def test_free_memory_is_the_default_budget(
    dynamic_bundle: Bundle, picture: PIL.Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the GPU is too full, the run is refused before the first allocation."""
    least = smallest_budget(dynamic_bundle.manifest, MemoryRequest(frames=4, height=72, width=96)) or 0
    rig = Rig(monkeypatch, StandInCuda(total_bytes=CONTEXT_BYTES + least))
    with rig.open(dynamic_bundle) as pipe, pytest.raises(BudgetError, match="smallest budget that works"):
        pipe(picture, **FAST)
    rig.check()
    rig = Rig(monkeypatch, StandInCuda(total_bytes=CONTEXT_BYTES + int(least / 0.95) + 1))
    with rig.open(dynamic_bundle) as pipe:
        assert not pipe(picture, **FAST).memory.resident
    rig.check()


@pytest.mark.parametrize("on", [1, 3, 8, 12, 18])
def test_a_failed_allocation_leaks_nothing(
    on: int, standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
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
def test_a_failed_call_is_named_and_leaks_nothing(
    call: str, on: int, standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    cuda = standin.cuda
    with standin.open(dynamic_bundle) as pipe:
        cuda.fail(call, cuda.CUresult.CUDA_ERROR_LAUNCH_FAILED, on=on)
        with pytest.raises(CudaError, match=rf"{call}.* failed: CUDA_ERROR_LAUNCH_FAILED, "):
            pipe(picture, **(FAST | {"decode_chunk_size": 1}))
    assert threading.active_count() < 20


def test_wrappers_work_report_failures_and_close_twice(rig: Rig) -> None:
    """Memory, streams, events and graphs by themselves."""
    driver = load_driver()
    gpu = list_gpus(driver)[0]
    assert gpu.sm == "sm89" if rig.cuda else gpu.sm.startswith("sm")
    with Context(driver, gpu) as context:
        with DeviceMemory(context, 1000, "a tensor") as memory:
            assert memory.address % 256 == 0
            assert context.taken == 1000
            context.budget = 1500
            with pytest.raises(
                DeviceMemoryError, match=r"\(600 bytes of another\) failed: out of memory, 500 bytes free"
            ):
                DeviceMemory(context, 600, "another")
            memory.close()
            assert context.taken == 0
        context.budget = None
        with (
            Stream(context, "test") as stream,
            CudaEvent(stream) as first,
            CudaEvent(stream) as second,
            PinnedBuffer(context, (4, 4), np.float32, "host") as source,
            PinnedBuffer(context, (4, 4), np.float32, "host") as target,
            CudaBuffer.allocate(context, (4, 4), np.float32, "device") as one,
            CudaBuffer.allocate(context, (4, 4), np.float32, "device") as two,
        ):
            source.array[...] = np.arange(16).reshape(4, 4)
            first.record()
            stream.copy_in(one.address, source.address, 64, "a tensor")
            stream.copy_within(two.rows(0, 1).address, one.rows(2, 3).address, 16, "a row")
            stream.copy_within(two.rows(1, 4).address, one.rows(1, 4).address, 48, "rows")
            stream.copy_out(target.address, two.address, 64, "a tensor")
            second.record()
            second.wait()
            np.testing.assert_array_equal(target.array, source.array[[2, 1, 2, 3]])
            assert second.seconds_since(first) >= 0
            stream.begin_capture()
            stream.copy_within(two.address, one.address, 64, "a tensor")
            with stream.end_capture() as graph:
                graph.launch(stream)
                stream.copy_out(target.address, two.address, 64, "a tensor")
                stream.synchronize()
            np.testing.assert_array_equal(target.array, source.array)
            if rig.cuda:  # a real driver refuses the address without this
                rig.cuda.fail("cuMemcpyHtoDAsync", rig.cuda.CUresult.CUDA_ERROR_INVALID_VALUE)
            with pytest.raises(CudaError, match=r"cuMemcpyHtoDAsync \(64 bytes of a tensor\) failed: CUDA_ERROR_"):
                stream.copy_in(0, source.address, 64, "a tensor")
        stream.close()
        first.close()
    context.close()
    with pytest.raises(BackendError, match="was released"):
        context.memory()


def test_weights_are_streamed_if_nothing_else_fits(
    standin: Rig,
    dynamic_bundle: Bundle,
    dynamic_pipe: VideoPipeline,
    picture: PIL.Image.Image,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The manifest says that the bundle was built with --weight-streaming."""
    arguments = FAST | {"decode_chunk_size": 1}
    theirs = dynamic_pipe(picture, **arguments).frames
    # The other networks get little memory, as at full size, so that the denoiser decides.
    less = {name: {"activation_bytes": 1 << 20} for name in ("image_encoder", "vae_encoder", "vae_decoder")}
    plain = with_changed_plans(dynamic_bundle, less, monkeypatch)
    manifest = plain.manifest
    bundle = with_changed_plans(plain, {"denoiser": {"weight_streaming": True}}, monkeypatch)
    request = MemoryRequest(frames=4, height=72, width=96, decode_chunk_size=1)
    least = smallest_budget(bundle.manifest, request)
    without = smallest_budget(manifest, request)
    assert least is not None
    assert without is not None
    assert least < without
    with standin.open(bundle, vram_budget=least) as pipe:
        made = pipe(picture, **arguments)
        assert made.memory.streamed_bytes > 0
        assert standin.cuda.peak_bytes <= least
        pipe.executor.vram_budget = without
        pipe.device.set_budget(without)
        assert pipe(picture, **arguments).memory.streamed_bytes == 0, (
            "the engine was not loaded again with all its weights"
        )
    assert largest_difference(made.frames, theirs) <= 1


@pytest.mark.parametrize("counts", [(9, 2), *(pytest.param(c, marks=pytest.mark.slow) for c in ((2, 9, 2), (9, 4, 9)))])
def test_videos_of_different_lengths_stay_within_the_budget(
    counts: tuple[int, ...],
    standin: Rig,
    dynamic_bundle: Bundle,
    picture: PIL.Image.Image,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A short video leaves all engines loaded. A longer one may need them one at a time and has to release them."""
    # The encoders get little memory, as at full size. Without this they would decide at every length.
    less = {"image_encoder": {"activation_bytes": 1 << 20}, "vae_encoder": {"activation_bytes": 1 << 20}}
    bundle = with_changed_plans(dynamic_bundle, less, monkeypatch)
    least = smallest_budget(bundle.manifest, MemoryRequest(frames=9, height=72, width=96)) or 0
    budgets = range(least, 2 * least, least // 6)
    residency = set()
    for budget in budgets:
        standin.cuda = StandInCuda()
        standin.use(standin.cuda)
        with standin.open(bundle, vram_budget=budget) as pipe:
            for frames in counts:
                residency.add(pipe(picture, **(FAST | {"num_frames": frames})).memory.resident)
        assert standin.cuda.peak_bytes <= budget
        standin.check()
    assert residency == {True, False}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("what", ["another video", "a longer video", "release", "close"])
def test_a_callback_cannot_use_its_own_pipeline(
    what: str, device: str, standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    def meddle(pipe: VideoPipeline, step: int, timestep: float, values: dict[str, Any]) -> None:
        if what == "another video":
            pipe(picture, **FAST)
        elif what == "a longer video":
            pipe(picture, **(FAST | {"num_frames": 9}))
        else:
            getattr(pipe, what)()

    with standin.open(dynamic_bundle, device=device) as pipe:
        expected = pipe(picture, **FAST).frames
        with pytest.raises(ArgumentError, match="open another pipeline"):
            pipe(picture, callback_on_step_end=meddle, **FAST)
        np.testing.assert_array_equal(pipe(picture, **FAST).frames, expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_closed_pipeline_raises(device: str, standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image) -> None:
    pipe = standin.open(dynamic_bundle, device=device)
    pipe(picture, **FAST)
    pipe.close()
    pipe.close()
    with pytest.raises(BackendError, match="is closed; open it again"):
        pipe(picture, **FAST)
    with pytest.raises(BackendError, match="is closed; open it again"):
        pipe.stream(picture)


def test_ctrl_c_during_a_capture_leaves_the_pipeline_usable(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Stream.begin_capture

    def interrupted(self: Stream) -> None:
        original(self)
        monkeypatch.setattr(Stream, "begin_capture", original)
        raise KeyboardInterrupt

    with standin.open(dynamic_bundle) as pipe:
        monkeypatch.setattr(Stream, "begin_capture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipe(picture, **FAST)
        pipe(picture, **FAST)


def test_a_stream_in_a_reference_cycle_does_not_hang(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    """The garbage collector may close the stream while this thread uses a network that the decode thread needs."""
    arguments = STREAMED | {"num_frames": 9, "decode_chunk_size": 1}
    with standin.open(dynamic_bundle) as pipe:
        holder: list[Any] = [pipe.stream(picture, **arguments)]
        next(holder[0])
        holder.append(holder)
        with pipe.executor.session("denoiser"):
            del holder
            gc.collect()
        assert pipe(picture, **FAST).frames.std() > 5
