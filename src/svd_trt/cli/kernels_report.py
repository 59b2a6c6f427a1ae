"""What ``svd-trt inspect --kernels`` shows: the kernels of a bundle's engines, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from svd_trt.engine.gpu_table import GpuFigures
from svd_trt.engine.kernel_kinds import KINDS
from svd_trt.engine.kernel_summary import bytes_by_use, costs_by_kind, heaviest, moved_bytes, profile_summary
from svd_trt.engine.kernels import KernelCost, KernelList, ProfileKernels, kernel_costs
from svd_trt.engine.roofline import roofline
from svd_trt.units import format_count, format_seconds

__all__ = [
    "ShownKernels",
    "kernels_dict",
    "print_comparison",
    "print_kernels",
    "profile_text",
    "ranges_text",
    "sizes_text",
]

_NOTES = """\
Bytes are inputs and outputs of every kernel, without weights, as if nothing
stayed in caches; "share" is of these bytes. "spills" are fp32 spills: the part
that is written in fp32 between half-precision kernels."""

_MODEL_NOTES = """\
A model, not measured: each kernel takes the longer of its bytes and weights at
the bandwidth and its FLOP at the peak, both from the data sheet. Real kernels
take longer, and caches save bytes."""


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

    @property
    def exact(self) -> bool:
        """True if the profile is for single sizes."""
        return all(r.fixed for r in self.profile.ranges.values())


def print_kernels(console: Console, shown: Sequence[ShownKernels], gpus: Sequence[GpuFigures], top: int) -> None:
    """Print the tables of each network: profiles, kinds, heaviest kernels, and the model for ``gpus``."""
    for one in shown:
        console.print(f"{one.kernels.network}{f' at {sizes_text(one.sizes)}' if one.sizes else ''}", style="bold")
        console.print()
        tables = [_profiles(one), _kinds(one.costs), *([_heaviest(one.costs, top)] if top else [])]
        for table in tables:
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


def print_comparison(
    console: Console, old_name: str, before: Sequence[ShownKernels], new_name: str, after: Sequence[ShownKernels]
) -> None:
    """Print a table for each network that both have: kernels and bytes by kind, in the two bundles."""
    console.print(f"before  {old_name}\nafter   {new_name}\n")
    olds = {one.kernels.network: one for one in before}
    for new in after:
        old = olds.get(new.kernels.network)
        if old is None:
            console.print(f"{new.kernels.network} has no list of kernels in {old_name}.\n")
            continue
        console.print(new.kernels.network, style="bold")
        console.print(f"before  {profile_text(old)}\nafter   {profile_text(new)}")
        if old.exact != new.exact:
            console.print("Only one of the profiles is exact: a part of the change is due to that.")
        console.print()
        console.print(_changes(old.costs, new.costs))
        console.print()
    console.print(_NOTES)


def _changes(old: Sequence[KernelCost], new: Sequence[KernelCost]) -> Table:
    table = _table("kind", "kernels before", "after", "bytes before", "after", "change")
    old_rows, new_rows = _with_all(old), _with_all(new)
    for kind in (*KINDS, "all"):
        olds, news = old_rows.get(kind, []), new_rows.get(kind, [])
        if olds or news:
            change = _change(moved_bytes(olds), moved_bytes(news))
            table.add_row(_name(kind), str(len(olds)), str(len(news)), *change)
    return table


def _with_all(costs: Sequence[KernelCost]) -> dict[str, list[KernelCost]]:
    return {str(kind): some for kind, some in costs_by_kind(costs).items()} | {"all": list(costs)}


def _change(old: int, new: int) -> tuple[str, str, str]:
    change = f"{new / old - 1:+.1%}" if old else "new"
    return _size(old), _size(new), change


def _profiles(one: ShownKernels) -> Table:
    table = _table("profile", "kernels", "read", "written", "spills", "activations")
    for index, profile in enumerate(one.kernels.profiles):
        sizes = profile.sizes(one.sizes)
        costs = [] if sizes is None else kernel_costs(profile, sizes)
        sums = bytes_by_use(costs)
        figures = (sums["read"], sums["written"], sums["fp32_spills"])
        table.add_row(
            f"{'*' if index == one.index else ' '} {ranges_text(profile)}",
            str(len(profile.kernels)),
            *(_size(figure) if costs else "-" for figure in figures),
            _size(profile.activation_bytes),
        )
    return table


def _kinds(costs: Sequence[KernelCost]) -> Table:
    table = _table("kind", "kernels", "read", "written", "weights", "spills", "FLOP", "share")
    total = moved_bytes(costs)
    for kind, members in _with_all(costs).items():
        table.add_row(
            _name(kind),
            str(len(members)),
            *(_size(size) if size else "-" for size in bytes_by_use(members).values()),
            _count(sum(cost.flops for cost in members)),
            f"{moved_bytes(members) / total:.1%}" if total else "-",
        )
    return table


def _heaviest(costs: Sequence[KernelCost], top: int) -> Table:
    table = _table("heaviest", "kind", "read", "written", "FLOP", left=2)
    for cost in heaviest(costs, top):
        table.add_row(_name(_label(cost)), cost.kernel.kind, _size(cost.read), _size(cost.written), _count(cost.flops))
    return table


def _models(costs: Sequence[KernelCost], gpus: Sequence[GpuFigures]) -> Table:
    table = _table("model, not measured", "least on paper", "bytes alone", "FLOP alone", "bytes decide")
    for gpu in gpus:
        model = roofline(costs, gpu)
        times = (model.seconds, model.memory_seconds, model.arithmetic_seconds)
        table.add_row(_name(gpu.name), *map(_time, times), f"{model.memory_bound_share:.0%}")
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


def profile_text(one: ShownKernels) -> str:
    """``branches 2, frames 3: exact``, or ``chunk 3: range, chunk 1 to 6``."""
    if not one.sizes:
        return "fixed"
    return f"{sizes_text(one.sizes)}: {'exact' if one.exact else f'range, {ranges_text(one.profile)}'}"


def sizes_text(sizes: Mapping[str, Any]) -> str:
    """``branches 2, frames 25``."""
    return ", ".join(f"{symbol} {size}" for symbol, size in sizes.items())


def _size(size: int | None) -> str:
    """``132 B``, ``29.8 MB``: three digits, so that seven figures fit beside a name on a terminal of 80 columns."""
    text = "-" if size is None else format_count(size)
    return text if size is None else f"{text}B" if " " in text else f"{text} B"


def _name(text: str) -> Text:
    """A cell that is cut if the terminal is too narrow; figures never are."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def _count(flops: int) -> str:
    return format_count(flops) if flops else "-"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else format_seconds(seconds)


def _table(*headings: str, left: int = 1) -> Table:
    """A table whose first column gives way on a narrow terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < left else "right", no_wrap=i > 0)
    return table
