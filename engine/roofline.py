"""A lower bound for the time of a list of kernels, from their bytes and operations: a model, never a measurement.

Every kernel takes at least as long as its bytes need at the GPU's memory bandwidth and as its operations need at the
GPU's peak (Williams et al. 2009, the roofline model). Real kernels reach neither, and caches save bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from svd_trt.engine.gpu_table import GpuFigures
from svd_trt.engine.kernels import KernelCost

__all__ = ["Roofline", "roofline"]


class Roofline(msgspec.Struct, frozen=True):
    """Seconds of the model."""

    gpu: str
    seconds: float
    """Sum over the kernels of the larger of both times."""
    memory_seconds: float
    """All bytes at the bandwidth, weights included."""
    arithmetic_seconds: float
    """All operations at the peak of each kernel's type."""
    memory_bound_share: float
    """The share of ``seconds`` in kernels whose bytes take longer than their operations."""


def roofline(costs: Sequence[KernelCost], gpu: GpuFigures) -> Roofline:
    """The model of ``costs``, kernels that run one after another, on ``gpu``."""
    memory = [(cost.moved + cost.weights) / (gpu.gb_per_s * 1e9) for cost in costs]
    peaks = ((gpu.fp16_tflops if cost.half else gpu.fp32_tflops) * 1e12 for cost in costs)
    arithmetic = [cost.flops / peak for cost, peak in zip(costs, peaks, strict=True)]
    seconds = sum(map(max, memory, arithmetic))
    bound = sum(m for m, a in zip(memory, arithmetic, strict=True) if m >= a)
    return Roofline(gpu.name, seconds, sum(memory), sum(arithmetic), bound / seconds if seconds else 0.0)
