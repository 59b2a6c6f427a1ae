"""What ``svd-trt inspect --kernels`` shows: the kernels of a bundle's engines, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from svd_trt.engine.gpu_table import GpuFigures
from svd_trt.engine.kernel_kinds import KINDS
from svd_trt.engine.kernel_summary import bytes_by_use, costs_by_kind, heaviest, moved_bytes, profile_summary
from svd_trt.engine.kernels import KernelCost, KernelList, ProfileKernels, kernel_costs
from svd_trt.engine.roofline import roofline
from svd_trt.units import format_bytes, format_count, format_seconds

__all__ = ["ShownKernels", "kernels_dict", "print_comparison", "print_kernels", "ranges_text", "sizes_text"]

_NOTES = """\
Bytes are inputs and outputs of every kernel, as if nothing stayed in caches. fp32
spills are the part that is written in fp32 between half-precision kernels."""

_MODEL_NOTES = """\
A model, not measured: each kernel takes the longer of its bytes at the bandwidth
and its FLOP at the peak, both from the data sheet. Real kernels take longer, and
caches save bytes."""


@dataclass(frozen=True)
class ShownKernels:
    """The kernels of one network at one size."""

    kernels: KernelList
    index: int
    """Of the profile that the runtime takes for the sizes."""
    sizes: dict[str, int]

    @property
    def profile(self) -> ProfileKernels:
        """The profile that the runtime takes."""
        return self.kernels.profiles[self.index]

    @property
    def costs(self) -> list[KernelCost]:
        """What each kernel moves and computes."""
        return kernel_costs(self.profile, self.sizes)


def print_kernels(console: Console, shown: Sequence[ShownKernels], gpus: Sequence[GpuFigures], top: int) -> None:
    """Print the tables of each network: profiles, kinds, heaviest kernels, and the model for ``gpus``."""
    for one in shown:
        console.print(f"{one.kernels.network}{f' at {sizes_text(one.sizes)}' if one.sizes else ''}", style="bold")
        console.print()
        for table in (_profiles(one), _kinds(one.costs), _heaviest(one.costs, top)):
            console.print(table)
            console.print()
        if gpus:
            console.print(_models(one.costs, gpus))
            console.print()
        unknown = sum(not cost.known for cost in one.costs)
        if unknown:
            console.print(f"The sizes of tensors of {unknown} kernels are not known; those tensors are not counted.\n")
    console.print(_NOTES)
    if gpus:
        console.print(_MODEL_NOTES)


def print_comparison(console: Console, before: Sequence[ShownKernels], after: Sequence[ShownKernels]) -> None:
    """Print a table for each network that both have: kernels and bytes by kind."""
    others = {one.kernels.network: one for one in after}
    for one in before:
        other = others.get(one.kernels.network)
        if other is None:
            continue
        table = _table(one.kernels.network, "kernels", "", "bytes", "", "change")
        rows, other_rows = _with_all(one.costs), _with_all(other.costs)
        for kind in (*KINDS, "all"):
            old, new = rows.get(kind, []), other_rows.get(kind, [])
            if old or new:
                table.add_row(kind, str(len(old)), str(len(new)), *_change(moved_bytes(old), moved_bytes(new)))
        console.print(table)
        console.print()
    console.print(_NOTES)


def _with_all(costs: Sequence[KernelCost]) -> dict[str, list[KernelCost]]:
    return {str(kind): some for kind, some in costs_by_kind(costs).items()} | {"all": list(costs)}


def _change(old: int, new: int) -> tuple[str, str, str]:
    change = f"{new / old - 1:+.1%}" if old else "new"
    return format_bytes(old), format_bytes(new), change


def _profiles(one: ShownKernels) -> Table:
    table = _table("profile", "kernels", "read", "written", "fp32 spills", "activations")
    for index, profile in enumerate(one.kernels.profiles):
        sizes = profile.sizes(one.sizes)
        costs = [] if sizes is None else kernel_costs(profile, sizes)
        sums = bytes_by_use(costs)
        figures = (sums["read"], sums["written"], sums["fp32_spills"])
        table.add_row(
            f"{'*' if index == one.index else ' '} {ranges_text(profile)}",
            str(len(profile.kernels)),
            *(format_bytes(figure) if costs else "-" for figure in figures),
            format_bytes(profile.activation_bytes),
        )
    return table


def _kinds(costs: Sequence[KernelCost]) -> Table:
    table = _table("kind", "kernels", "read", "written", "weights", "fp32 spills", "FLOP", "bytes")
    total = moved_bytes(costs)
    for kind, members in _with_all(costs).items():
        table.add_row(
            kind,
            str(len(members)),
            *(format_bytes(size) if size else "-" for size in bytes_by_use(members).values()),
            _count(sum(cost.flops for cost in members)),
            f"{moved_bytes(members) / total:.1%}" if total else "-",
        )
    return table


def _heaviest(costs: Sequence[KernelCost], top: int) -> Table:
    table = _table("heaviest", "kind", "read", "written", "FLOP", left=2)
    for cost in heaviest(costs, top):
        table.add_row(
            _label(cost), cost.kernel.kind, format_bytes(cost.read), format_bytes(cost.written), _count(cost.flops)
        )
    return table


def _models(costs: Sequence[KernelCost], gpus: Sequence[GpuFigures]) -> Table:
    table = _table("model, not measured", "time", "bytes alone", "FLOP alone", "bytes decide")
    for gpu in gpus:
        model = roofline(costs, gpu)
        times = (model.seconds, model.memory_seconds, model.arithmetic_seconds)
        table.add_row(gpu.name, *map(_time, times), f"{model.memory_bound_share:.0%}")
    return table


def kernels_dict(one: ShownKernels, gpus: Sequence[GpuFigures], top: int) -> list[dict[str, Any]]:
    """Each profile of a network as JSON; figures are null if the profile does not hold the sizes."""
    profiles = enumerate(one.kernels.profiles)
    return [
        profile_summary(profile, one.sizes, top)
        | {"taken": index == one.index, "roofline": _models_dict(profile, one.sizes, gpus)}
        for index, profile in profiles
    ]


def _models_dict(
    profile: ProfileKernels, wanted: Mapping[str, int], gpus: Sequence[GpuFigures]
) -> list[dict[str, Any]]:
    sizes = profile.sizes(wanted)
    costs = [] if sizes is None else kernel_costs(profile, sizes)
    models = ((gpu, roofline(costs, gpu)) for gpu in gpus if costs)
    return [msgspec.to_builtins(model) | {"measured": False, "source": gpu.source} for gpu, model in models]


def _label(cost: KernelCost) -> str:
    """The first ONNX node of a kernel and the number of the others; the builder's name if it has none."""
    layers = cost.kernel.layers
    first = (layers[0] if layers else cost.kernel.name)[:26]
    return f"{first} +{len(layers) - 1}" if len(layers) > 1 else first


def ranges_text(profile: ProfileKernels) -> str:
    """``branches 2, frames 2 to 25``, or ``fixed``."""
    return sizes_text({symbol: r.words for symbol, r in profile.ranges.items()}) or "fixed"


def sizes_text(sizes: Mapping[str, Any]) -> str:
    """``branches 2, frames 25``."""
    return ", ".join(f"{symbol} {size}" for symbol, size in sizes.items())


def _count(flops: int) -> str:
    return format_count(flops) if flops else "-"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else format_seconds(seconds)


def _table(*headings: str, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < left else "right", no_wrap=True)
    return table
