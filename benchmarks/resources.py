"""What a process takes of the machine: memory of both kinds, and energy."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from svd_trt.engine.driver import load_driver
from svd_trt.errors import SvdTrtError

__all__ = ["GpuMeter", "free_vram", "peak_rss", "used_vram"]

_INTERVAL = 0.02
_T = TypeVar("_T")


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
    """Bytes in use on the GPU that CUDA has first, by all processes; 0 where that is not known."""
    with _Nvml(enabled=enabled) as nvml:
        return nvml.used() or 0


def free_vram() -> int | None:
    """Bytes that are free on the GPU that CUDA has first; None where that is not known."""
    with _Nvml(enabled=True) as nvml:
        return nvml.free()


class GpuMeter:
    """Energy and memory of the GPU that CUDA has first, while the block runs, by NVML; nothing where it gives none.

    Memory is what is in use beyond ``before``, sampled fifty times a second. It is this process's as long as no other
    takes or gives back any: NVML tells processes apart by numbers that differ within a container.
    """

    def __init__(self, *, enabled: bool, before: int = 0) -> None:
        self._before = before
        self.energy_j: float | None = None
        self.peak_vram: int | None = None
        self._nvml = _Nvml(enabled=enabled)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._nvml.__enter__()
        self._start = self._nvml.energy()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        end = self._nvml.energy()
        if self._start is not None and end is not None:
            self.energy_j = end - self._start
        self._nvml.__exit__(kind, error, trace)

    def _watch(self) -> None:
        while (used := self._nvml.used()) is not None:
            self.peak_vram = max(self.peak_vram or 0, used - self._before)
            if self._done.wait(_INTERVAL):
                break


class _Nvml:
    """NVML's view of CUDA's first GPU: every question has an answer or None, as NVML lacks some on many machines."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._library: Any = None

    def __enter__(self) -> Self:
        if self._enabled:
            try:
                import pynvml
            except ImportError:
                return self
            try:
                pynvml.nvmlInit()
                # CUDA_VISIBLE_DEVICES and CUDA's own order make its first GPU another than NVML's.
                self._gpu = pynvml.nvmlDeviceGetHandleByPciBusId(_bus_id())
                self._library = pynvml
            except (SvdTrtError, pynvml.NVMLError):
                self._library = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._library is not None:
            self._library.nvmlShutdown()

    def used(self) -> int | None:
        """Bytes in use, by all processes."""
        return self._ask(lambda nvml: int(nvml.nvmlDeviceGetMemoryInfo(self._gpu).used))

    def free(self) -> int | None:
        """Bytes that are free."""
        return self._ask(lambda nvml: int(nvml.nvmlDeviceGetMemoryInfo(self._gpu).free))

    def energy(self) -> float | None:
        """Joules since the driver was loaded; older GPUs do not count them."""
        return self._ask(lambda nvml: float(nvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)) / 1e3)

    def _ask(self, question: Callable[[Any], _T]) -> _T | None:
        if self._library is None:
            return None
        try:
            return question(self._library)
        except self._library.NVMLError:
            return None


def _bus_id() -> bytes:
    driver = load_driver()
    text = driver.call("cuDeviceGetPCIBusId", 32, driver.call("cuDeviceGet", 0))
    return bytes(text).split(b"\0")[0]
