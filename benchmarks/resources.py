"""What a process takes of the machine: memory of both kinds, and energy."""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["GpuMeter", "peak_rss", "used_vram"]

_INTERVAL = 0.02


def peak_rss() -> int:
    """Most bytes that this process had resident at once.

    Not ``ru_maxrss`` where there is another source: Linux has a process begin with that of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if found is not None:
            return int(found.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def used_vram(*, enabled: bool) -> int:
    """Bytes in use on the first GPU, by all processes; 0 where there is none."""
    if not enabled:
        return 0
    import pynvml

    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
    finally:
        pynvml.nvmlShutdown()


class GpuMeter:
    """Energy and memory of the first GPU while the block runs, by NVML; nothing where there is none.

    Memory is what is in use beyond ``before``, sampled fifty times a second. It is this process's as long as no other
    takes or gives back any: NVML tells processes apart by numbers that differ within a container.
    """

    def __init__(self, *, enabled: bool, before: int = 0) -> None:
        self._before = before
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
            used = int(self._nvml.nvmlDeviceGetMemoryInfo(self._gpu).used) - self._before
            self.peak_vram = max(self.peak_vram or 0, used)
