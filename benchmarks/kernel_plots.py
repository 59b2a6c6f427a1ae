"""Plots of the kernels of one bundle, or of two beside each other: bytes by kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from svd_trt.engine.kernel_kinds import KINDS, Kind
from svd_trt.engine.kernels import KernelCost
from svd_trt.errors import OutputError

__all__ = ["plot_kernels"]

Panel: TypeAlias = Mapping[str, Sequence[KernelCost]]
"""The kernels of one network, by the label of their bundle."""

# Okabe and Ito's colours, which colour-blind readers can distinguish.
_COLOURS = ("#9A9A9A", "#0072B2")
_WIDTH = 9.0
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_DPI = 130


def plot_kernels(panels: Mapping[str, Panel], path: Path) -> None:
    """Write a picture with a panel for each network, by its title. Each panel has one unit, which its axis names.

    Raises:
        OutputError: the file cannot be written, for example because its folder does not exist.
    """
    mpl.use("Agg")
    kinds = {title: _kinds_of(panel) for title, panel in panels.items()}
    heights = [0.9 + len(kinds[title]) * (0.24 + 0.2 * len(panels[title])) for title in panels]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.7), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, title in zip(grid[:, 0], panels, strict=True):
        _draw(axes, title, panels[title], kinds[title])
    figure.supxlabel(
        "Bytes read (dark) and written (light), without weights; number of kernels. From the builder's list: no "
        "caches, not measured",
        fontsize=8,
        color="#555555",
        x=0.01,
        ha="left",
    )
    try:
        figure.savefig(path, dpi=_DPI, format="png")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def _kinds_of(panel: Panel) -> list[Kind]:
    """Kinds that move more than nothing in one of the bundles, the heaviest first."""
    most = {kind: max(_moved(costs, kind) for costs in panel.values()) for kind in KINDS}
    visible = max(most.values(), default=0) / 1000
    return sorted((kind for kind in KINDS if most[kind] > visible), key=lambda kind: -most[kind])


def _draw(axes: Axes, title: str, panel: Panel, kinds: Sequence[Kind]) -> None:
    height = 0.8 / len(panel)
    colours = _COLOURS[-len(panel) :]
    factor, unit = _unit(panel)
    for place, (label, costs) in enumerate(panel.items()):
        legend = f"{label}: {_figure(sum(c.moved for c in costs) / factor)} {unit}, {len(costs):,} kernels"
        for row, kind in enumerate(kinds):
            y = row + (place - (len(panel) - 1) / 2) * height
            _bar(
                axes,
                y,
                height,
                [c for c in costs if c.kernel.kind == kind],
                factor,
                colours[place],
                legend if row == 0 else None,
            )
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(unit, fontsize=9)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_ylim(len(kinds) - 0.45, -0.55)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.12)
    if kinds:
        axes.legend(loc="lower right", frameon=False, fontsize=9)


def _bar(
    axes: Axes, y: float, height: float, costs: Sequence[KernelCost], factor: float, colour: str, legend: str | None
) -> None:
    read, written = (sum(c.read for c in costs) / factor, sum(c.written for c in costs) / factor)
    axes.barh(y, read, height * 0.9, color=colour, label=legend)
    axes.barh(y, written, height * 0.9, left=read, color=colour, alpha=0.55)
    text = f" {_figure(read + written)}, {len(costs)}" if costs else " none"
    axes.text(read + written, y, text, va="center", fontsize=8)


def _unit(panel: Panel) -> tuple[float, str]:
    """Bytes in a unit, and its name: the largest that the longest bar reaches."""
    longest = max((_moved(costs, kind) for costs in panel.values() for kind in KINDS), default=0)
    return next((unit for unit in _UNITS if longest >= unit[0]), _UNITS[-1])


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _moved(costs: Sequence[KernelCost], kind: Kind) -> int:
    return sum(c.moved for c in costs if c.kernel.kind == kind)
