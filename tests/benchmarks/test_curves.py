"""Curves: their points, what is measured at each, and the fits, on numbers with a known answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from svd_trt.benchmarks.contender_process import ContenderError, Measurement
from svd_trt.benchmarks.contenders import Contender, choose_contenders
from svd_trt.benchmarks.curves import curve_workloads, fit_line, fit_power, measure_curves
from svd_trt.benchmarks.harness import Bench
from svd_trt.benchmarks.results import STAGES, Workload
from svd_trt.benchmarks.workload import Bundles, make_workload
from svd_trt.progress import ignore_progress


def workload(**more: Any) -> Workload:
    asked: dict[str, Any] = dict.fromkeys(("frames", "height", "width", "steps", "decode_chunk_size"))
    return make_workload("random:mid", seed=0, precision="fp32", **asked | more)


class Process:
    """A contender whose steps take 0.5 s for each frame."""

    def __init__(self, workload: Workload) -> None:
        if workload.frames == 6:
            raise ContenderError("out of memory")
        self.workload = workload

    def make_video(self, _output: Path) -> Measurement:
        step = 0.5 * self.workload.frames
        return Measurement(
            total_s=10.0,
            stages=dict.fromkeys(STAGES, 1.0),
            steps=[step] * self.workload.steps,
            first_step_s=0.0,
            host_s=None,
            load_s=0.0,
            peak_rss=self.workload.frames * 10**9,
            peak_vram=None,
            energy_j=None,
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        return


def test_a_curve_without_the_point_that_fails(tmp_path: Path) -> None:
    contenders = choose_contenders(["diffusers-eager"])
    bench = Bench(
        workload=workload(),
        contenders=contenders,
        rounds=2,
        threads=1,
        work=tmp_path,
        picture=tmp_path / "picture.png",
        bundles=Bundles(workload(), tmp_path, None, ignore_progress),
        command="svd-trt bench",
        gpu=False,
        progress=ignore_progress,
    )

    def start(_contender: Contender, workload: Workload, _bundle: Path | None) -> Process:
        return Process(workload)

    bench.start = start  # type: ignore[method-assign, assignment]
    (curve,) = measure_curves(bench, "frames", contenders)
    assert (curve.contender, curve.axis, curve.what) == ("diffusers-eager", "frames", "step_s")
    assert [(p.at, p.seconds.median, p.peak_bytes) for p in curve.points] == [
        (2, 1.0, 2 * 10**9),
        (4, 2.0, 4 * 10**9),
        (8, 4.0, 8 * 10**9),
    ]
    assert (curve.slope, curve.exponent) == pytest.approx((0.5, 1.0))
    assert bench.notes == ["diffusers-eager at frames 6: out of memory"]


def test_curves_of_small_pictures_do_not_grow_them() -> None:
    made = curve_workloads(workload(height=32, width=128), "pixels")
    assert [(w.height, w.width) for w in made] == [(32, 64), (32, 128)]


def test_curves_end_at_the_workload() -> None:
    made = workload()
    assert [w.frames for w in curve_workloads(made, "frames")] == [2, 4, 6, 8]
    assert [w.decode_chunk_size for w in curve_workloads(made, "frames")] == [2, 4, 6, 8]
    assert [w.steps for w in curve_workloads(made, "steps")] == [1, 2, 4, 5]
    assert [(w.height, w.width) for w in curve_workloads(made, "pixels")] == [(n, n) for n in (64, 128, 192, 256)]


def test_fits() -> None:
    assert fit_line([1, 2, 4], [5.0, 7.0, 11.0]) == pytest.approx((2, 3))
    assert fit_power([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0]) == pytest.approx(2)
