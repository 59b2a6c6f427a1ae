"""A result as tables: for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from rich.table import Table

from svd_trt.benchmarks.schema import STAGES, Contender, Curve, Measure, Result
from svd_trt.export.fidelity import IDENTICAL_DB

__all__ = ["curve_rows", "describe", "grid", "main_rows", "markdown", "skipped", "stage_rows", "tables"]

Rows: TypeAlias = list[list[str]]
"""The first row is the header."""

_MAIN = [
    "contender",
    "step",
    "total",
    "x eager",
    "worst PSNR",
    "SSIM",
    "RAM",
    "VRAM",
    "prepare",
    "first call",
    "start-up",
]


def main_rows(result: Result) -> Rows:
    """One row for each contender that was measured."""
    rows = [_MAIN]
    for c in _measured(result):
        assert c.spread is not None
        rows.append(
            [
                c.name,
                _seconds(c.spread.step_s),
                _seconds(c.spread.total_s),
                _ratio(c.spread.ratio_to_eager),
                "-" if c.psnr_db is None else "identical" if c.psnr_db >= IDENTICAL_DB else f"{c.psnr_db:.1f} dB",
                "-" if c.fidelity is None else f"{c.fidelity.worst_ssim:.4f}",
                _gigabytes(c.peak_rss),
                _gigabytes(c.peak_vram),
                _short(c.prepare_s),
                _short(c.first_call_s),
                _short(c.startup_s),
            ]
        )
    return _without_empty(rows)


def stage_rows(result: Result) -> Rows:
    """Seconds of each stage and its share of the video."""
    rows = [["contender", *STAGES]]
    for c in _measured(result):
        assert c.total_s is not None
        cells = [c.stages.get(stage) for stage in STAGES]
        rows.append([c.name, *("-" if s is None else f"{s:.3g} s ({s / c.total_s:.0%})" for s in cells)])
    return rows


def curve_rows(curves: Sequence[Curve]) -> Rows:
    """Each curve's points, its line and its power."""
    rows = [["curve", "contender", "points", "slope", "power"]]
    for c in curves:
        points = ", ".join(f"{p.at:g}: {p.seconds.median:.3g} s" for p in c.points)
        rows.append([f"{c.what} / {c.axis}", c.contender, points, f"{c.slope:.3g} s", f"{c.exponent:.2f}"])
    return rows


def describe(result: Result) -> list[str]:
    """What was made, on what, and how fast that could be."""
    s, m = result.subject, result.machine
    packages = m.get("packages", {})
    told = ", ".join(f"{n} {packages[n]}" for n in ("torch", "diffusers", "onnxruntime", "openvino") if n in packages)
    gpu = "; ".join(m.get("gpu") or ()) or "no GPU"
    rounds = max((len(c.rounds) for c in result.contenders), default=0)
    lines = [
        f"{s.model}, {s.precision}: {s.frames} frames of {s.width}x{s.height}, {s.steps} steps, decode chunks of "
        f"{s.decode_chunk_size}, seed {s.seed}; {rounds} round{'' if rounds == 1 else 's'}",
        f"{m.get('cpu')}, {result.threads} threads, {gpu}; {told}; svd-trt {m.get('svd_trt')} at commit "
        f"{m.get('commit')}; {result.date[:10]}",
    ]
    if result.peak is not None:
        peak = (
            f"{result.peak.flops_per_s / 1e9:,.0f} GFLOP/s in a {result.peak.precision} product of {result.peak.size}"
        )
        shares = [f"{c.name} {c.share_of_peak:.0%}" for c in _measured(result) if c.share_of_peak is not None]
        flops = "" if s.step_flops is None else f"; a step is {s.step_flops / 1e9:,.0f} GFLOP as diffusers computes it"
        lines.append(f"peak: {peak}{flops}; share of it: {', '.join(shares)}" if shares else f"peak: {peak}{flops}")
    overhead = [(c.name, c.host_overhead_s) for c in _measured(result) if c.host_overhead_s is not None]
    if overhead:
        told = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in overhead)
        lines.append(f"a step beyond its network's own time: {told}")
    return lines


def skipped(result: Result) -> list[str]:
    """Who or what was not measured, and why."""
    return [*(f"{c.name}: {c.skipped}" for c in result.contenders if c.skipped is not None), *result.notes]


def tables(result: Result) -> list[Table]:
    """For a terminal."""
    made = [_table(main_rows(result)), _table(stage_rows(result))]
    return [*made, _table(curve_rows(result.curves))] if result.curves else made


def markdown(result: Result) -> str:
    """The whole result as a page."""
    parts = ["\n".join(f"- {line}" for line in describe(result)), grid(main_rows(result)), grid(stage_rows(result))]
    if result.curves:
        parts.append(grid(curve_rows(result.curves)))
    if left := skipped(result):
        parts.append("Not measured:\n\n" + "\n".join(f"- {line}" for line in left))
    return "\n\n".join(parts) + "\n"


def grid(rows: Rows) -> str:
    """A Markdown table."""
    header, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *body))


def _table(rows: Rows) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _measured(result: Result) -> list[Contender]:
    return [c for c in result.contenders if c.spread is not None]


def _without_empty(rows: Rows) -> Rows:
    """Leave out columns that say nothing here, such as VRAM on a CPU."""
    kept = [i for i in range(len(rows[0])) if len(rows) == 1 or any(row[i] != "-" for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def _seconds(m: Measure) -> str:
    return f"{m.median:.3g} s" + (f" ({m.low:.3g}-{m.high:.3g})" if m.low < m.high else "")


def _ratio(m: Measure) -> str:
    return f"{m.median:.2f} ({m.low:.2f}-{m.high:.2f})"


def _short(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3g} s"


def _gigabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e9:.2f} GB"
