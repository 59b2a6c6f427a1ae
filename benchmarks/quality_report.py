"""A result of ``svd-trt bench quality`` as a table, as Markdown, and in ``docs/quality.md``.

python -m svd_trt.benchmarks.quality_report docs/quality.md benchmarks/results/quality-tiny.json
"""

from __future__ import annotations

import os
from pathlib import Path

import click
from rich.table import Table

from svd_trt.benchmarks.quality import QualityResult, read_quality
from svd_trt.benchmarks.report import Rows, as_table, markdown_list, markdown_table, with_section
from svd_trt.benchmarks.results import write_file
from svd_trt.errors import OutputError
from svd_trt.export.fidelity import IDENTICAL_DB

__all__ = [
    "BEGIN",
    "END",
    "describe_quality",
    "quality_page",
    "quality_rows",
    "quality_section",
    "quality_table",
]

BEGIN, END = "<!-- quality:begin -->", "<!-- quality:end -->"


def quality_rows(result: QualityResult) -> Rows:
    """One row for each variant, the ones of the frontier marked with a star."""
    error = "error to the true clip" if result.truth else "error to the reference"
    rows = [["variant", "evaluations", "seconds", error, "PSNR to the reference", "worst", "frontier"]]
    for p in result.points:
        rows.append(
            [
                ", ".join(filter(None, (p.series, p.label))),
                f"{p.evaluations:g}",
                f"{p.seconds:.3g}",
                f"{p.error:.4f}",
                _decibels(p.psnr_db),
                _decibels(p.least_psnr_db),
                "*" if p.frontier else "",
            ]
        )
    return rows


def quality_table(result: QualityResult) -> Table:
    """The result for a terminal."""
    return as_table(quality_rows(result))


def describe_quality(result: QualityResult) -> list[str]:
    """Lines on the videos, the reference and the machine."""
    r, machine = result, result.machine
    arguments = ", ".join(f"{name} {value}" for name, value in r.reference.items())
    floor = f"; its own error to the true clips is {r.reference_error:.4f}" if r.truth else ""
    packages = machine.get("packages", {})
    return [
        f"{r.model}, {r.precision}: {r.pictures} video{'' if r.pictures == 1 else 's'} of {r.frames} frames of "
        f"{r.width}x{r.height}, seeds from {r.seed}",
        f"reference: {arguments or 'the defaults'}{floor}",
        f"{machine.get('cpu')}, {r.backend}, onnxruntime {packages.get('onnxruntime')}; svd-trt "
        f"{machine.get('svd_trt')} at commit {machine.get('commit')}; {r.date[:10]}",
        *(f"not measured: {note}" for note in r.notes),
    ]


def quality_page(result: QualityResult) -> str:
    """The whole result in Markdown."""
    return f"{markdown_table(quality_rows(result))}\n\n{markdown_list(describe_quality(result))}"


def quality_section(path: Path, result: QualityResult, page: Path) -> str:
    """The section of ``page`` between `BEGIN` and `END`: table and picture of the result in ``path``."""

    def relative(to: Path) -> str:
        return Path(os.path.relpath(to, page.parent)).as_posix()

    return "\n\n".join(
        [
            f"From [{path.name}]({relative(path)}), by `{result.command}`:",
            f"![error and PSNR against evaluations]({relative(path.with_suffix('.png'))})",
            quality_page(result),
        ]
    )


def _decibels(value: float) -> str:
    return "identical" if value >= IDENTICAL_DB else f"{value:.1f} dB"


@click.command()
@click.argument("page", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
def main(page: Path, file: Path) -> None:
    """Write the section of PAGE from the result FILE."""
    try:
        text = page.read_text()
    except OSError as error:
        raise OutputError(f"cannot read {page}: {error.strerror}") from error
    write_file(page, with_section(text, quality_section(file, read_quality(file), page), BEGIN, END).encode())


if __name__ == "__main__":
    main()
