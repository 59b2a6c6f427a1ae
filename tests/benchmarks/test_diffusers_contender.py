"""diffusers' pipeline with a clock around its stages, and the environment of its process."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from svd_trt.benchmarks.contenders import Job
from svd_trt.benchmarks.diffusers_contender import DiffusersRunner
from svd_trt.benchmarks.measuring import CudaClock, clock_for
from svd_trt.benchmarks.results import Workload
from svd_trt.engine.child_process import environment
from svd_trt.export.fidelity import draw_picture


class LateEvent:
    """A CUDA event as torch has it: it knows its time only after the host has waited for the device."""

    device_time = 0.0
    settled = False
    waits = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        LateEvent.device_time += 0.25
        LateEvent.settled = False
        self.at = LateEvent.device_time

    def elapsed_time(self, later: LateEvent) -> float:
        assert LateEvent.settled, "read before the host has waited for the device"
        return (later.at - self.at) * 1e3


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> type[LateEvent]:
    def synchronize() -> None:
        LateEvent.settled = True
        LateEvent.waits += 1

    LateEvent.waits = 0
    monkeypatch.setattr(torch.cuda, "Event", LateEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return LateEvent


def runner_of(checkpoint: Path, tmp_path: Path) -> DiffusersRunner:
    picture = tmp_path / "picture.png"
    draw_picture(64, 64).save(picture)
    workload = Workload(
        model=str(checkpoint),
        precision="fp32",
        frames=2,
        height=64,
        width=64,
        steps=3,
        decode_chunk_size=2,
        seed=7,
    )
    job = Job(contender="diffusers-eager", workload=workload, picture=str(picture), bundle=None, threads=1, gpu=False)
    return DiffusersRunner(job, "eager")


def test_on_a_gpu_nothing_waits_before_the_end(checkpoint: Path, tmp_path: Path, events: type[LateEvent]) -> None:
    """The pipeline runs on the CPU with the clock of a GPU: stages are timed by events, and the host waits once."""
    runner = runner_of(checkpoint, tmp_path)
    runner.clock = clock_for(gpu=True)
    assert isinstance(runner.clock, CudaClock)
    runner.load()
    written: list[Any] = []
    before = time.perf_counter()
    video = runner.make_video(written.append)
    assert events.waits == 1
    assert video.steps == [0.25] * 3
    assert video.stages == {"image_encode": 0.5, "vae_encode": 0.25, "denoise": 5 * 0.25, "decode": 0.25}
    assert before < video.first_step_at - 7 * 0.25, "the first step began seven events after the call"
    assert [w.shape for w in written] == [(2, 64, 64, 3)]


def test_contenders_get_the_allocator_that_users_have() -> None:
    """The allocator's settings for builds would slow eager torch down."""
    added = environment().keys() - os.environ.keys()
    assert added <= {"PYTHONPATH"}
