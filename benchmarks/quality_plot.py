"""The picture of a result of ``svd-trt bench quality``: error and PSNR against evaluations, with the frontier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from svd_trt.benchmarks.quality import Point, QualityResult
from svd_trt.benchmarks.quality_report import describe_quality
from svd_trt.errors import OutputError

__all__ = ["draw_quality", "label_places", "plot_quality"]

# Okabe and Ito's colours, which colour-blind readers can distinguish.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#9A9A9A")
_MARKERS = "osD^vPX*"
_WIDTH, _HEIGHT, _DPI = 11.0, 5.6, 130
_TICKS = (2, 3, 4, 6, 8, 10, 15, 20, 30, 40, 50, 70, 100, 200, 400)
_MOST_DB = 100.0
_RADII = (7, 12, 18, 26, 36, 50)  # points from a marker to its label
_WAYS = ((0, 1), (0, -1), (1, 0.4), (-1, 0.4), (1, -0.4), (-1, -0.4), (0.7, 1), (-0.7, 1), (0.7, -1), (-0.7, -1))


def plot_quality(result: QualityResult, path: Path) -> None:
    """Write a picture of the error, if there are true clips, and of the PSNR to the reference.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        draw_quality(result).savefig(path, dpi=_DPI, format="png")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def draw_quality(result: QualityResult) -> Figure:
    """The figure that `plot_quality` writes."""
    mpl.use("Agg")
    panels: list[tuple[str, Callable[[Point], float], bool]] = [
        ("PSNR to the reference in dB, mean of the videos (higher is better)", _level, True)
    ]
    if result.truth:
        panels.insert(0, ("error to the true clip (lower is better)", lambda p: p.error, False))
    width = _WIDTH if len(panels) > 1 else _WIDTH * 0.7
    figure = Figure(figsize=(width, _HEIGHT), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    figure.suptitle("Quality against evaluations; numbers are steps", x=0.01, ha="left", fontsize=11)
    if result.points:
        for axes, (title, value, higher) in zip(grid, panels, strict=True):
            _draw(axes, result.points, value, higher=higher)
            axes.set_ylabel(title, fontsize=9)
        if result.truth:
            floor = result.reference_error
            grid[0].axhline(floor, color="#555555", linewidth=0.8, linestyle=":", label="error of the reference")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    lines = "\n".join(describe_quality(result)[:3])
    figure.text(0.99, 0.995, lines, fontsize=6, color="#555555", ha="right", va="top")
    for axes, (_, value, _) in zip(grid, panels, strict=True):
        _write_labels(figure, axes, result.points, value)
    return figure


def label_places(size: tuple[float, float], at: tuple[float, float], scale: float) -> list[Bbox]:
    """Where a label of ``size`` may be written beside the marker ``at``, in pixels of which a point has ``scale``.

    The best place is the first.
    """
    width, height = size
    places = []
    for radius in _RADII:
        for x, y in _WAYS:
            middle = (at[0] + x * (radius * scale + width / 2), at[1] + y * (radius * scale + height / 2))
            places.append(Bbox.from_bounds(middle[0] - width / 2, middle[1] - height / 2, width, height))
    return places


def _draw(axes: Axes, points: list[Point], value: Callable[[Point], float], *, higher: bool) -> None:
    colours = _colours(points)
    for index, (series, colour) in enumerate(colours.items()):
        chosen = sorted((p for p in points if p.series == series), key=lambda p: p.evaluations)
        again = index >= len(_COLOURS)  # hollow and dashed, since the colour and the marker are another series'
        line = ("--" if again else "-") if series else "none"  # variants that have nothing in common are not joined
        axes.plot(
            [p.evaluations for p in chosen],
            [value(p) for p in chosen],
            linestyle=line,
            linewidth=0.9,
            markersize=5,
            label=series or "variants",
            color=colour,
            marker=_MARKERS[index % len(_MARKERS)],
            fillstyle="none" if again else "full",
        )
    sign = -1 if higher else 1
    best, cost, height = float("inf"), [], []
    for point in sorted(points, key=lambda p: (p.evaluations, sign * value(p))):
        if sign * value(point) < best:
            best = sign * value(point)
            cost.append(point.evaluations)
            height.append(value(point))
    axes.plot(cost, height, drawstyle="steps-post", color="#BBBBBB", linewidth=4, zorder=0, label="frontier")
    axes.set_xscale("log")
    if not higher:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.3f}"))
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:.3f}"))
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("evaluations of the denoiser over one guidance branch, for a video", fontsize=9)
    axes.margins(x=0.08, y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize=8)


def _write_labels(figure: Figure, axes: Axes, points: list[Point], value: Callable[[Point], float]) -> None:
    """Write each label at the first place in the axes that is free of markers and of other labels."""
    figure.canvas.draw()
    renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    scale = figure.dpi / 72
    markers = [axes.transData.transform((p.evaluations, value(p))) for p in points]
    taken = [Bbox.from_bounds(x - 3.5 * scale, y - 3.5 * scale, 7 * scale, 7 * scale) for x, y in markers]
    inside, colours = axes.get_window_extent(renderer), _colours(points)
    for point, (x, y) in zip(points, markers, strict=True):
        text = axes.text(0, 0, point.label, fontsize=7, transform=None, ha="left", va="bottom")
        extent = text.get_window_extent(renderer)
        boxes = label_places((extent.width, extent.height), (x, y), scale)
        visible = [b for b in boxes if b.x0 >= inside.x0 and b.x1 <= inside.x1 and b.y1 <= inside.y1] or boxes
        box = next((b for b in visible if not any(b.overlaps(other) for other in taken)), visible[0])
        taken.append(box)
        text.remove()
        axes.annotate(
            point.label,
            (point.evaluations, value(point)),
            xytext=((box.x0 - x) / scale, (box.y0 - y) / scale),
            textcoords="offset points",
            fontsize=7,
            color=colours[point.series],
            ha="left",
            va="bottom",
        )


def _colours(points: list[Point]) -> dict[str, str]:
    series = dict.fromkeys(p.series for p in points)
    return {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(series)}


def _level(point: Point) -> float:
    return min(point.psnr_db, _MOST_DB)
