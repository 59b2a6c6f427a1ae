"""What moved between two results beyond noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from svd_trt.benchmarks.schema import BASELINE, STAGES, Contender, Measure, Result
from svd_trt.errors import ResultError

__all__ = ["LEAST_CHANGE", "LEAST_ROUNDS", "NO_LONGER", "Row", "Verdict", "compare_results", "same_machine"]

Verdict: TypeAlias = Literal["better", "worse", "within noise", "too few rounds"]

LEAST_CHANGE = 0.02
"""Part by which a median must move at all. Rounds of one run agree better with each other than runs do."""

_LEAST_OF_SIZES = 0.05
"""The same of memory, of which a run gives one figure and no range."""

LEAST_ROUNDS = 3
"""Ranges of fewer rounds say nothing of noise, so times and ratios get no verdict."""

NO_LONGER = "no longer measured"
"""What the figure of a contender that failed since begins with."""

_LEAST_DB = 1.0


@dataclass(frozen=True)
class Row:
    """One figure of one contender in both results; ``ratio`` is the new over the old."""

    contender: str
    figure: str
    old: float
    new: float
    ratio: float
    verdict: Verdict


def same_machine(a: Result, b: Result) -> bool:
    """Whether absolute seconds may be compared: processor, GPU and threads are the same."""

    def hardware(result: Result) -> tuple[object, ...]:
        m = result.machine
        gpus = [line.partition(",")[0] for line in m.get("gpu") or ()]  # clocks and driver come after the name
        return m.get("cpu"), m.get("cores"), gpus, result.threads

    return hardware(a) == hardware(b)


def compare_results(a: Result, b: Result) -> list[Row]:
    """Every figure that both have; ``b`` is the new one.

    A figure moved if its ranges over the rounds do not overlap and its median moved by more than `LEAST_CHANGE`. With
    a handful of rounds a test of significance says no more, and is easily misread. The ratio to eager is the figure to
    trust: what the machine did meanwhile happened to both. Seconds are left out where the machines differ.

    Who was measured before and failed now is a row too; who was not asked for is none.

    Raises:
        ResultError: they measured different videos.
    """
    if (asked := _asked(a)) != _asked(b):
        raise ResultError(f"these results are of different videos: {asked} and {_asked(b)}; measure the same one")
    new = {c.name: c for c in b.contenders if c.spread is not None}
    skipped = {c.name: c.skipped for c in b.contenders}
    rows = []
    for old in a.contenders:
        if old.spread is None:
            continue
        if old.name in new:
            rows += _rows(old, new[old.name], seconds=same_machine(a, b))
        elif (reason := skipped.get(old.name)) is not None:
            rows.append(Row(old.name, f"{NO_LONGER}: {reason}", 1, 0, 0, "worse"))
    return rows


def _asked(result: Result) -> str:
    s = result.subject
    size = f"{s.frames}x{s.height}x{s.width}"
    how = f"{s.steps} steps, chunks of {s.decode_chunk_size}, seed {s.seed}, picture {s.picture or '?'}"
    return f"{s.model} {s.precision} {size}, {how}"


def _rows(old: Contender, new: Contender, *, seconds: bool) -> list[Row]:
    rows = []
    a, b = old.spread, new.spread
    assert a is not None
    assert b is not None
    if old.name != BASELINE:
        rows.append(_row(old.name, "x eager", a.ratio_to_eager, b.ratio_to_eager, higher_is_better=True))
        steps = a.step_ratio_to_eager, b.step_ratio_to_eager
        rows.append(_row(old.name, "step x eager", *steps, higher_is_better=True))
    if seconds:
        rows.append(_row(old.name, "step s", a.step_s, b.step_s))
        rows.append(_row(old.name, "total s", a.total_s, b.total_s))
        rows += [_row(old.name, f"{stage} s", a.stages.get(stage), b.stages.get(stage)) for stage in STAGES]
    if min(len(old.rounds), len(new.rounds)) < LEAST_ROUNDS:
        rows = [row and replace(row, verdict="too few rounds") for row in rows]
    rows.append(_fidelity(old, new))
    if seconds:
        rows.append(_size(old.name, "RAM bytes", old.peak_rss, new.peak_rss))
        rows.append(_size(old.name, "VRAM bytes", old.peak_vram, new.peak_vram))
    return [row for row in rows if row is not None]


def _row(
    name: str, figure: str, old: Measure | None, new: Measure | None, *, higher_is_better: bool = False
) -> Row | None:
    if old is None or new is None or old.median <= 0:
        return None
    ratio = new.median / old.median
    apart = new.low > old.high or new.high < old.low
    verdict: Verdict = "within noise"
    if apart and abs(ratio - 1) > LEAST_CHANGE:
        verdict = "better" if (ratio > 1) == higher_is_better else "worse"
    return Row(name, figure, old.median, new.median, ratio, verdict)


def _fidelity(old: Contender, new: Contender) -> Row | None:
    """No noise here: the same seed gives the same frames."""
    if old.psnr_db is None or new.psnr_db is None:
        return None
    moved = new.psnr_db - old.psnr_db
    verdict: Verdict = "within noise" if abs(moved) < _LEAST_DB else "better" if moved > 0 else "worse"
    return Row(old.name, "worst PSNR dB", old.psnr_db, new.psnr_db, new.psnr_db / old.psnr_db, verdict)


def _size(name: str, figure: str, old: int | None, new: int | None) -> Row | None:
    """A run gives one figure, and no range to tell noise by."""
    if old is None or new is None or old <= 0:
        return None
    ratio = new / old
    verdict: Verdict = "within noise" if abs(ratio - 1) <= _LEAST_OF_SIZES else "better" if ratio < 1 else "worse"
    return Row(name, figure, float(old), float(new), ratio, verdict)
