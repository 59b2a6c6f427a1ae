"""What the runtime makes of TensorRT's answers: errors, sizes, budgets of weights, and what can be captured."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.engine.memory import MemoryRequest, smallest_budget
from svd_trt.engine.temporary_files import hidden_sibling
from svd_trt.engine.tensorrt_import import find_tensorrt
from svd_trt.errors import BackendError, DeviceMemoryError
from svd_trt.runtime.cuda.tensorrt_errors import logger_of
from svd_trt.runtime.cuda.tensorrt_runtime import RuntimeCache, make_runtime
from tests.gpu.conftest import Rig, why_no_gpu
from tests.gpu.test_cuda_calls import with_changed_plans
from tests.gpu.test_pipeline import FAST
from tests.standin.context import IExecutionContext
from tests.standin.engine import IRuntimeCache
from tests.standin.rtx import real
from tests.standin.tensorrt import ICudaEngine

STEPS = FAST["num_inference_steps"]


class OtherLogger(real.ILogger):
    """The logger of another library in the process."""

    def __init__(self) -> None:
        real.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: Any, msg: str) -> None:
        self.lines.append(msg)


def fail_runs(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    """Make every run of an engine fail with ``message`` and with the general one that follows it."""

    def execute(self: IExecutionContext, stream: Any) -> bool:
        self._error(message)
        return False

    monkeypatch.setattr(IExecutionContext, "execute_async_v3", execute)


# Errors.


def test_an_error_says_what_happened_although_another_library_has_the_logger(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin.install(dynamic_bundle)
    other = standin.trt.first_logger = OtherLogger()
    fail_runs(monkeypatch, "IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (an illegal memory access)")
    with standin.open(dynamic_bundle) as pipe, pytest.raises(BackendError, match=r"illegal memory access\)$") as caught:
        pipe(picture, **FAST)
    assert not isinstance(caught.value, DeviceMemoryError)
    assert other.lines == []


def test_an_error_of_an_earlier_call_does_not_explain_a_later_one(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_runs(monkeypatch, "IExecutionContext::enqueueV3: Error Code 7: Internal Error (a shape is wrong)")
    with standin.open(dynamic_bundle) as pipe:
        with pipe.executor.session("image_encoder") as session:
            session._errors._recorder.report_error(real.ErrorCodeTRT.FAILED_ALLOCATION, "out of memory")  # type: ignore[attr-defined]
        logger_of(standin.trt).log(real.ILogger.ERROR, "Error Code 2: OutOfMemory (Requested size was 1 bytes)")
        with pytest.raises(BackendError, match=r"TensorRT failed in image_encoder: .*a shape is wrong") as caught:
            pipe(picture, **FAST)
    assert not isinstance(caught.value, DeviceMemoryError)


def test_a_full_gpu_is_recognised_by_the_code_of_the_error(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(self: IExecutionContext, stream: Any) -> bool:
        self._error("IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (no room)", "FAILED_ALLOCATION")
        return False

    monkeypatch.setattr(IExecutionContext, "execute_async_v3", execute)
    with standin.open(dynamic_bundle) as pipe, pytest.raises(DeviceMemoryError, match="try --vram-budget"):
        pipe(picture, **FAST)


def test_a_plan_that_does_not_load_is_built_again_only_if_it_is_damaged(
    standin: Rig, dynamic_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.standin.tensorrt import Runtime

    standin.install(dynamic_bundle)
    said = {
        "Error Code 1: Serialization (Serialization assertion header.magicTag failed)": "; build it again: `svd-trt",
        "Error Code 1: Cuda Runtime (an illegal memory access was encountered)": r"encountered\)$",
    }
    for message, end in said.items():

        def refuse(self: Runtime, plan: Any, message: str = message) -> None:
            self._error(f"IRuntime::deserializeCudaEngine: {message}")

        monkeypatch.setattr(Runtime, "deserialize_cuda_engine", refuse)
        with standin.open(dynamic_bundle) as pipe, pytest.raises(BackendError, match=end):
            pipe.executor.load("vae_encoder")


def test_the_real_tensorrt_for_rtx_reports_as_the_stand_in_does(dynamic_bundle: Bundle) -> None:
    """It loads without a GPU, and refuses junk in the same way with one."""
    runtime = make_runtime(find_tensorrt("tensorrt-rtx"))
    runtime.errors.clear()
    assert runtime.handle.deserialize_cuda_engine(b"junk" * 100) is None
    assert runtime.errors.recorded
    assert re.match(r"IRuntime::deserializeCudaEngine: Error Code 1: Serialization \(", runtime.errors.reason)
    assert logger_of(real).errors == []
    assert runtime.invalidity(b"junk" * 16) == ("MALFORMED_ENGINE",)
    assert {"sm75", "sm89", "sm120"} <= set(runtime.served)
    plan = dynamic_bundle.plan_path("denoiser")
    assert plan is not None
    if why_no_gpu() is not None:  # as with a driver that is too old for CUDA 13
        assert runtime.handle.deserialize_cuda_engine(b"junk" * 100) is None
        assert "checkMacros" in runtime.errors.messages[1], "a general message follows the one that says what happened"
        assert runtime.invalidity(plan.read_bytes()[: runtime.header_bytes]) == ()
        assert not runtime.errors.recorded
        assert "driver version is insufficient" in runtime.errors.reason


# Memory.


def test_activations_of_unknown_size_are_an_error(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    standin.install(dynamic_bundle)
    standin.trt.unknown_sizes = {"denoiser"}
    expected = r"TensorRT does not say how much memory denoiser needs: .*updateDeviceMemorySizeForShapes"
    with standin.open(dynamic_bundle) as pipe, pytest.raises(BackendError, match=expected):
        pipe(picture, **FAST)


def test_memory_that_tensorrt_does_not_take_is_an_error(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    standin.install(dynamic_bundle)
    standin.trt.refused_memory = {"vae_decoder"}
    with (
        standin.open(dynamic_bundle) as pipe,
        pytest.raises(BackendError, match="does not take memory for vae_decoder"),
    ):
        pipe(picture, **FAST)


@pytest.mark.parametrize("step", [4096, 10**12])
def test_a_rounded_budget_of_weights_is_counted_as_tensorrt_rounds_it(
    step: int, standin: Rig, dynamic_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a large step the engine keeps all weights on the GPU, whatever is asked."""
    bundle = with_changed_plans(dynamic_bundle, {"denoiser": {"weight_streaming": True}}, monkeypatch)
    plan = bundle.network("denoiser").plan
    assert plan is not None
    assert plan.weight_bytes is not None
    standin.install(bundle)
    standin.trt.budget_step = step
    with standin.open(bundle) as pipe:
        device: Any = pipe.device
        with device.open(bundle, "denoiser", streamed_bytes=100_000) as session:
            with device.context.current():
                session._give_back(session._borrow(0, own_graphs=False))  # the first context loads these weights
            taken = device.context.taken
            assert taken == standin.cuda.bytes_in_use
            assert taken <= plan.weight_bytes - (100_000 if step == 4096 else 0)
        assert device.context.taken == 0


