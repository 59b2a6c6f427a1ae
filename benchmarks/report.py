"""A result as tables: on the terminal, as a Markdown page, and in the generated section of ``docs/performance.md``.

python -m svd_trt.benchmarks.report docs/performance.md benchmarks/results/bench-*.json
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import click
from rich.table import Table

from svd_trt.benchmarks.results import STAGES, ContenderResult, Curve, Result, Summary, read_result, write_file
from svd_trt.errors import OutputError, ResultError
from svd_trt.export.fidelity import IDENTICAL_DB
from svd_trt.units import format_bytes, format_seconds

__all__ = [
    "BEGIN",
    "END",
    "Rows",
    "as_table",
    "describe",
    "main_rows",
    "markdown_list",
    "markdown_page",
    "markdown_table",
    "not_measured",
    "section",
    "stage_rows",
    "tables",
    "with_section",
]

BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"

Rows: TypeAlias = list[list[str]]
"""The first row is the header."""

_HEADER = [
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
    """One row for each contender that was measured, without the columns that are empty for all of them."""
    rows = [_HEADER]
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
                format_bytes(c.peak_rss, round_up=True),
                format_bytes(c.peak_vram, round_up=True),
                *("-" if s is None else format_seconds(s) for s in (c.prepare_s, c.first_call_s, c.startup_s)),
            ]
        )
    kept = [i for i in range(len(_HEADER)) if len(rows) == 1 or any(row[i] != "-" for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def stage_rows(result: Result) -> Rows:
    """Seconds of each stage, and its share of the video."""
    rows = [["contender", *STAGES]]
    for c in _measured(result):
        assert c.total_s is not None
        cells = [c.stages.get(stage) for stage in STAGES]
        rows.append([c.name, *("-" if s is None else f"{s:.3g} s ({s / c.total_s:.0%})" for s in cells)])
    return rows


def curve_rows(curves: Sequence[Curve]) -> Rows:
    """Each curve's points, the slope of its line and its power."""
    rows = [["curve", "contender", "points", "slope", "power"]]
    for c in curves:
        points = ", ".join(f"{p.at:g}: {p.seconds.median:.3g} s" for p in c.points)
        rows.append([f"{c.what} / {c.axis}", c.contender, points, f"{c.slope:.3g} s", f"{c.exponent:.2f}"])
    return rows


def describe(result: Result) -> list[str]:
    """Lines on the workload, the machine, and the machine's peak."""
    w, m = result.workload, result.machine
    installed = m.get("packages", {})
    packages = [f"{n} {installed[n]}" for n in ("torch", "diffusers", "onnxruntime", "openvino") if n in installed]
    gpu = "; ".join(m.get("gpu") or ()) or "no GPU"
    rounds = max((len(c.rounds) for c in result.contenders), default=0)
    lines = [
        f"{w.model}, {w.precision}: {w.frames} frames of {w.width}x{w.height}, {w.steps} steps, decode chunks of "
        f"{w.decode_chunk_size}, seed {w.seed}; {rounds} round{'' if rounds == 1 else 's'}",
        f"{m.get('cpu')}, {result.threads} threads, {gpu}; {', '.join(packages)}; svd-trt {m.get('svd_trt')} at commit "
        f"{m.get('commit')}; {result.date[:10]}",
    ]
    if result.peak is not None:
        lines.append(_describe_peak(result))
    host = [f"{c.name} {c.host_overhead_s * 1e3:.2f} ms" for c in _measured(result) if c.host_overhead_s is not None]
    if host:
        lines.append(f"part of a step outside its network: {', '.join(host)}")
    return lines


