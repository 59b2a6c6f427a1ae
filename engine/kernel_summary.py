"""Sums over a list of kernels, as `svd-trt inspect` prints them and as records keep them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from svd_trt.engine.kernel_kinds import KINDS, Kind
from svd_trt.engine.kernels import KernelCost, ProfileKernels, kernel_costs

__all__ = ["bytes_by_use", "costs_by_kind", "heaviest", "moved_bytes", "profile_summary"]


def moved_bytes(costs: Sequence[KernelCost]) -> int:
    """Bytes of inputs and outputs, without weights."""
    return sum(cost.moved for cost in costs)


def bytes_by_use(costs: Sequence[KernelCost]) -> dict[str, int]:
    """Bytes read, written, of weights, and spilled in fp32 (which are also among those written)."""
    return {
        "read": sum(cost.read for cost in costs),
        "written": sum(cost.written for cost in costs),
        "weights": sum(cost.weights for cost in costs),
        "fp32_spills": sum(cost.spilled for cost in costs),
    }


def costs_by_kind(costs: Sequence[KernelCost]) -> dict[Kind, list[KernelCost]]:
    """The kernels of each kind that there is, the kind that moves most bytes first."""
    found = {kind: [cost for cost in costs if cost.kernel.kind == kind] for kind in KINDS}
    return {kind: found[kind] for kind in sorted(KINDS, key=lambda kind: -moved_bytes(found[kind])) if found[kind]}


def heaviest(costs: Sequence[KernelCost], count: int) -> list[KernelCost]:
    """The ``count`` kernels that move most bytes."""
    return sorted(costs, key=lambda cost: cost.moved, reverse=True)[:count]


def profile_summary(profile: ProfileKernels, wanted: Mapping[str, int], top: int) -> dict[str, Any]:
    """A profile as JSON: ranges, kernels, bytes and operations at the sizes in ``wanted``.

    Figures that depend on sizes are None if the profile does not hold them.
    """
    sizes = profile.sizes(wanted)
    head = {
        "ranges": msgspec.to_builtins(profile.ranges),
        "activation_bytes": profile.activation_bytes,
        "sizes": sizes,
        "kernels": len(profile.kernels),
    }
    if sizes is None:
        return head | dict.fromkeys(("bytes", "flops", "unknown", "by_kind", "heaviest"))
    costs = kernel_costs(profile, sizes)
    return head | {
        "bytes": bytes_by_use(costs),
        "flops": sum(cost.flops for cost in costs),
        "unknown": sum(not cost.known for cost in costs),
        "by_kind": {
            kind: {"kernels": len(some), "bytes": bytes_by_use(some), "flops": sum(cost.flops for cost in some)}
            for kind, some in costs_by_kind(costs).items()
        },
        "heaviest": [
            {
                "name": cost.kernel.name,
                "kind": cost.kernel.kind,
                "nodes": cost.kernel.layers,
                "flops": cost.flops,
                "bytes": bytes_by_use([cost]),
            }
            for cost in heaviest(costs, top)
        ],
    }