def test_a_refused_budget_of_weights_is_an_error(
    standin: Rig, dynamic_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setter returns nothing, and the engine keeps all weights on the GPU."""
    bundle = with_changed_plans(dynamic_bundle, {"denoiser": {"weight_streaming": True}}, monkeypatch)
    standin.install(bundle)

    def refuse(self: ICudaEngine, budget: int) -> None:
        self._error(f"ICudaEngine::setWeightStreamingBudgetV2: Error Code 3: API Usage Error ({budget} is refused)")

    budget = ICudaEngine.weight_streaming_budget_v2.setter(refuse)
    monkeypatch.setattr(ICudaEngine, "weight_streaming_budget_v2", budget)
    expected = r"TensorRT does not stream weights of denoiser: .*is refused\)"
    with standin.open(bundle) as pipe:
        with pytest.raises(BackendError, match=expected):
            pipe.device.open(bundle, "denoiser", streamed_bytes=100_000)
        assert pipe.device.context.taken == 0  # type: ignore[attr-defined]


# Captures.


def test_each_captured_run_has_a_context_of_its_own(
    standin: Rig, dynamic_bundle: Bundle, dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    """The stand-in refuses to launch a graph whose context was changed. Other shapes and a second video change some."""
    with standin.open(dynamic_bundle) as pipe:
        for frames in (4, 4, 9, 4):
            arguments = FAST | {"num_frames": frames}
            made = pipe(picture, **arguments).frames
            np.testing.assert_array_equal(made, dynamic_pipe(picture, **arguments).frames)
        with pipe.executor.session("denoiser") as session:
            kept = [context for places in session._in_graphs.values() for context in places.contexts.values()]  # type: ignore[attr-defined]
            free = sum(map(len, session._free.values()))  # type: ignore[attr-defined]
    assert standin.cuda.count("cuGraphLaunch") == 3 * (STEPS - 2) + STEPS
    used = {profile for network, profile in standin.trt.profiles if network == "denoiser"}
    assert len(kept) == 2
    assert len(kept) + free == 2 * len(used), "contexts of closed graphs are used again"


def test_a_context_is_asked_before_the_capture_begins(
    standin: Rig, dynamic_bundle: Bundle, dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    standin.install(dynamic_bundle)
    standin.trt.capturable = lambda network, sizes: sizes["frames"] != 4
    with standin.open(dynamic_bundle) as pipe:
        np.testing.assert_array_equal(pipe(picture, **FAST).frames, dynamic_pipe(picture, **FAST).frames)
        assert standin.cuda.count("cuStreamBeginCapture") == 0
        assert pipe.device.notes == ["TensorRT for RTX makes the CUDA graphs of denoiser itself"]
        pipe(picture, **(FAST | {"num_frames": 5}))
        assert standin.cuda.count("cuGraphLaunch") == STEPS - 2, "the answer depends on the shapes"
    assert standin.trt.asked_in_capture == 0


def test_tensorrt_rtx_captures_runs_itself_and_only_once(
    standin: Rig, dynamic_bundle: Bundle, dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    """RTX captures again when an address changes, so an even and an odd step need a context each."""
    standin.install(dynamic_bundle)
    standin.trt.capturable = lambda network, sizes: False
    with standin.open(dynamic_bundle) as pipe:
        for _ in range(2):
            np.testing.assert_array_equal(pipe(picture, **FAST).frames, dynamic_pipe(picture, **FAST).frames)
        assert pipe.device.notes == ["TensorRT for RTX makes the CUDA graphs of denoiser itself"]
    assert standin.cuda.count("cuGraphLaunch") == 0
    assert standin.trt.own_captures == ["denoiser"] * 2


def test_engines_that_are_loaded_again_capture_themselves_again(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    """The smallest budget loads one engine at a time, and runs one branch at a time: two runs in each step."""
    standin.install(dynamic_bundle)
    standin.trt.capturable = lambda network, sizes: False
    least = smallest_budget(dynamic_bundle.manifest, MemoryRequest(frames=4, height=72, width=96))
    with standin.open(dynamic_bundle, vram_budget=least) as pipe:
        for _ in range(2):
            pipe(picture, **FAST)
    assert standin.trt.own_captures == ["denoiser"] * 8


def test_runs_with_streamed_weights_are_not_captured_by_tensorrt_rtx(
    standin: Rig, dynamic_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, picture: PIL.Image.Image
) -> None:
    bundle = with_changed_plans(dynamic_bundle, {"denoiser": {"weight_streaming": True}}, monkeypatch)
    standin.install(bundle)
    standin.trt.capturable = lambda network, sizes: False
    with standin.open(bundle) as pipe:
        plan = pipe.executor.plan
        monkeypatch.setattr(pipe.executor, "plan", lambda request: _streaming(plan(request)))
        for frames in (4, 5):
            assert pipe(picture, **(FAST | {"num_frames": frames})).memory.streamed_bytes > 0
        refusals = pipe.device.refusals  # type: ignore[attr-defined]
        assert refusals == ["TensorRT does not let denoiser be captured"], "every loop adds its own"
    assert standin.trt.own_captures == []


def _streaming(plan: Any) -> Any:
    from dataclasses import replace

    return replace(plan, streamed_bytes=100_000)


# Compiled kernels.


def test_kernels_are_kept_after_the_first_video(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image, tmp_path: Path
) -> None:
    """A server may run for months, and end without closing its pipeline."""
    with standin.open(dynamic_bundle) as pipe:
        pipe(picture, **FAST)
        kept = list((tmp_path / "cache").rglob("*.bin"))
        assert len(kept) == 4
        before = {file: file.stat().st_mtime_ns for file in kept}
        pipe(picture, **FAST)
        assert before == {file: file.stat().st_mtime_ns for file in kept}, "nothing new was compiled"


def test_a_cache_that_cannot_be_serialized_is_not_kept(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(IRuntimeCache, "serialize", lambda self: None)
    with standin.open(dynamic_bundle) as pipe:
        pipe(picture, **FAST)
    assert list((tmp_path / "cache").rglob("*.bin")) == []


def test_what_a_killed_process_left_of_its_kernels_is_removed(tmp_path: Path) -> None:
    leftover = hidden_sibling(tmp_path / "kernels.bin", ".bin")
    leftover.write_bytes(b"half of the ker")
    cache = RuntimeCache(tmp_path / "kernels.bin")
    cache._cache = SimpleNamespace(serialize=lambda: b"the kernels")
    cache.save()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"kernels.bin": b"the kernels"}


@pytest.mark.parametrize("capturable", [True, False])
def test_nothing_is_compiled_twice(
    capturable: bool, standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    """Two videos whose last chunk is smaller, and steps that change to contexts which capture themselves."""
    standin.install(dynamic_bundle)
    standin.trt.capturable = lambda network, sizes: capturable
    arguments = FAST | {"num_frames": 7, "decode_chunk_size": 3}
    with standin.open(dynamic_bundle) as pipe:
        for _ in range(2):
            pipe(picture, **arguments)
    compiled = standin.trt.compiled
    assert len([kernel for kernel in compiled if kernel.startswith("vae_decoder")]) == 2
    assert len(compiled) == len(set(compiled)) == 5
