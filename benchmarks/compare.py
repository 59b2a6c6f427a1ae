"""Which figures changed beyond noise from one result to another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from svd_trt.benchmarks.results import BASELINE, STAGES, ContenderResult, Result, Summary
from svd_trt.errors import ResultError

__all__ = ["LEAST_CHANGE", "LEAST_ROUNDS", "NO_LONGER", "Row", "Verdict", "compare_results", "same_machine"]

Verdict: TypeAlias = Literal["better", "worse", "within noise", "too few rounds"]

LEAST_CHANGE = 0.02
"""A median that changed by less is within noise: rounds of one run agree better with each other than runs do."""

LEAST_ROUNDS = 3
"""The ranges of fewer rounds do not show the noise, so times and ratios get no verdict."""

NO_LONGER = "no longer measured"
"""How the figure of a contender that failed in the new result begins."""

_LEAST_MEMORY_CHANGE = 0.05  # larger, because a run gives one figure of memory and no range
_LEAST_DB_CHANGE = 1.0


@dataclass(frozen=True)
class Row:
    """One figure of one contender in both results; ``ratio`` is new over old."""

    contender: str
    figure: str
    old: float
    new: float
    ratio: float
    verdict: Verdict


def same_machine(a: Result, b: Result) -> bool:
    """True if absolute seconds can be compared: CPU, GPU and threads are the same."""

    def hardware(result: Result) -> tuple[object, ...]:
        m = result.machine
        gpus = [line.partition(",")[0] for line in m.get("gpu") or ()]  # clocks and driver come after the name
        return m.get("cpu"), m.get("cores"), gpus, result.threads

    return hardware(a) == hardware(b)


def compare_results(a: Result, b: Result) -> list[Row]:
    """Every figure that both have; ``b`` is the new result.

    A figure changed if its ranges over the rounds do not overlap and its median changed by more than `LEAST_CHANGE`.
    With a handful of rounds a significance test says no more, and is easily misread. The ratio to eager is the most
    reliable figure, because both sides of it were measured on the same machine in the same minutes. Seconds are left
    out if the machines differ.

    A contender that was measured in ``a`` and failed in ``b`` gets a row; one that ``b`` does not contain gets none.

    Raises:
        ResultError: the results are of different videos.
    """
    if (described := _describe(a)) != _describe(b):
        raise ResultError(
            f"these results are of different videos: {described} and {_describe(b)}; measure the same one"
        )
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


def _describe(result: Result) -> str:
    w = result.workload
    size = f"{w.frames}x{w.height}x{w.width}"
    arguments = f"{w.steps} steps, chunks of {w.decode_chunk_size}, seed {w.seed}, picture {w.picture or '?'}"
    return f"{w.model} {w.precision} {size}, {arguments}"


def _rows(old: ContenderResult, new: ContenderResult, *, seconds: bool) -> list[Row]:
    rows: list[Row | None] = []
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
    rows.append(_fidelity_row(old, new))
    if seconds:
        rows.append(_memory_row(old.name, "RAM bytes", old.peak_rss, new.peak_rss))
        rows.append(_memory_row(old.name, "VRAM bytes", old.peak_vram, new.peak_vram))
    return [row for row in rows if row is not None]


def _row(
    name: str, figure: str, old: Summary | None, new: Summary | None, *, higher_is_better: bool = False
) -> Row | None:
    if old is None or new is None or old.median <= 0:
        return None
    ratio = new.median / old.median
    apart = new.low > old.high or new.high < old.low
    verdict: Verdict = "within noise"
    if apart and abs(ratio - 1) > LEAST_CHANGE:
        verdict = "better" if (ratio > 1) == higher_is_better else "worse"
    return Row(name, figure, old.median, new.median, ratio, verdict)


def _fidelity_row(old: ContenderResult, new: ContenderResult) -> Row | None:
    """Fidelity has no noise: the same seed gives the same frames."""
    if old.psnr_db is None or new.psnr_db is None:
        return None
    change = new.psnr_db - old.psnr_db
    verdict: Verdict = "within noise" if abs(change) < _LEAST_DB_CHANGE else "better" if change > 0 else "worse"
    return Row(old.name, "worst PSNR dB", old.psnr_db, new.psnr_db, new.psnr_db / old.psnr_db, verdict)


def _memory_row(name: str, figure: str, old: int | None, new: int | None) -> Row | None:
    if old is None or new is None or old <= 0:
        return None
    ratio = new / old
    verdict: Verdict = "within noise" if abs(ratio - 1) <= _LEAST_MEMORY_CHANGE else "better" if ratio < 1 else "worse"
    return Row(name, figure, float(old), float(new), ratio, verdict)
