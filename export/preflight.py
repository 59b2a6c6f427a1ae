"""Disk and memory that a build will need, estimated before it starts.

The factors are a little more than full-size builds in fp16 took (benchmarks/results); fp32 is estimated with the same.
"""

from __future__ import annotations

import resource
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from svd_trt.engine.manifest import Precision, precision_of
from svd_trt.engine.spec import SHALLOW, NetworkName
from svd_trt.errors import ResourceError
from svd_trt.export.checkpoint import COMPONENT_OF, Component
from svd_trt.units import format_bytes

__all__ = ["Work", "check_resources", "check_space", "disk_needed", "memory_needed"]

# Bytes of memory for each byte of the largest network's weights, over what the programs themselves take.
_EXPORT_FACTOR, _EXPORT_BASE = 1.3, 1.4e9
_ENGINE_FACTOR, _ENGINE_BASE = 2.35, 0.6e9
_CGROUP = Path("/sys/fs/cgroup")

# The share of the denoiser's weights that remains after the exact rewrites.
_REWRITTEN = 0.92
# The share of a published UNet's weights that a shallow step needs.
_TOP_LEVEL = 0.05
# Bytes on disk for each byte of weights, and for each file beside them: compiled kernels and shapes.
_DISK_FACTOR, _DISK_EACH = 1.05, 20e6


@dataclass(frozen=True)
class Work:
    """What has to be made; finished networks and engines need no more disk and memory.

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


def check_resources(folder: Path, work: Work, cache: Path | None = None) -> None:
    """Check that disk and memory suffice for ``work``, whose files are written to ``folder`` and copied to ``cache``.

    Raises:
        ResourceError: there is not enough disk or memory; the message has both figures.
    """
    size = disk_needed(work)
    shared = cache is not None and cache.stat().st_dev == folder.stat().st_dev
    _check_disk(folder, 2 * size if shared else size, "-o")
    if cache is not None and not shared:
        _check_disk(cache, size, "--cache")
    memory, available = memory_needed(work), available_memory()
    if memory > available:
        raise ResourceError(
            f"this build needs about {format_bytes(memory, round_up=True)} of memory and "
            f"{format_bytes(available)} are available; close other programs, raise the limit, use a larger "
            "machine, or start anyway with --skip-checks"
        )


def _check_disk(folder: Path, size: float, option: str) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ResourceError(
            f"this build writes about {format_bytes(size, round_up=True)} and {folder.parent} has "
            f"{format_bytes(free)} free; free space, choose another {option}, or start anyway with --skip-checks"
        )


def check_space(directory: Path, weights: float) -> None:
    """Check that a checkpoint of ``weights`` bytes fits into memory, and then into ``directory``.

    Raises:
        ResourceError: there is not enough disk or memory; the message has both figures.
    """
    existing = next(folder for folder in directory.absolute().parents if folder.exists())
    free, available = shutil.disk_usage(existing).free, available_memory()
    if weights * _DISK_FACTOR > free:
        raise ResourceError(
            f"the checkpoint needs {format_bytes(weights, round_up=True)} of disk and {existing} has "
            f"{format_bytes(free)} free; choose another place"
        )
    if weights + _EXPORT_BASE > available:
        raise ResourceError(
            f"writing the checkpoint needs {format_bytes(weights + _EXPORT_BASE, round_up=True)} of memory and "
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
    if name == SHALLOW:
        return _loaded_bytes(name, work) * _TOP_LEVEL
    return _loaded_bytes(name, work) * (_REWRITTEN if name == "denoiser" and work.rewrites else 1.0)


def _loaded_bytes(name: NetworkName, work: Work) -> float:
    """Weights of the model as it is loaded."""
    count = work.parameters[COMPONENT_OF[name]]
    if name in ("vae_encoder", "vae_decoder"):
        # A third of the published VAE is its encoder, two thirds its decoder.
        count = round(count * (0.35 if name == "vae_encoder" else 0.65))
    return count * (4 if precision_of(name, work.precision) == "fp32" else 2)


def available_memory() -> float:
    """Bytes that this process may still allocate: of the machine with its swap, its control group and its own limit."""
    import psutil  # of the extra "export"; `build_bundle` has checked that it is installed

    machine = float(psutil.virtual_memory().available + psutil.swap_memory().free)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return min(machine, _control_group_rest(), float("inf") if limit == resource.RLIM_INFINITY else limit)


def _control_group_rest() -> float:
    """Bytes that a container's memory limit leaves (control groups, version 2)."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        figures = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        cache = int(figures["file"])
    except (OSError, ValueError, KeyError):
        return float("inf")
    return float("inf") if limit == "max" else int(limit) - used + cache
