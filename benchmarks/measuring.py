"""Measuring within a contender's process: clocks, memory, energy, and how close frames are to the reference."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from svd_trt.benchmarks.results import Fidelity
from svd_trt.engine.driver import load_driver
from svd_trt.errors import SvdTrtError
from svd_trt.export.fidelity import psnr

__all__ = [
    "Clock",
    "CudaClock",
    "GpuMeter",
    "HostClock",
    "clock_for",
    "compare_frames",
    "free_vram",
    "peak_rss",
    "pin_threads",
    "used_vram",
]

_INTERVAL = 0.02  # seconds between samples of the GPU's memory
_WINDOW = 7  # of SSIM; scikit-image's default
_T = TypeVar("_T")


class Clock(Protocol):
    """Times the stages of torch code without synchronising within them."""

    def event(self) -> Any:
        """Record an event: after all work that was enqueued so far, before what is enqueued next."""

    def wait(self) -> None:
        """Wait until every event has happened; only then can `seconds` be called."""

    def seconds(self, earlier: Any, later: Any) -> float:
        """Seconds between two events."""


class HostClock:
    """The host's clock, for calls that return when their work is done."""

    def event(self) -> float:
        return time.perf_counter()

    def wait(self) -> None:
        return

    def seconds(self, earlier: float, later: float) -> float:
        return later - earlier


class CudaClock:
    """CUDA events on torch's current stream. The host waits once, at the end, as a user's program does."""

    def event(self) -> Any:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        import torch

        torch.cuda.synchronize()

    def seconds(self, earlier: Any, later: Any) -> float:
        return float(earlier.elapsed_time(later)) / 1e3  # with a resolution of half a microsecond


def clock_for(*, gpu: bool) -> Clock:
    """The clock for torch's work on a GPU, or on the CPU."""
    return CudaClock() if gpu else HostClock()


def pin_threads(threads: int) -> None:
    """Run this process on the first ``threads`` of its processors; libraries size their thread pools by that."""
    if hasattr(os, "sched_setaffinity"):
        allowed: Any = sorted(os.sched_getaffinity(0))[:threads]
        os.sched_setaffinity(0, allowed)


def peak_rss() -> int:
    """The most bytes that this process has had resident at once.

    Linux starts a process's ``ru_maxrss`` with its parent's, so it is only read on other systems.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def used_vram(*, enabled: bool) -> int:
    """Bytes that all processes use on CUDA's first GPU; 0 if that is not known."""
    with _Nvml(enabled=enabled) as nvml:
        return nvml.used() or 0


def free_vram() -> int | None:
    """Bytes that are free on CUDA's first GPU; None if that is not known."""
    with _Nvml(enabled=True) as nvml:
        return nvml.free()


class GpuMeter:
    """Energy and memory of CUDA's first GPU during the block, by NVML; None if NVML does not know them.

    Memory is what is used beyond ``before`` bytes, sampled fifty times a second. NVML cannot tell processes apart
    within a container, so no other process may allocate or free memory meanwhile.
    """

    def __init__(self, *, enabled: bool, before: int = 0) -> None:
        self._before = before
        self.energy_j: float | None = None
        self.peak_vram: int | None = None
        self._nvml = _Nvml(enabled=enabled)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._nvml.__enter__()
        self._start = self._nvml.energy()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        end = self._nvml.energy()
        if self._start is not None and end is not None:
            self.energy_j = end - self._start
        self._nvml.__exit__()

    def _sample(self) -> None:
        while (used := self._nvml.used()) is not None:
            self.peak_vram = max(self.peak_vram or 0, used - self._before)
            if self._done.wait(_INTERVAL):
                break


class _Nvml:
    """NVML for CUDA's first GPU; a figure that NVML cannot give on this machine is None."""

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
                # CUDA_VISIBLE_DEVICES and CUDA's own order can make its first GPU another than NVML's.
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
        """Joules since the driver was loaded, which older GPUs do not count."""
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


def compare_frames(frames: npt.NDArray[np.uint8], reference: npt.NDArray[np.uint8]) -> Fidelity:
    """PSNR, and SSIM (Wang et al. 2004) by scikit-image, of each frame of ``[F, H, W, 3]`` and of the worst frame.

    Raises:
        ValueError: the shapes differ.
    """
    from skimage.metrics import structural_similarity

    if frames.shape != reference.shape:
        raise ValueError(f"frames of shape {frames.shape} cannot be compared with {reference.shape}")
    pairs = list(zip(reference, frames, strict=True))
    decibels = [psnr(frame, expected) for expected, frame in pairs]
    ssim = [float(structural_similarity(a, b, channel_axis=-1, win_size=_WINDOW)) for a, b in pairs]
    return Fidelity(psnr_db=decibels, ssim=ssim, worst_psnr_db=min(decibels), worst_ssim=min(ssim))
