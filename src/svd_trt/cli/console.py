"""What the commands share on the terminal: messages and bars go to standard error, results to standard output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

__all__ = ["bars", "print_json", "seconds", "stderr"]


def stderr(*, quiet: bool = False) -> Console:
    """Where people read; silent where they asked for that."""
    return Console(stderr=True, quiet=quiet, highlight=False)


def bars(console: Console) -> Progress:
    """Progress bars in the project's one style."""
    return Progress(
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        console=console,
    )


def print_json(fields: Mapping[str, Any]) -> None:
    """One JSON object on standard output."""
    click.echo(json.dumps(fields, indent=1))


def seconds(value: float) -> str:
    """``0.04 s``, ``3.2 s``, ``2 min 05 s``."""
    if value >= 60:
        return f"{int(value) // 60} min {int(value) % 60:02d} s"
    return f"{value:.2g} s" if value < 1 else f"{value:.1f} s"
