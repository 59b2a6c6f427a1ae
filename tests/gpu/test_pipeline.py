"""Videos of a bundle on a GPU against videos of the same bundle by ONNX Runtime on the CPU."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.engine.memory import MemoryRequest, plan_memory, smallest_budget
from svd_trt.errors import BackendError, BudgetError, DeviceMemoryError, SvdTrtError
from svd_trt.runtime.settings import guided_steps_of
from tests.gpu.conftest import Rig

FAST: dict[str, Any] = {
    "num_frames": 4,
    "num_inference_steps": 5,
    "height": 72,
    "width": 96,
    "seed": 42,
    "output_type": "np",
}
UNPLANNED_BYTES = 800 << 20  # a real context, and memory of engines that the builder does not report

STREAMED = {name: value for name, value in FAST.items() if name != "output_type"}
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "fewest": {"num_frames": 2, "num_inference_steps": 1},
    "two-steps": {"num_inference_steps": 2},
    "chunks": {"num_frames": 7, "decode_chunk_size": 2},
    "odd-size": {"height": 40, "width": 136},
    "unguided": {"max_guidance_scale": 1.0},
    "guidance-in-the-middle": {"guidance_interval": (0.5, 200), "sampler": "dpmpp-2m", "num_videos_per_prompt": 3},
    "fresh-noise": {"sampler": "lcm", "num_videos_per_prompt": 3},
    "longer": {"num_frames": 5, "extend": 3},
    "videos-over-batches": {"num_frames": 3, "num_videos_per_prompt": 3, "decode_chunk_size": 4},
}
REQUEST = MemoryRequest(frames=4, height=72, width=96)


def largest_difference(ours: Any, theirs: Any) -> int:
    """The largest difference of two videos in levels of 255. It is 0 on the stand-in; a real GPU rounds differently."""
    assert theirs.std() > 5, "flat frames would match any other flat frames"
    return int(np.abs(ours.astype(int) - theirs).max())


@pytest.mark.parametrize("case", CASES)
def test_frames_are_equal_to_the_cpu(
    case: str,
    rig: Rig,
    dynamic_bundle: Bundle,
    dynamic_pipe: VideoPipeline,
    picture: PIL.Image.Image,
    record_property: Any,
) -> None:
    arguments = FAST | CASES[case]
    with rig.open(dynamic_bundle) as pipe:
        first = pipe(picture, **arguments).frames
        again = pipe(picture, **arguments).frames
    theirs = dynamic_pipe(picture, **arguments).frames
    difference = largest_difference(first, theirs)
    record_property("levels_from_cpu", difference)
    assert difference <= (0 if rig.cuda else 2)
    np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize("budget", ["smallest", "medium", "ample"])
def test_memory_stays_within_the_budget(
    budget: str,
    rig: Rig,
    dynamic_bundle: Bundle,
    dynamic_pipe: VideoPipeline,
    picture: PIL.Image.Image,
    record_property: Any,
) -> None:
    """The smallest budget loads engines one at a time, splits the guidance, and decodes single frames."""
    least = smallest_budget(dynamic_bundle.manifest, REQUEST)
    most = plan_memory(dynamic_bundle.manifest, REQUEST, None).total_bytes
    assert least is not None
    assert most is not None
    allowed = {"smallest": least, "medium": (least + most) // 2, "ample": most}[budget]
    before = rig.used()
    with rig.open(dynamic_bundle, vram_budget=allowed) as pipe:
        with rig.watching() as peak:
            made = [pipe(picture, **FAST) for _ in range(2)]
        record_property("bytes_over_the_plan", peak() - before - (made[0].memory.total_bytes or 0))
        assert peak() - before <= allowed + UNPLANNED_BYTES
        if rig.cuda:
            assert rig.cuda.peak_bytes <= allowed
    plan = made[0].memory
    assert (plan.resident, plan.split_guidance) == {
        "smallest": (False, True),
        "medium": (plan.resident, plan.split_guidance),
        "ample": (True, False),
    }[budget]
    theirs = dynamic_pipe(picture, **FAST, decode_chunk_size=plan.decode_chunk_size).frames
    for one in made:
        assert largest_difference(one.frames, theirs) <= (1 if rig.cuda else 2)
    gc.collect()
    if rig.cuda:
        assert rig.used() == before


def test_several_videos_stay_within_the_smallest_budget(
    standin: Rig, dynamic_bundle: Bundle, dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    """One engine at a time: the denoiser and the decoder are loaded again for each of the two groups of videos."""
    least = smallest_budget(dynamic_bundle.manifest, MemoryRequest(frames=4, height=72, width=96, videos=3))
    assert least is not None
    with standin.open(dynamic_bundle, vram_budget=least) as pipe:
        made = pipe(picture, num_videos_per_prompt=3, **FAST)
        assert standin.cuda is not None
        assert standin.cuda.peak_bytes <= least
    assert not made.memory.resident
    chunk = made.memory.decode_chunk_size
    theirs = dynamic_pipe(picture, num_videos_per_prompt=3, decode_chunk_size=chunk, **FAST).frames
    assert largest_difference(made.frames, theirs) <= 1


def test_too_small_a_budget_is_refused_before_anything_is_loaded(
    rig: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    with rig.open(dynamic_bundle, vram_budget=1_000_000) as pipe:
        with pytest.raises(BudgetError, match="smallest budget that works"):
            pipe(picture, **FAST)
        with pytest.raises(BudgetError):
            pipe.stream(picture, **STREAMED)


@pytest.mark.parametrize(
    ("image", "more", "problem"),
    [
        (Path("none.png"), {}, "none.png"),
        (None, {"latents": [1.0]}, "latents must be"),
    ],
)
def test_every_argument_is_checked_before_anything_is_loaded(
    image: Path | None, more: dict[str, Any], problem: str, standin: Rig, dynamic_bundle: Bundle, picture: Any
) -> None:
    with standin.open(dynamic_bundle) as pipe:
        with pytest.raises(SvdTrtError, match=problem):
            pipe.stream(picture if image is None else image, **(STREAMED | more))
        assert standin.cuda.count("cuMemAlloc") == 0
        assert not pipe.executor._engines._loaded


def test_frames_are_the_same_with_and_without_graphs(
    rig: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image, record_property: Any
) -> None:
    frames = {}
    for graphs in (True, False):
        with rig.open(dynamic_bundle) as pipe:
            pipe.device.use_graphs = graphs  # type: ignore[attr-defined]
            frames[graphs] = pipe(picture, **FAST, num_videos_per_prompt=2).frames
            refused = pipe.device.refusals  # type: ignore[attr-defined]
            record_property("graphs_refused", "; ".join(refused) or "none")
            if rig.cuda and graphs:
                groups = 1  # both videos together
                assert rig.cuda.count("cuGraphLaunch") == groups * (FAST["num_inference_steps"] - 2)
                assert not refused
    np.testing.assert_array_equal(frames[True], frames[False])


@pytest.mark.parametrize("split", [False, True])
def test_steps_with_and_without_guidance_stay_captured(
    split: bool, rig: Rig, dynamic_bundle: Bundle, dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    """Each kind of step has a graph for even and one for odd steps, which later videos launch without a capture.

    The smallest budget runs the branches one after the other.
    """
    arguments: dict[str, Any] = FAST | {"num_inference_steps": 14, "guidance_interval": (0.1, 100)}
    request = replace(REQUEST, guided_in_part=True)
    budget = smallest_budget(dynamic_bundle.manifest, request) if split else None
    with rig.open(dynamic_bundle, vram_budget=budget) as pipe:
        first = pipe(picture, **arguments)
        assert first.memory.split_guidance == split
        guided = guided_steps_of(first.parameters, first.parameters.sigmas)
        assert [kind for kind, _ in groupby(guided)] == [False, True, False]
        captured = rig.cuda.count("cuStreamBeginCapture") if rig.cuda else 4
        again = pipe(picture, **arguments)
        if rig.cuda:
            assert captured == 4
            assert rig.cuda.peak_bytes <= (first.memory.total_bytes or 0)
            if not split:  # which also loads the denoiser again for every video, so its graphs are made again
                assert rig.cuda.count("cuStreamBeginCapture") == captured
                assert rig.cuda.count("cuGraphLaunch") == 2 * len(guided) - 4, "all but the first run of each graph"
        assert not pipe.device.refusals  # type: ignore[attr-defined]
    theirs = dynamic_pipe(picture, decode_chunk_size=first.memory.decode_chunk_size, **arguments).frames
    assert largest_difference(first.frames, theirs) <= (int(split) if rig.cuda else 2)
    np.testing.assert_array_equal(first.frames, again.frames)


def test_a_callback_that_changes_latents_where_guidance_begins(
    rig: Rig, dynamic_bundle: Bundle, dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    """The step that is enqueued again is of the other kind than the one before."""
    arguments: dict[str, Any] = FAST | {"guidance_interval": (0.5, 200)}

    def change(pipe: Any, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": values["latents"] * 0.9}

    with rig.open(dynamic_bundle) as pipe:
        ours = pipe(picture, callback_on_step_end=change, **arguments).frames
    theirs = dynamic_pipe(picture, callback_on_step_end=change, **arguments).frames
    assert largest_difference(ours, theirs) <= (0 if rig.cuda else 2)


@pytest.mark.parametrize("sampler", ["euler", "lcm"])
def test_a_callback_sees_and_changes_latents(
    sampler: str, rig: Rig, dynamic_bundle: Bundle, dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    """On a GPU, the next step is enqueued before the callback returns changed latents, and then repeated."""
    options = FAST | {"sampler": sampler}
    seen: dict[str, list[Any]] = {"gpu": [], "cpu": []}

    def changing(where: str) -> Any:
        def call(pipe: Any, step: int, timestep: float, values: dict[str, Any]) -> dict[str, Any] | None:
            seen[where].append((step, timestep, values["latents"].copy()))
            return {"latents": values["latents"] * 0.9} if step in (1, 2, 4) else None

        return call

    with rig.open(dynamic_bundle) as pipe:
        ours = [pipe(picture, callback_on_step_end=changing("gpu"), **options).frames for _ in range(2)]
    theirs = dynamic_pipe(picture, callback_on_step_end=changing("cpu"), **options).frames
    np.testing.assert_array_equal(ours[0], ours[1])
    assert largest_difference(ours[0], theirs) <= (0 if rig.cuda else 2)
    assert [entry[:2] for entry in seen["gpu"][:5]] == [entry[:2] for entry in seen["cpu"]]
    for (_, _, gpu), (_, _, cpu) in zip(seen["gpu"], seen["cpu"], strict=False):
        np.testing.assert_allclose(gpu, cpu, atol=0 if rig.cuda else 1e-2 * float(np.abs(cpu).max()))


class EnoughError(Exception):
    pass


@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_a_run_can_be_cancelled_in_every_stage(
    stage: str, rig: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    stages = []

    def stop(name: str, done: int, total: int) -> None:
        stages.append(name)
        if name == stage and done >= min(2, total):
            raise KeyboardInterrupt

    arguments = FAST | {"decode_chunk_size": 1}
    with rig.open(dynamic_bundle) as pipe:
        expected = pipe(picture, **arguments).frames
        with pytest.raises(KeyboardInterrupt):
            pipe(picture, progress=stop, **arguments)
        assert stages[-1] == stage
        held = rig.used()
        np.testing.assert_array_equal(pipe(picture, **arguments).frames, expected)
        if rig.cuda:
            assert rig.used() == held


def test_streams_can_be_interleaved_and_abandoned(rig: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image) -> None:
    arguments = STREAMED | {"num_frames": 6, "decode_chunk_size": 2}
    least = smallest_budget(dynamic_bundle.manifest, MemoryRequest(frames=6, height=72, width=96, decode_chunk_size=2))
    for budget in (None, least):
        with rig.open(dynamic_bundle, vram_budget=budget) as pipe:
            whole = list(pipe.stream(picture, **arguments))
            first, second = pipe.stream(picture, **arguments), pipe.stream(picture, **(arguments | {"seed": 7}))
            pairs = list(zip(first, second, strict=True))
            np.testing.assert_array_equal([a for a, _ in pairs], whole)
            abandoned = pipe.stream(picture, **arguments)
            np.testing.assert_array_equal(next(abandoned), whole[0])
            abandoned.close()
            closed_under = pipe.stream(picture, **arguments)
            next(closed_under)
        with pytest.raises(BackendError, match="closed"):
            list(closed_under)


def test_two_pipelines_work_at_once(rig: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image) -> None:
    with rig.open(dynamic_bundle) as one, rig.open(dynamic_bundle) as two:
        np.testing.assert_array_equal(one(picture, **FAST).frames, two(picture, **FAST).frames)
        two.close()
        one(picture, **FAST)


def test_memory_does_not_grow_over_many_runs(
    rig: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image, record_property: Any
) -> None:
    runs = 12 if rig.cuda else 200
    arguments = FAST | {"num_inference_steps": 4, "num_frames": 2}
    with rig.open(dynamic_bundle) as pipe:
        pipe(picture, **arguments)
        pipe(picture, **arguments)
        held = rig.used()
        live = rig.cuda.live if rig.cuda else None
        for _ in range(runs):
            pipe(picture, **arguments)
        record_property("bytes_grown_in_runs", f"{rig.used() - held} in {runs}")
        assert rig.used() <= held
        if rig.cuda:
            assert rig.cuda.live == live


def test_out_of_memory_gives_advice_and_leaks_nothing(
    rig: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    """The GPU fills up after the memory was planned, as if another program had started."""
    with rig.open(dynamic_bundle) as pipe:
        device: Any = pipe.device
        pipe(picture, **FAST)
        pipe.release()
        free = device.context.memory()[0]
        needed = plan_memory(dynamic_bundle.manifest, REQUEST, None).total_bytes or 0
        before = rig.used()
        hogs: list[Any] = []

        def hog(stage: str, done: int, total: int) -> None:
            if stage == "encode" and done:
                hogs.append(device.empty((device.context.memory()[0] - 4_000_000,), np.uint8, "a hog"))

        with pytest.raises(DeviceMemoryError, match=r"bytes of .*free of .*GB; ") as caught:
            pipe(picture, progress=hog, **FAST)
        assert needed < free
        assert caught.value.asked is not None
        for held in hogs:
            held.close()
        assert rig.used() <= before + (0 if rig.cuda else 64 << 20)
        pipe(picture, **FAST)


def test_a_new_shape_frees_the_memory_of_the_previous_shape(
    rig: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    with rig.open(dynamic_bundle) as pipe:
        pipe(picture, **FAST)
        live = rig.cuda.live if rig.cuda else None
        pipe(picture, **(FAST | {"num_frames": 9}))
        pipe(picture, **FAST)
        if rig.cuda and live:
            assert rig.cuda.live.allocations == live.allocations
