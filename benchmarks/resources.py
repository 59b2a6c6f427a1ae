"""What a process takes of the machine: memory of both kinds, and energy."""

from __future__ import annotations

import os
import resource
import sys
import threading
from types import TracebackType
from typing import Any, Self

__all__ = ["GpuMeter", "peak_rss"]

_INTERVAL = 0.02


def peak_rss() -> int:
    """Most bytes that this process had resident at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class GpuMeter:
    """Energy and memory of the first GPU while the block runs, by NVML; nothing where there is none.

    Memory is what this process holds, all of its libraries together, sampled fifty times a second.
    """

    def __init__(self, *, enabled: bool) -> None:
        self.energy_j: float | None = None
        self.peak_vram: int | None = None
        self._enabled = enabled
        self._done = threading.Event()

    def __enter__(self) -> Self:
        if self._enabled:
            import pynvml

            pynvml.nvmlInit()
            self._nvml: Any = pynvml
            self._gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
            self._start = self._energy()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            self._done.set()
            self._thread.join()
            end = self._energy()
            if self._start is not None and end is not None:
                self.energy_j = (end - self._start) / 1e3
            self._nvml.nvmlShutdown()

    def _energy(self) -> float | None:
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu))  # millijoules
        except self._nvml.NVMLError:
            return None  # older GPUs do not count it

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL):
            mine = [p for p in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._gpu) if p.pid == os.getpid()]
            used = max((p.usedGpuMemory or 0 for p in mine), default=0)
            if used:
                self.peak_vram = max(self.peak_vram or 0, used)
