"""``svd-trt infer --profile FILE``: the times of layers as JSON, and the slowest of them as a table."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from svd_trt.benchmarks.results import write_file
from svd_trt.errors import OutputError
from svd_trt.runtime.layer_times import LayerTimes, layers_by_time, summarize_layers

__all__ = ["check_profile", "print_slowest_layers", "write_profile"]

_ROWS = 12
_NAME_WIDTH = 70


def check_profile(path: Path, others: Sequence[str | Path], bundle: Path) -> None:
    """Check before the work that the profile can be written to ``path`` and replaces none of ``others``.

    Raises:
        OutputError: it cannot, or it would replace an input, a video or a part of the bundle.
    """
    target = path.resolve()
    if target.is_relative_to(bundle.resolve()):
        raise OutputError(f"{path} is inside the bundle, which the next build replaces; choose another --profile")
    if any(Path(other).resolve() == target for other in others):
        raise OutputError(f"{path} is also an input picture or a video to write; choose another --profile")
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file for --profile, such as {path / 'layers.json'}")
    if not target.parent.is_dir():
        raise OutputError(f"cannot write {path}: the folder {target.parent} does not exist; create it first")
    _check_writable(path)


def _check_writable(path: Path) -> None:
    if path.exists() and not path.is_file():  # a pipe or a device, which a reader may await: opening it would end that
        if not os.access(path, os.W_OK):
            raise OutputError(f"cannot write {path}: permission denied; choose another place")
        return
    try:
        tempfile.TemporaryFile(dir=path.resolve().parent).close()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; choose another place") from error


def write_profile(path: Path, times: LayerTimes, run: dict[str, Any]) -> None:
    """Write ``times`` with ``run``, which says what was run, as JSON.

    Raises:
        OutputError: it cannot be written.
    """
    write_file(path, json.dumps({**run, "networks": summarize_layers(times)}, indent=1).encode() + b"\n")


def print_slowest_layers(console: Console, times: LayerTimes) -> None:
    """Print the layers that took longest in all, with their share of the time of all layers."""
    layers = layers_by_time(times)
    total = sum(layer.milliseconds for layer in layers)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("network", no_wrap=True)
    table.add_column("layer")  # gives way on a narrow terminal, so that figures are never cut
    for heading in ("calls", "total ms", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in layers[:_ROWS]:
        share = f"{layer.milliseconds / total:.1%}" if total else "-"
        table.add_row(layer.network, _name(layer.name), f"{layer.calls}", f"{layer.milliseconds:.2f}", share)
    rest = layers[_ROWS:]
    if rest:
        others = sum(layer.milliseconds for layer in rest)
        calls = sum(layer.calls for layer in rest)
        table.add_row("", _name(f"{len(rest):,} other layers"), f"{calls:,}", f"{others:.2f}", f"{others / total:.1%}")
    console.print(table)


def _name(name: str) -> Text:
    shortened = name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH - 1]}…"
    return Text(shortened, no_wrap=True, overflow="ellipsis")
