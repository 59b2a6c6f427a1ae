"""Clocks for code that other people wrote: marks between its stages, and the seconds between them once all is done."""

from __future__ import annotations

import time
from typing import Any, Protocol

__all__ = ["Clock", "CudaClock", "HostClock", "clock_for"]


class Clock(Protocol):
    """Sets marks; what a mark is, is its own affair."""

    def mark(self) -> Any:
        """Note that everything asked for so far comes before, and what is asked for next comes after."""

    def settle(self) -> None:
        """Wait until every mark is reached; before that no seconds are known."""

    def seconds(self, earlier: Any, later: Any) -> float:
        """Seconds between two marks."""


class HostClock:
    """Where a call returns when its work is done."""

    def mark(self) -> float:
        """Now."""
        return time.perf_counter()

    def settle(self) -> None:
        """Every mark was reached when it was set."""

    def seconds(self, earlier: float, later: float) -> float:
        """Seconds between two marks."""
        return later - earlier


class CudaClock:
    """CUDA events on torch's current stream.

    The host waits for none of them until all is done, or what is measured would no longer be what a user runs.
    """

    def mark(self) -> Any:
        """An event that the GPU reaches after what was enqueued so far."""
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        """Wait for the GPU."""
        import torch

        torch.cuda.synchronize()

    def seconds(self, earlier: Any, later: Any) -> float:
        """Seconds on the GPU, which counts them in steps of half a microsecond."""
        return float(earlier.elapsed_time(later)) / 1e3


def clock_for(*, gpu: bool) -> Clock:
    """The clock for work of torch on a GPU, or on the CPU."""
    return CudaClock() if gpu else HostClock()
