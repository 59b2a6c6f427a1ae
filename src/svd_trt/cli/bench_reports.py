"""``svd-trt bench plot`` and ``compare``, which read results and measure nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
from rich.table import Table

from svd_trt.cli.console import print_json, stderr, stdout
from svd_trt.errors import MissingDependencyError

__all__ = ["compare", "plot"]

_FILE = click.Path(path_type=Path)


@click.command("plot")
@click.argument("file", type=_FILE)
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), help="Folder.  [default: FILE's]")
def plot(file: Path, output: Path | None) -> None:
    """Draw the result FILE as PNG plots: speed, stages, memory, fidelity, and its curves; or quality.

    \b
    Example:
        svd-trt bench plot mid.json       (mid-speed.png, mid-stages.png, ...)
        svd-trt bench plot quality.json   (quality.png, of `svd-trt bench quality`)
    """
    try:
        from svd_trt.benchmarks.plots import plot_result
        from svd_trt.benchmarks.quality import is_quality, read_quality
        from svd_trt.benchmarks.quality_plot import plot_quality
        from svd_trt.benchmarks.results import read_result
    except ImportError as error:
        raise MissingDependencyError("svd-trt bench plot", "bench") from error
    if is_quality(file):
        path = (output or file.parent) / f"{file.stem}.png"
        plot_quality(read_quality(file), path)
        click.echo(path)
        return
    for path in plot_result(read_result(file), output or file.parent, file.stem):
        click.echo(path)


@click.command("compare")
@click.argument("old", type=_FILE)
@click.argument("new", type=_FILE)
@click.option("--all", "everything", is_flag=True, help="Also show figures that did not change.")
@click.option(
    "--fail-if-slower", type=click.FloatRange(0), metavar="PERCENT", help="Exit with 1 if a contender lost more speed."
)
@click.option("--json", "as_json", is_flag=True, help="Print every row as JSON.")
def compare(old: Path, new: Path, *, everything: bool, fail_if_slower: float | None, as_json: bool) -> None:
    """Show what changed beyond noise from the result OLD to the result NEW, both of the same video.

    A figure changed if its ranges over the rounds do not overlap and its median changed by more than 2 %.

    \b
    Examples:
        svd-trt bench compare before.json after.json
        svd-trt bench compare main.json branch.json --fail-if-slower 5
    """
    from svd_trt.benchmarks.compare import LEAST_ROUNDS, NO_LONGER, compare_results, same_machine
    from svd_trt.benchmarks.results import read_result

    a, b = read_result(old), read_result(new)
    rows = compare_results(a, b)
    if not same_machine(a, b):
        stderr().print("these are different machines: only ratios to eager and fidelity are compared", style="yellow")
    if min(len(c.rounds) for r in (a, b) for c in r.contenders if c.rounds) < LEAST_ROUNDS:
        stderr().print(
            f"fewer than {LEAST_ROUNDS} rounds: no verdict on times; measure with --rounds {LEAST_ROUNDS} or more",
            style="yellow",
        )
    limit = None if fail_if_slower is None else 1 - fail_if_slower / 100
    watched = [r for r in rows if r.figure == "x eager" or r.figure.startswith(NO_LONGER)]
    lost = [r for r in watched if limit and r.verdict == "worse" and r.ratio < limit]
    if as_json:
        print_json({"rows": [dataclasses.asdict(row) for row in rows]})
    else:
        shown = [row for row in rows if everything or row.verdict in ("better", "worse")]
        table = Table("contender", "figure", "old", "new", "new / old", "", box=None, pad_edge=False)
        for r in shown:
            table.add_row(r.contender, r.figure, f"{r.old:.4g}", f"{r.new:.4g}", f"{r.ratio:.3f}", r.verdict)
        stdout().print(table if shown else f"nothing changed beyond noise ({len(rows)} figures)")
    if lost:
        raise click.exceptions.Exit(1)
