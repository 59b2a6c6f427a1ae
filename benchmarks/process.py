"""Running a command and watching what it takes."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

__all__ = ["Watched", "watch"]

_INTERVAL = 0.1


@dataclass(frozen=True)
class Watched:
    """A finished command.

    Attributes:
        stdout: what it printed.
        seconds: from its start to its end.
        peak_rss: most bytes resident at once in it and its children together, sampled ten times a second. Pages that
            they share count for each.
    """

    stdout: str
    seconds: float
    peak_rss: int


def watch(command: Sequence[str]) -> Watched:
    """Run ``command`` to its end; its standard error goes to ours.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    started = time.perf_counter()
    peak = 0
    # A file takes any amount of output while we look elsewhere; a pipe would fill up.
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(list(command), stdout=output)  # noqa: S603
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, _resident(watched))
            time.sleep(_INTERVAL)
        seconds = time.perf_counter() - started
        output.seek(0)
        stdout = output.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    return Watched(stdout, seconds, peak)


def _resident(process: psutil.Process) -> int:
    total = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    for member in family:
        try:
            total += member.memory_info().rss
        except psutil.Error:
            continue  # it ended meanwhile
    return total
