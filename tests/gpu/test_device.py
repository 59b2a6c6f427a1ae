"""Figures that `make gpu-test` records: fidelity in fp16, the speed that graphs gain, and memory against its plan.

The stand-in runs the same tests, so that they are known to work without a GPU. Its times mean nothing and are not
recorded.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from svd_trt import Bundle
from svd_trt.engine.memory import MemoryRequest, plan_memory
from svd_trt.export.fidelity import psnr
from tests.conftest import BACKEND, TINY, Once, build_tiny
from tests.gpu.conftest import Rig

pytestmark = pytest.mark.slow

ROUNDS = 5
REQUEST = MemoryRequest(frames=8, height=32, width=32)


@pytest.fixture(scope="module")
def engines(once: Once, cache: Path) -> Bundle:
    return Bundle.open(build_tiny(once, cache, "fp16", BACKEND))


@pytest.fixture(scope="module")
def rocket() -> PIL.Image.Image:
    return PIL.Image.open(TINY / "picture.png").convert("RGB")


def test_fp16_frames_are_close_to_diffusers_in_fp16(
    rig: Rig, engines: Bundle, rocket: PIL.Image.Image, record_property: Any
) -> None:
    import torch
    from diffusers import StableVideoDiffusionPipeline

    arguments: dict[str, Any] = {
        "num_frames": 8,
        "num_inference_steps": 10,
        "height": 32,
        "width": 32,
        "motion_bucket_id": 200,
        "decode_chunk_size": 8,
        "output_type": "np",
    }
    reference = StableVideoDiffusionPipeline.from_pretrained(TINY / "checkpoint", dtype=torch.float16)
    reference.set_progress_bar_config(disable=True)
    theirs = reference(rocket, generator=torch.manual_seed(42), **arguments).frames
    with rig.open(engines) as pipe:
        ours = pipe(rocket, seed=42, **arguments).frames
    worst = min(psnr(a, (b * 255).round().astype(np.uint8)) for a, b in zip(ours[0], theirs[0], strict=True))
    record_property("worst_frame_psnr_db", worst)
    assert worst >= 35


def test_time_per_step_with_and_without_graphs(
    rig: Rig, engines: Bundle, rocket: PIL.Image.Image, record_property: Any
) -> None:
    """Seconds per step: call by call, with a graph per step (as the pipeline does), and with one graph of all steps."""
    steps = 10
    arguments: dict[str, Any] = {"num_inference_steps": steps, "seed": 1, "output_type": "latent"}
    with rig.open(engines) as pipe:
        pipe(rocket, **arguments)
        device: Any = pipe.device
        assert pipe.executor._loop is not None
        loop: Any = pipe.executor._loop[2]

        def by_graphs() -> None:
            for step in range(steps):
                loop._enqueue(lambda: pipe.executor.session("denoiser"), step, fetch=False)

        def by_calls() -> None:
            with pipe.executor.session("denoiser") as loop._session:
                for step in range(steps):
                    for rows, row in zip(loop._tables, loop._coefficients, strict=True):
                        device.copy(rows.rows(step, step + 1), row)
                    loop._passes(step % 2)

        seconds: dict[str, list[float]] = {"calls": [], "step_graphs": [], "loop_graph": []}
        with device.capture(by_calls) as whole, device.event() as start, device.event() as end:
            ways = {"calls": by_calls, "step_graphs": by_graphs, "loop_graph": whole}
            for way in ways.values():  # the first calls enqueue the work directly or capture it
                way()
                way()
            for _ in range(ROUNDS):
                for name, way in ways.items():
                    start.record()
                    way()
                    end.record()
                    end.wait()
                    seconds[name].append(end.seconds_since(start) / steps)
            assert whole.captured or rig.cuda is None
    if rig.cuda is None:
        for name, values in seconds.items():
            record_property(f"median_seconds_a_step_{name}", statistics.median(values))
    assert all(value > 0 for values in seconds.values() for value in values)


def test_memory_is_within_the_plan(rig: Rig, engines: Bundle, rocket: PIL.Image.Image, record_property: Any) -> None:
    """Memory in use according to the driver against the plan. On a real GPU, engines take more than reported."""
    bundle = engines
    with rig.open(bundle) as pipe:
        before = rig.used()
        plan = pipe(rocket, num_inference_steps=4, seed=1).memory
        taken = rig.used() - before
        accounted = pipe.device.context.taken  # type: ignore[attr-defined]
    assert plan.total_bytes == plan_memory(bundle.manifest, REQUEST, None).total_bytes
    record_property("bytes_planned", plan.total_bytes)
    record_property("bytes_accounted", accounted)
    record_property("bytes_taken", taken)
    assert accounted <= (plan.total_bytes or 0)
    if rig.cuda:
        assert taken <= (plan.total_bytes or 0)