def _describe_peak(result: Result) -> str:
    peak, flops = result.peak, result.workload.step_flops
    assert peak is not None
    line = f"peak: {peak.flops_per_s / 1e9:,.0f} GFLOP/s in an {peak.precision} matrix product of size {peak.size}"
    if flops is not None:
        line += f"; a step is {flops / 1e9:,.0f} GFLOP as diffusers computes it"
    shares = [f"{c.name} {c.share_of_peak:.0%}" for c in _measured(result) if c.share_of_peak is not None]
    return f"{line}; share of the peak: {', '.join(shares)}" if shares else line


def not_measured(result: Result) -> list[str]:
    """Contenders and figures that were not measured, and why."""
    return [*(f"{c.name}: {c.skipped}" for c in result.contenders if c.skipped is not None), *result.notes]


def tables(result: Result) -> list[Table]:
    """The result for a terminal."""
    rows = [main_rows(result), stage_rows(result)]
    return [as_table(r) for r in ([*rows, curve_rows(result.curves)] if result.curves else rows)]


def as_table(rows: Rows) -> Table:
    """The rows for a terminal; columns after the first are aligned right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def markdown_page(result: Result) -> str:
    """The whole result in Markdown."""
    parts = [markdown_list(describe(result)), markdown_table(main_rows(result)), markdown_table(stage_rows(result))]
    if result.curves:
        parts.append(markdown_table(curve_rows(result.curves)))
    if reasons := not_measured(result):
        parts.append(f"Not measured:\n\n{markdown_list(reasons)}")
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: Rows) -> str:
    """The rows as a table in Markdown; columns after the first are aligned right."""
    header, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *body))


def markdown_list(lines: Sequence[str]) -> str:
    """The lines as a list in Markdown."""
    return "\n".join(f"- {line}" for line in lines)


def section(results: Sequence[tuple[Path, Result]], page: Path) -> str:
    """The section of ``page`` between `BEGIN` and `END`: tables and plots of each result, those with curves last."""
    parts = []
    for path, result in sorted(results, key=lambda item: bool(item[1].curves)):
        parts.append(f"From [{path.name}]({_relative(path, page)}), by `{result.command}`:")
        parts.append(markdown_table(main_rows(result)))
        if result.curves:
            parts.append(markdown_table(curve_rows(result.curves)))
        parts.append(markdown_list(describe(result)))
        axes = dict.fromkeys(curve.axis.replace("_", "-") for curve in result.curves)
        plots = {"speed": "speed against eager diffusers"} | {f"curve-{a}": f"time and memory by {a}" for a in axes}
        for name, title in plots.items():
            if (plot := path.with_name(f"{path.stem}-{name}.png")).exists():
                parts.append(f"![{title}]({_relative(plot, page)})")
    return "\n\n".join(parts)


def with_section(text: str, new: str, begin: str = BEGIN, end: str = END) -> str:
    """``text`` with ``new`` between the markers ``begin`` and ``end``.

    Raises:
        ResultError: the text does not have both markers once, in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ResultError(f"the page has no place for the section; put {begin} and {end} on lines of their own")
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n\n{new}\n\n{end}{tail}"


@click.command()
@click.argument("page", type=click.Path(path_type=Path))
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True)
def main(page: Path, files: tuple[Path, ...]) -> None:
    """Write the performance section of PAGE from the results FILES."""
    try:
        text = page.read_text()
    except OSError as error:
        raise OutputError(f"cannot read {page}: {error.strerror}") from error
    write_file(page, with_section(text, section([(path, read_result(path)) for path in files], page)).encode())


def _relative(path: Path, page: Path) -> str:
    return Path(os.path.relpath(path, page.parent)).as_posix()


def _measured(result: Result) -> list[ContenderResult]:
    return [c for c in result.contenders if c.spread is not None]


def _seconds(s: Summary) -> str:
    return f"{s.median:.3g} s" + (f" ({s.low:.3g}-{s.high:.3g})" if s.low < s.high else "")


def _ratio(s: Summary) -> str:
    return f"{s.median:.2f} ({s.low:.2f}-{s.high:.2f})"


if __name__ == "__main__":
    main()
