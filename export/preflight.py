"""Disk and memory that a build will need, foreseen before it starts rather than found out after minutes.

The factors are a little more than full-size builds in fp16 took (benchmarks/results); fp32 goes by the same.
"""

from __future__ import annotations

import resource
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from svd_trt.engine.manifest import Precision, precision_of
from svd_trt.engine.spec import NetworkName
from svd_trt.errors import ResourceError
from svd_trt.export.checkpoint import COMPONENT_OF, Component
from svd_trt.units import format_bytes

__all__ = ["Work", "check_resources", "check_space", "disk_needed", "memory_needed"]

# Bytes of memory for each byte of the largest network's weights, over what the programs themselves take.
_EXPORT_FACTOR, _EXPORT_BASE = 1.3, 1.4e9
_ENGINE_FACTOR, _ENGINE_BASE = 2.35, 0.6e9
_CGROUP = Path("/sys/fs/cgroup")

# What the exact rewrites leave of the denoiser's weights.
_REWRITTEN = 0.92
# Bytes on disk for each byte of weights, and for each file beside them: compiled kernels and shapes.
_DISK_FACTOR, _DISK_EACH = 1.05, 20e6


@dataclass(frozen=True)
class Work:
    """What has to be made; finished networks and engines need no more room.

    Attributes:
        exports: networks to export.
        engines: engines to build.
        parameters: weights of each component of the checkpoint.
        precision: of the bundle.
        rewrites: the networks are rewritten.
    """

    exports: Collection[NetworkName]
    engines: Collection[NetworkName]
    parameters: Mapping[Component, int]
    precision: Precision
    rewrites: bool = True


def check_resources(where: Path, work: Work) -> None:
    """Refuse to start what cannot end, in the folder ``where``.

    Raises:
        ResourceError: not enough disk or memory; the message has both figures.
    """
    disk, free = disk_needed(work), shutil.disk_usage(where).free
    if disk > free:
        raise ResourceError(
            f"this build writes about {format_bytes(disk, round_up=True)} and {where.parent} has "
            f"{format_bytes(free)} free; "
            "free space, choose another -o, or insist with --skip-checks"
        )
    memory, available = memory_needed(work), available_memory()
    if memory > available:
        raise ResourceError(
            f"this build needs about {format_bytes(memory, round_up=True)} of memory and "
            f"{format_bytes(available)} are available; "
            "close other programs, raise the limit, use a larger machine, or insist with --skip-checks"
        )


def check_space(directory: Path, weights: float) -> None:
    """Refuse to make a checkpoint of so many bytes, in memory and then in ``directory``, that would not fit.

    Raises:
        ResourceError: not enough disk or memory; the message has both figures.
    """
    there = next(folder for folder in directory.absolute().parents if folder.exists())
    free, available = shutil.disk_usage(there).free, available_memory()
    if weights * _DISK_FACTOR > free:
        raise ResourceError(
            f"this takes {format_bytes(weights, round_up=True)} of disk and {there} has {format_bytes(free)} free; "
            "choose another place"
        )
    if weights + _EXPORT_BASE > available:
        raise ResourceError(
            f"this takes {format_bytes(weights + _EXPORT_BASE, round_up=True)} of memory and "
            f"{format_bytes(available)} are available"
        )


def disk_needed(work: Work) -> float:
    """Bytes that the files of ``work`` will take."""
    made = (*work.exports, *work.engines)
    return sum(_weight_bytes(name, work) * _DISK_FACTOR + _DISK_EACH for name in made)


def memory_needed(work: Work) -> float:
    """Bytes of memory at the peak, when the largest network of ``work`` is exported or built."""
    exporting = max((_loaded_bytes(name, work) * _EXPORT_FACTOR + _EXPORT_BASE for name in work.exports), default=0.0)
    building = max((_weight_bytes(name, work) * _ENGINE_FACTOR + _ENGINE_BASE for name in work.engines), default=0.0)
    return max(exporting, building)


def _weight_bytes(name: NetworkName, work: Work) -> float:
    """Weights of the network that is written."""
    return _loaded_bytes(name, work) * (_REWRITTEN if name == "denoiser" and work.rewrites else 1.0)


def _loaded_bytes(name: NetworkName, work: Work) -> float:
    """Weights of the model as it is loaded."""
    count = work.parameters[COMPONENT_OF[name]]
    if name in ("vae_encoder", "vae_decoder"):
        # A third of the published VAE is its encoder, two thirds its decoder.
        count = round(count * (0.35 if name == "vae_encoder" else 0.65))
    return count * (4 if precision_of(name, work.precision) == "fp32" else 2)


def available_memory() -> float:
    """What this process may still take: of the machine, its swap, its control group and its limit."""
    import psutil  # of the extra for building, whose absence is reported before this

    machine = float(psutil.virtual_memory().available + psutil.swap_memory().free)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return min(machine, _control_group_room(), float("inf") if limit == resource.RLIM_INFINITY else limit)


def _control_group_room() -> float:
    """What a container's memory limit leaves (control groups, version 2)."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        figures = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        cache = int(figures["file"])
    except (OSError, ValueError, KeyError):
        return float("inf")
    return float("inf") if limit == "max" else int(limit) - used + cache
