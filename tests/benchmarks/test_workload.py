"""What every contender is asked to make, the arithmetic in it, and the bundles for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svd_trt.benchmarks.results import Workload
from svd_trt.benchmarks.workload import Bundles, count_flops, make_workload
from svd_trt.errors import ArgumentError, OutputError
from svd_trt.export import build
from svd_trt.export.build import BuildResult, Stage
from svd_trt.progress import ignore_progress


def workload(**more: Any) -> Any:
    asked: dict[str, Any] = dict.fromkeys(("frames", "height", "width", "steps", "decode_chunk_size"))
    return make_workload("random:mid", seed=0, precision="fp32", **asked | more)


def test_arithmetic_is_counted() -> None:
    """Twice the frames are twice the decoding, and a bit more than twice the step, as frames attend to each other."""
    one, two = (count_flops(workload(frames=n))[0] for n in (4, 8))
    assert two.step_flops == pytest.approx(2.0925e11, rel=1e-3)
    assert two.decode_flops == pytest.approx(2 * one.decode_flops)
    assert np.isclose(two.step_flops, 2 * one.step_flops, rtol=0.02)


def test_sizes_of_presets_and_refusals() -> None:
    made = workload()
    assert (made.frames, made.height, made.width, made.steps, made.decode_chunk_size) == (8, 256, 256, 5, 8)
    assert workload(decode_chunk_size=99, frames=3).decode_chunk_size == 3
    with pytest.raises(ArgumentError, match="multiples of 8"):
        workload(height=100)


def test_a_checkpoint_is_counted_like_its_preset(tiny_checkpoint: Path) -> None:
    """It has the networks of the preset "tiny" in files."""
    sizes: dict[str, Any] = {"frames": 2, "height": 64, "width": 64, "steps": 1, "decode_chunk_size": None}
    counted = [
        count_flops(make_workload(model, seed=0, precision="fp32", **sizes))
        for model in (str(tiny_checkpoint), "random:tiny")
    ]
    assert [reason for _, reason in counted] == [None, None]
    assert counted[0][0].step_flops == counted[1][0].step_flops is not None
    assert counted[0][0].decode_flops == counted[1][0].decode_flops is not None


@pytest.fixture
def bundles(small_checkpoint: Path, tmp_path: Path) -> Bundles:
    asked = Workload(
        model=str(small_checkpoint),
        precision="fp32",
        frames=3,
        height=32,
        width=32,
        steps=1,
        decode_chunk_size=3,
        seed=0,
    )
    return Bundles(asked, tmp_path, None, ignore_progress)


def test_the_seconds_of_a_full_build_are_kept(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build whose networks come from elsewhere has no seconds; a bundle that is up to date has those of its build."""
    outcome = BuildResult(None, (Stage("denoiser", "onnx", 1.0, reused=False),), up_to_date=False)  # type: ignore[arg-type]
    monkeypatch.setattr(build, "build_bundle", lambda *_: outcome)
    path, seconds = bundles.get("plain")
    assert seconds is not None
    outcome = replace(outcome, stages=(), up_to_date=True)
    assert bundles.get("plain") == (path, seconds)
    outcome = replace(outcome, stages=(Stage("denoiser", "onnx", 0.0, reused=True),), up_to_date=False)
    assert bundles.get("plain") == (path, None)
    outcome = replace(outcome, stages=(), up_to_date=True)
    assert bundles.get("plain") == (path, None)


def test_a_folder_that_cannot_be_written(bundles: Bundles, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        replace(bundles, folder=tmp_path / "file" / "below").get("plain")


def test_a_bundle_that_is_given_is_used_for_its_kind(bundles: Bundles, small_bundle: Path) -> None:
    given = replace(bundles, given=small_bundle)
    assert given.get("default") == (small_bundle, None)
    assert given.get("tensorrt-rtx") == (small_bundle, None)
