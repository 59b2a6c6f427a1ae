"""Curves: time and memory against one argument, all others fixed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import msgspec
import numpy as np

from svd_trt.benchmarks.contender_process import ContenderError, Measurement
from svd_trt.benchmarks.contenders import Contender
from svd_trt.benchmarks.harness import Bench
from svd_trt.benchmarks.results import Curve, Point, Summary, Workload
from svd_trt.engine.spec import Range
from svd_trt.errors import SvdTrtError

__all__ = ["Axis", "curve_workloads", "fit_line", "fit_power", "measure_curves"]

Axis: TypeAlias = Literal["frames", "steps", "pixels", "decode_chunk_size"]

_WHAT: dict[Axis, Literal["total_s", "step_s", "decode_s"]] = {
    "frames": "step_s",
    "steps": "total_s",
    "pixels": "step_s",
    "decode_chunk_size": "decode_s",
}
_SECONDS: dict[str, Callable[[Measurement], float]] = {
    "total_s": lambda m: m.total_s,
    "step_s": lambda m: sum(m.steps) / len(m.steps),
    "decode_s": lambda m: m.stages["decode"],
}
_POINTS = 4
_MULTIPLE = 64  # of sides


def measure_curves(bench: Bench, axis: Axis, contenders: Sequence[Contender]) -> list[Curve]:
    """One curve for each contender that works. Each point has a process of its own, so that its memory is its own."""
    workloads = curve_workloads(bench.workload, axis)
    if axis == "pixels":
        heights, widths = [w.height for w in workloads], [w.width for w in workloads]
        sizes = (
            Range(min(heights), bench.workload.height, max(heights)),
            Range(min(widths), bench.workload.width, max(widths)),
        )
        bench = replace(bench, bundles=replace(bench.bundles, sizes=sizes, given=None))
    curves = []
    for contender in contenders:
        if axis == "decode_chunk_size" and contender.mode == "low-memory":
            continue  # it always decodes 2 frames at a time
        points = []
        for workload in workloads:
            where = f"{contender.name} at {axis} {_at(workload, axis):g}"
            bench.progress(where, 0, 0)
            try:
                points.append(_measure_point(bench, contender, workload, axis))
            except (ContenderError, SvdTrtError) as error:  # such as out of memory: the curve ends earlier
                bench.notes.append(f"{where}: {error}")
        if len(points) > 1:
            curves.append(_fit(contender, axis, points))
    return curves


def curve_workloads(workload: Workload, axis: Axis) -> list[Workload]:
    """``workload`` with up to four values of ``axis``, the largest being its own."""
    if axis == "pixels":
        sides = {(_part(workload.height, n), _part(workload.width, n)) for n in range(1, _POINTS + 1)}
        return [msgspec.structs.replace(workload, height=h, width=w) for h, w in sorted(sides)]
    largest: int = getattr(workload, axis)
    least = 2 if axis == "frames" else 1
    values = sorted({max(least, round(largest * n / _POINTS)) for n in range(1, _POINTS + 1)})
    workloads = [msgspec.structs.replace(workload, **{axis: value}) for value in values]
    if axis == "frames":  # a chunk cannot be longer than the video
        return [msgspec.structs.replace(w, decode_chunk_size=min(w.decode_chunk_size, w.frames)) for w in workloads]
    return workloads


def fit_line(at: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept by least squares, of at least two different places."""
    slope, intercept = np.polyfit(at, values, 1)
    return float(slope), float(intercept)


def fit_power(at: Sequence[float], values: Sequence[float]) -> float:
    """Exponent of the power law through positive points: 1 is proportional, 2 quadratic."""
    return fit_line([math.log(a) for a in at], [math.log(v) for v in values])[0]


def _measure_point(bench: Bench, contender: Contender, workload: Workload, axis: Axis) -> Point:
    bundle = bench.bundles.get(contender.bundle)[0] if contender.bundle else None
    video = bench.work / "curve.mp4"
    with bench.start(contender, workload, bundle) as process:
        warmup = process.make_video(video)
        measured = [process.make_video(video) for _ in range(bench.rounds)]
    seconds = _SECONDS[_WHAT[axis]]
    vram = [m.peak_vram for m in (warmup, *measured) if m.peak_vram is not None]
    peak_bytes = max(vram, default=measured[-1].peak_rss)
    return Point(_at(workload, axis), Summary.of([seconds(m) for m in measured]), peak_bytes)


def _fit(contender: Contender, axis: Axis, points: list[Point]) -> Curve:
    at, values = [p.at for p in points], [p.seconds.median for p in points]
    slope, intercept = fit_line(at, values)
    return Curve(
        contender=contender.name,
        axis=axis,
        what=_WHAT[axis],
        points=points,
        slope=slope,
        intercept=intercept,
        exponent=fit_power(at, values),
    )


def _at(workload: Workload, axis: Axis) -> float:
    return workload.height * workload.width if axis == "pixels" else getattr(workload, axis)


def _part(side: int, quarters: int) -> int:
    return min(side, max(_MULTIPLE, round(side * quarters / _POINTS / _MULTIPLE) * _MULTIPLE))
