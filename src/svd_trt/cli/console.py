"""Terminal output of all commands: messages and bars on standard error, results on standard output."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from svd_trt.errors import OutputError
from svd_trt.progress import Progress as ShowProgress

__all__ = ["Bars", "discard_stdout", "log_to", "print_json", "stderr", "stdout"]

_WIDTH_OF_FILES = 140


def stderr(*, quiet: bool = False) -> Console:
    """The console for messages and bars; it prints nothing if ``quiet``."""
    return Console(stderr=True, quiet=quiet, highlight=False, markup=False, soft_wrap=True)


def stdout() -> Console:
    """The console for results; without a terminal, tables are up to 140 columns wide."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=_WIDTH_OF_FILES)


@contextlib.contextmanager
def log_to(console: Console, *, style: str | None = None) -> Iterator[list[str]]:
    """Print what svd-trt logs, such as that it waits for another build, and return it in a list that grows."""
    messages: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())
            console.print(messages[-1], style=style, soft_wrap=True)

    logger, handler = logging.getLogger("svd_trt"), Handler()
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


class Bars:
    """Progress bars, in the same style for all commands; nothing is drawn before the first bar is added."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
        )
        self._drawn = False

    def add(self, description: str, total: float | None) -> TaskID:
        """Add a bar; without a total it shows activity and no share."""
        if not self._drawn:
            self._drawn = True
            self._progress.start()
        return self._progress.add_task(description, total=total, note="")

    def update(self, task: TaskID, completed: float, total: float | None = None, note: str | None = None) -> None:
        """Set the state of a bar; None leaves the total or the note unchanged."""
        changed: dict[str, Any] = {} if note is None else {"note": note}
        self._progress.update(task, completed=completed, total=total, **changed)

    def for_stages(self, note: Callable[[float, float], str]) -> ShowProgress:
        """A progress callback that shows one bar for each stage, with ``note(done, total)`` beside it."""
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: float, total: float) -> None:
            if stage not in tasks:
                tasks[stage] = self.add(stage, total)
            self.update(tasks[stage], done, note=note(done, total))

        return show

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            self._progress.stop()


def print_json(fields: Mapping[str, Any]) -> None:
    """Print ``fields`` as one JSON object on standard output.

    Raises:
        OutputError: standard output is closed or full.
    """
    try:
        click.echo(json.dumps(fields, indent=1))
        sys.stdout.flush()
    except OSError as error:
        discard_stdout()
        raise OutputError(f"cannot write to standard output: {error.strerror}") from error


def discard_stdout() -> None:
    """Send what is still buffered for standard output nowhere; otherwise the flush at exit may fail with code 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
