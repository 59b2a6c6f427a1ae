"""Time and memory against one argument, all others as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from svd_trt.benchmarks.contender_process import ContenderError
from svd_trt.benchmarks.contenders import Entrant
from svd_trt.benchmarks.harness import Bench
from svd_trt.benchmarks.protocol import Made
from svd_trt.benchmarks.schema import Curve, Point, Subject
from svd_trt.benchmarks.stats import fit_line, fit_power, measure
from svd_trt.engine.spec import Range
from svd_trt.errors import SvdTrtError

__all__ = ["AXES", "Axis", "curve_subjects", "measure_curves"]

Axis: TypeAlias = Literal["frames", "steps", "pixels", "decode_chunk_size"]

AXES: tuple[Axis, ...] = ("frames", "steps", "pixels", "decode_chunk_size")
_WHAT: dict[Axis, Literal["total_s", "step_s", "decode_s"]] = {
    "frames": "step_s",
    "steps": "total_s",
    "pixels": "step_s",
    "decode_chunk_size": "decode_s",
}
_POINTS = 4
_MULTIPLE = 64


def measure_curves(bench: Bench, axis: Axis, entrants: list[Entrant]) -> list[Curve]:
    """One curve for each of ``entrants`` that works; every point in a process of its own, so that memory is its own."""
    subjects = curve_subjects(bench.subject, axis)
    if axis == "pixels":
        heights, widths = [s.height for s in subjects], [s.width for s in subjects]
        sizes = (
            Range(min(heights), bench.subject.height, max(heights)),
            Range(min(widths), bench.subject.width, max(widths)),
        )
        bench = replace(bench, bundles=replace(bench.bundles, sizes=sizes, given=None))
    curves = []
    for entrant in entrants:
        if axis == "decode_chunk_size" and entrant.mode == "low-memory":
            continue  # it always decodes 2 at a time
        points = []
        for index, subject in enumerate(subjects):
            bench.report(f"{axis} {_at(subject, axis):g}: {entrant.name}", index, len(subjects))
            try:
                points.append(_point(bench, entrant, subject, axis))
            except (ContenderError, SvdTrtError) as error:  # out of memory at the far end, say: it ends before that
                bench.notes.append(f"{entrant.name} at {axis} {_at(subject, axis):g}: {error}")
        if len(points) > 1:
            curves.append(_curve(entrant, axis, points))
    return curves


def _point(bench: Bench, entrant: Entrant, subject: Subject, axis: Axis) -> Point:
    bundle = bench.bundles.get(entrant.bundle)[0] if entrant.bundle else None
    video: Path = bench.work / "curve.mp4"
    with bench.start(entrant, subject, bundle) as worker:
        first = worker.make(video)
        made = [worker.make(video) for _ in range(bench.rounds)]
    seconds = _seconds(_WHAT[axis])
    vram = [m.peak_vram for m in (first, *made) if m.peak_vram is not None]
    return Point(_at(subject, axis), measure([seconds(m) for m in made]), max(vram, default=made[-1].peak_rss))


def _curve(entrant: Entrant, axis: Axis, points: list[Point]) -> Curve:
    at, values = [p.at for p in points], [p.seconds.median for p in points]
    slope, intercept = fit_line(at, values)
    return Curve(
        contender=entrant.name,
        axis=axis,
        what=_WHAT[axis],
        points=points,
        slope=slope,
        intercept=intercept,
        exponent=fit_power(at, values),
    )


def _seconds(what: str) -> Callable[[Made], float]:
    if what == "total_s":
        return lambda m: m.total_s
    if what == "decode_s":
        return lambda m: m.stages["decode"]
    return lambda m: sum(m.steps) / len(m.steps)


def _at(subject: Subject, axis: Axis) -> float:
    return subject.height * subject.width if axis == "pixels" else getattr(subject, axis)


def curve_subjects(subject: Subject, axis: Axis) -> list[Subject]:
    """``subject`` with up to four values of ``axis``, its own the largest."""
    if axis == "pixels":
        sides = sorted({(_shrunk(subject.height, n), _shrunk(subject.width, n)) for n in range(1, _POINTS + 1)})
        return [msgspec.structs.replace(subject, height=h, width=w) for h, w in sides]
    largest: int = getattr(subject, axis)
    least = 2 if axis == "frames" else 1
    values = sorted({max(least, round(largest * n / _POINTS)) for n in range(1, _POINTS + 1)})
    subjects = [msgspec.structs.replace(subject, **{axis: value}) for value in values]
    if axis == "frames":  # chunks cannot be longer than the video
        subjects = [msgspec.structs.replace(s, decode_chunk_size=min(s.decode_chunk_size, s.frames)) for s in subjects]
    return subjects


def _shrunk(side: int, part: int) -> int:
    return min(side, max(_MULTIPLE, round(side * part / _POINTS / _MULTIPLE) * _MULTIPLE))
