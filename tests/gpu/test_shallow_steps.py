"""Shallow steps on a GPU: two engines that take turns in one loop, with graphs of both."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.engine.memory import MemoryRequest, plan_memory, smallest_budget
from svd_trt.engine.spec import SHALLOW
from tests.conftest import TINY
from tests.gpu.conftest import Rig
from tests.gpu.test_pipeline import UNPLANNED_BYTES, largest_difference

STEPS = 8
FAST: dict[str, Any] = {
    "num_frames": 4,
    "num_inference_steps": STEPS,
    "seed": 42,
    "deep_every": 3,
    "output_type": "np",
}
REQUEST = MemoryRequest(frames=4, height=32, width=32, shallow_steps=True)


@pytest.fixture(scope="module")
def rocket() -> PIL.Image.Image:
    return PIL.Image.open(TINY / "picture.png")


@pytest.fixture(scope="module")
def theirs(shallow_bundle: Bundle, rocket: PIL.Image.Image) -> Any:
    """The frames that the CPU makes."""
    with VideoPipeline.open(shallow_bundle, backend="onnxruntime", device="cpu") as pipe:
        return pipe(rocket, **FAST).frames


def test_frames_are_equal_to_the_cpu(
    rig: Rig, shallow_bundle: Bundle, rocket: PIL.Image.Image, theirs: Any, record_property: Any
) -> None:
    with rig.open(shallow_bundle) as pipe:
        made = [pipe(rocket, **FAST) for _ in range(2)]
        assert list(made[0].profiles) == ["image_encoder", "vae_encoder", "denoiser", SHALLOW, "vae_decoder"]
        whole = pipe(rocket, **(FAST | {"deep_every": 1}))
        assert SHALLOW not in pipe.executor._engines._loaded, "a plan without it has no room for it"
        again = pipe(rocket, **FAST).frames
    difference = largest_difference(made[0].frames, theirs)
    record_property("levels_from_cpu", difference)
    assert difference <= (0 if rig.cuda else 2)
    np.testing.assert_array_equal(made[1].frames, made[0].frames)
    np.testing.assert_array_equal(again, made[0].frames)
    assert (whole.frames != made[0].frames).any()


def test_steps_with_and_without_guidance(standin: Rig, shallow_bundle: Bundle, rocket: PIL.Image.Image) -> None:
    """Four kinds of steps, and features of one branch and of two in the same memory."""
    arguments = FAST | {"guidance_interval": (0.1, 300.0), "deep_every": 2}
    with standin.open(shallow_bundle) as pipe:
        ours = [pipe(rocket, **arguments).frames for _ in range(2)]
    with VideoPipeline.open(shallow_bundle, backend="onnxruntime", device="cpu") as pipe:
        wanted = pipe(rocket, **arguments).frames
    np.testing.assert_array_equal(ours[0], ours[1])
    assert largest_difference(ours[0], wanted) == 0


def test_both_kinds_of_steps_are_captured(standin: Rig, shallow_bundle: Bundle, rocket: PIL.Image.Image) -> None:
    """Of D s s D s s D s, even and odd: of the deep ones 0, 3, 6 one graph runs twice, of the shallow ones both do."""
    assert standin.cuda is not None
    with standin.open(shallow_bundle) as pipe:
        pipe(rocket, **FAST)
        launches = standin.cuda.count("cuGraphLaunch")
        assert launches == 1 + (5 - 2)
        pipe(rocket, **FAST)
        assert standin.cuda.count("cuGraphLaunch") == launches + STEPS, "all are captured"
        assert pipe.device.notes == []


@pytest.mark.parametrize("budget", ["smallest", "ample"])
def test_memory_stays_within_the_budget(
    budget: str, rig: Rig, shallow_bundle: Bundle, rocket: PIL.Image.Image, theirs: Any
) -> None:
    """The smallest budget loads engines one at a time, but both denoisers together."""
    least = smallest_budget(shallow_bundle.manifest, REQUEST)
    most = plan_memory(shallow_bundle.manifest, REQUEST, None).total_bytes
    assert least is not None
    assert most is not None
    allowed = {"smallest": least, "ample": most}[budget]
    before = rig.used()
    with rig.open(shallow_bundle, vram_budget=allowed) as pipe:
        with rig.watching() as peak:
            made = pipe(rocket, **FAST)
        assert peak() - before <= allowed + UNPLANNED_BYTES
        if rig.cuda:
            assert rig.cuda.peak_bytes <= allowed
    plan = made.memory
    assert plan.shallow_steps
    assert plan.resident == (budget == "ample")
    if plan.decode_chunk_size == 4:
        assert largest_difference(made.frames, theirs) <= (1 if rig.cuda else 2)


def test_a_callback_changes_latents(rig: Rig, shallow_bundle: Bundle, rocket: PIL.Image.Image) -> None:
    """A step that was queued already runs again: a deep one with its features, a shallow one with those before."""

    def change(_: Any, step: int, __: float, values: dict[str, Any]) -> dict[str, Any] | None:
        return {"latents": values["latents"] * 0.9} if step in (0, 2, 5, 6) else None

    with rig.open(shallow_bundle) as pipe:
        ours = [pipe(rocket, callback_on_step_end=change, **FAST).frames for _ in range(2)]
    with VideoPipeline.open(shallow_bundle, backend="onnxruntime", device="cpu") as pipe:
        wanted = pipe(rocket, callback_on_step_end=change, **FAST).frames
    np.testing.assert_array_equal(ours[0], ours[1])
    assert largest_difference(ours[0], wanted) <= (0 if rig.cuda else 2)
