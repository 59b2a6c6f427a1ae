"""Disk and memory that a build will need, foreseen before it starts rather than found out after minutes.

The factors were measured on full-size builds (benchmarks/results); they are for models of gigabytes, and generous.
"""

from __future__ import annotations

import resource
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from svd_trt.engine.manifest import Precision, precision_of
from svd_trt.engine.spec import NetworkName
from svd_trt.errors import RoomError
from svd_trt.export.checkpoint import COMPONENT_OF, Component

__all__ = ["check_room", "disk_needed", "memory_needed"]

# Bytes of memory for each byte of the largest network's weights, over what the programs themselves take.
_EXPORT_FACTOR, _EXPORT_BASE = 1.2, 1.2e9
_ENGINE_FACTOR, _ENGINE_BASE = 2.3, 0.6e9
_DISK_FACTOR = 1.05
_CGROUP = Path("/sys/fs/cgroup")


def check_room(
    where: Path,
    networks: Collection[NetworkName],
    parameters: Mapping[Component, int],
    precision: Precision,
    *,
    engines: bool,
) -> None:
    """Refuse to start what cannot end.

    Args:
        where: the folder that is being written.
        networks: those that have to be made; finished ones need no more room.
        parameters: of each component of the checkpoint.
        precision: of the bundle.
        engines: TensorRT plans are built too.

    Raises:
        RoomError: not enough disk or memory; the message has both figures.
    """
    disk, free = disk_needed(networks, parameters, precision, engines=engines), shutil.disk_usage(where).free
    if disk > free:
        raise RoomError(
            f"this build writes about {disk / 1e9:.1f} GB and {where.parent} has {free / 1e9:.1f} GB free; "
            "free space, choose another -o, or insist with --skip-checks"
        )
    memory, available = memory_needed(networks, parameters, precision, engines=engines), _available_memory()
    if memory > available:
        raise RoomError(
            f"this build needs about {memory / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are available; "
            "close other programs, raise the limit, use a larger machine, or insist with --skip-checks"
        )


def disk_needed(
    networks: Collection[NetworkName], parameters: Mapping[Component, int], precision: Precision, *, engines: bool
) -> float:
    """Bytes that the files of ``networks`` will take."""
    weights = sum(_weight_bytes(name, parameters, precision) for name in networks)
    return weights * (2 if engines else 1) * _DISK_FACTOR


def memory_needed(
    networks: Collection[NetworkName], parameters: Mapping[Component, int], precision: Precision, *, engines: bool
) -> float:
    """Bytes of memory at the peak, when the largest of ``networks`` is exported or built."""
    largest = max((_weight_bytes(name, parameters, precision) for name in networks), default=0.0)
    exporting = largest * _EXPORT_FACTOR + _EXPORT_BASE
    building = largest * _ENGINE_FACTOR + _ENGINE_BASE if engines else 0.0
    return max(exporting, building)


def _weight_bytes(name: NetworkName, parameters: Mapping[Component, int], precision: Precision) -> float:
    count = parameters[COMPONENT_OF[name]]
    if name in ("vae_encoder", "vae_decoder"):
        # A third of the published VAE is its encoder, two thirds its decoder.
        count = round(count * (0.35 if name == "vae_encoder" else 0.65))
    return count * (4 if precision_of(name, precision) == "fp32" else 2)


def _available_memory() -> float:
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
