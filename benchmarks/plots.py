"""Plots of a result, drawn from its file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from svd_trt.benchmarks.report import describe
from svd_trt.benchmarks.results import STAGES, ContenderResult, Curve, Result
from svd_trt.errors import OutputError, ResultError
from svd_trt.export.fidelity import IDENTICAL_DB
from svd_trt.units import format_bytes

__all__ = ["plot_result"]

# Okabe and Ito's colours, which colour-blind readers can distinguish.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
_SVD_TRT, _OTHER = _COLOURS[0], "#9A9A9A"
_WIDTH = 9.0
_DPI = 130


def plot_result(result: Result, folder: Path, stem: str) -> list[Path]:
    """Write ``stem-speed.png``, ``-stages``, ``-fidelity``, ``-memory`` and, for each curve's axis, one more.

    Raises:
        ResultError: nothing in it was measured.
        OutputError: a file cannot be written.
    """
    mpl.use("Agg")
    measured = [c for c in result.contenders if c.spread is not None]
    if not measured:
        raise ResultError("no contender of this result was measured; there is nothing to draw")
    figures = {"speed": _speed(measured), "stages": _stages(measured), "memory": _memory(measured)}
    if any(c.fidelity is not None for c in measured):
        figures["fidelity"] = _fidelity(measured)
    for axis in dict.fromkeys(curve.axis for curve in result.curves):
        name = axis.replace("_", "-")
        figures[f"curve-{name}"] = _curves([c for c in result.curves if c.axis == axis])
    paths = []
    for name, figure in figures.items():
        _caption(figure, result)
        paths.append(_save(figure, folder / f"{stem}-{name}.png"))
    return paths


def _save(figure: Figure, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=_DPI)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    return path


def _bars(measured: list[ContenderResult], title: str) -> tuple[Figure, Any]:
    """A figure with a row for each contender, the first on top."""
    figure = Figure(figsize=(_WIDTH, 1.9 + 0.42 * len(measured)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=12)
    axes.set_yticks(range(len(measured)), [c.name for c in measured])
    axes.set_ylim(len(measured) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _speed(measured: list[ContenderResult]) -> Figure:
    figure, axes = _bars(measured, "Whole video: speed against eager diffusers (longer is faster)")
    for row, c in enumerate(measured):
        assert c.spread is not None
        ratio, total = c.spread.ratio_to_eager, c.spread.total_s
        colour = _SVD_TRT if c.name.startswith("svd-trt") else _OTHER
        spread = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
        axes.barh(row, ratio.median, color=colour, xerr=spread, height=0.62, capsize=3, ecolor="#333333")
        label = f" {ratio.median:.2f}x, {total.median:.3g} s{_worst(c)}"
        axes.text(ratio.high, row, label, va="center", fontsize=9)
    axes.axvline(1.0, color="#333333", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, max(c.spread.ratio_to_eager.high for c in measured if c.spread) * 1.45)
    axes.set_xlabel("eager's time over this time, least and most of the rounds; dB: worst frame against fp32 eager")
    return figure


def _worst(c: ContenderResult) -> str:
    if c.psnr_db is None:
        return ""
    return ", identical" if c.psnr_db >= IDENTICAL_DB else f", {c.psnr_db:.0f} dB"


def _stages(measured: list[ContenderResult]) -> Figure:
    figure, axes = _bars(measured, "Where the time goes")
    for row, c in enumerate(measured):
        left = 0.0
        for colour, stage in zip(_COLOURS, STAGES, strict=False):
            seconds = c.stages[stage]
            axes.barh(row, seconds, left=left, color=colour, height=0.62, label=stage if row == 0 else None)
            left += seconds
    axes.set_xlabel("seconds (stages may overlap)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.28), ncols=len(STAGES), frameon=False, fontsize=9)
    return figure


def _memory(measured: list[ContenderResult]) -> Figure:
    figure, axes = _bars(measured, "Most memory held at once")
    on_gpu = any(c.peak_vram is not None for c in measured)
    height = 0.31 if on_gpu else 0.62
    for row, c in enumerate(measured):
        for index, (size, colour) in enumerate(((c.peak_rss, _COLOURS[0]), (c.peak_vram, _COLOURS[1]))):
            if size is None:
                continue
            at = row + (index - 0.5) * height if on_gpu else row
            axes.barh(at, size / 1e9, color=colour, height=height, label=("RAM", "VRAM")[index] if row == 0 else None)
            axes.text(size / 1e9, at, f" {format_bytes(size, round_up=True)}", va="center", fontsize=9)
    if on_gpu:
        axes.legend(frameon=False)
    axes.set_xlabel("GB of main memory" if not on_gpu else "GB")
    axes.margins(x=0.15)
    return figure


def _fidelity(measured: list[ContenderResult]) -> Figure:
    figure = Figure(figsize=(_WIDTH, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_title("Each frame against eager diffusers in fp32", loc="left", fontsize=12)
    for index, c in enumerate(measured):
        if c.fidelity is None or c.fidelity.worst_psnr_db >= IDENTICAL_DB:
            continue
        shown = [min(v, 100.0) for v in c.fidelity.psnr_db]
        axes.plot(range(len(shown)), shown, marker="o", markersize=4, color=_COLOURS[index % 8], label=c.name)
    axes.set_xlabel("frame")
    axes.set_ylabel("PSNR in dB; 100 and more are drawn as 100")
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "all identical", transform=axes.transAxes, ha="center")
    return figure


def _curves(curves: list[Curve]) -> Figure:
    figure = Figure(figsize=(_WIDTH, 4), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for index, c in enumerate(curves):
        at, colour = [p.at for p in c.points], _COLOURS[index % 8]
        label = f"{c.contender}: {c.slope:.3g} s each, power {c.exponent:.2f}"
        time.plot(at, [p.seconds.median for p in c.points], "o", color=colour, label=label, markersize=5)
        time.plot([at[0], at[-1]], [c.intercept + c.slope * x for x in (at[0], at[-1])], color=colour, linewidth=1)
        memory.plot(at, [(p.peak_bytes or 0) / 1e9 for p in c.points], marker="o", color=colour, markersize=5)
    axis = curves[0].axis.replace("_", " ")
    for axes in (time, memory):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes, label in ((time, f"{curves[0].what.replace('_s', '')}, seconds"), (memory, "most memory, GB")):
        axes.set_xlabel(axis)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", frameon=False, fontsize=8)
    return figure


def _caption(figure: Figure, result: Result) -> None:
    figure.supxlabel("\n".join(describe(result)[:2]), fontsize=6.5, color="#555555", x=0.01, ha="left")
