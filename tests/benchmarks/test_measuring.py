"""Frames against a reference, the host's clock, and the memory of a process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from svd_trt.benchmarks.measuring import HostClock, clock_for, compare_frames, peak_rss
from svd_trt.export.fidelity import IDENTICAL_DB

Frames = np.ndarray[Any, np.dtype[np.uint8]]


@pytest.fixture
def frames() -> Frames:
    return np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)


def test_identical_frames_have_a_finite_ratio(frames: Frames) -> None:
    found = compare_frames(frames, frames.copy())
    assert found.psnr_db == [IDENTICAL_DB] * 3
    assert found.worst_psnr_db == IDENTICAL_DB
    assert found.worst_ssim == pytest.approx(1)


def test_one_level_everywhere_is_48_db(frames: Frames) -> None:
    shifted = np.where(frames < 255, frames + 1, frames - 1).astype(np.uint8)
    found = compare_frames(shifted, frames)
    assert found.psnr_db == pytest.approx([20 * np.log10(255)] * 3)
    assert 0.99 < found.worst_ssim < 1


def test_the_worst_frame_counts(frames: Frames) -> None:
    wrong = frames.copy()
    wrong[1] = 255 - wrong[1]
    found = compare_frames(wrong, frames)
    assert found.psnr_db[0] == found.psnr_db[2] == IDENTICAL_DB
    assert found.worst_psnr_db == found.psnr_db[1] < 20
    assert found.worst_ssim == found.ssim[1] < 0.1


def test_other_shapes_are_refused(frames: Frames) -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        compare_frames(frames[:2], frames)


def test_the_clock_of_the_host() -> None:
    clock = clock_for(gpu=False)
    assert isinstance(clock, HostClock)
    begin = clock.event()
    time.sleep(0.01)
    clock.wait()
    assert clock.seconds(begin, clock.event()) >= 0.01


def test_memory_is_that_of_the_process() -> None:
    """Linux starts ru_maxrss with that of the parent, so a child of a large process would seem large."""
    large = np.ones(300_000_000, np.uint8)
    code = "from svd_trt.benchmarks.measuring import peak_rss; print(peak_rss())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert 1e6 < int(found.stdout) < large.nbytes < peak_rss()
