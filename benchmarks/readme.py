"""The performance section of a README, made from result files: no figure in it is typed."""

from __future__ import annotations

import os
from pathlib import Path

from svd_trt.benchmarks.report import curve_rows, describe, grid, main_rows
from svd_trt.benchmarks.schema import Result
from svd_trt.errors import ResultError

__all__ = ["BEGIN", "END", "section", "with_section"]

BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"


def section(results: list[tuple[Path, Result]], readme: Path) -> str:
    """What stands between the marks: for each result its tables, and the plots that lie beside it; curves come last."""
    parts = []
    for path, result in sorted(results, key=lambda one: bool(one[1].curves)):
        parts.append(f"From [{path.name}]({_relative(path, readme)}), by `{result.command}`:")
        parts.append(grid(main_rows(result)))
        if result.curves:
            parts.append(grid(curve_rows(result.curves)))
        parts.append("\n".join(f"- {line}" for line in describe(result)))
        axes = dict.fromkeys(curve.axis.replace("_", "-") for curve in result.curves)
        pictures = {"speed": "speed against eager diffusers"} | {f"curve-{a}": f"time and memory by {a}" for a in axes}
        for name, title in pictures.items():
            if (plot := path.with_name(f"{path.stem}-{name}.png")).exists():
                parts.append(f"![{title}]({_relative(plot, readme)})")
    return "\n\n".join(parts)


def with_section(text: str, new: str) -> str:
    """``text`` with ``new`` between the marks.

    Raises:
        ResultError: the marks are not there, once and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ResultError(f"the README has no place for the section; put {BEGIN} and {END} on lines of their own")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{new}\n\n{END}{tail}"


def _relative(path: Path, readme: Path) -> str:
    return Path(os.path.relpath(path, readme.parent)).as_posix()
