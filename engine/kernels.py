"""The kernels of a plan: what TensorRT compiled, how much each reads, writes and computes, at any size.

The builder's log is the source (see `svd_trt.engine.builder_log`), so no GPU is needed. A bundle has one list beside
each plan, ``<kind>/<network>.kernels.json``. Bytes are counted as if every kernel read its inputs from memory and wrote
its outputs to memory; caches make real traffic smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from svd_trt.engine.builder_log import LoggedKernel, LoggedTensor, read_log
from svd_trt.engine.kernel_kinds import Kind, is_host_work, kind_of
from svd_trt.engine.kernel_shapes import AxisResolver
from svd_trt.engine.size_expressions import Product, evaluate
from svd_trt.engine.spec import NetworkName, NetworkSpec, Range
from svd_trt.errors import ArgumentError, BundleError

__all__ = [
    "Kernel",
    "KernelCost",
    "KernelList",
    "KernelTensor",
    "ProfileKernels",
    "kernel_costs",
    "parse_kernels",
    "read_kernels",
    "write_kernels",
]

_BYTES = {
    "Float": 4, "Half": 2, "BFloat16": 2, "FP8": 1, "Int64": 8, "Int32": 4, "Int8": 1, "UInt8": 1, "Bool": 1,
}  # fmt: skip


class KernelTensor(msgspec.Struct, frozen=True, array_like=True):
    """A tensor as some kernels see it; the whole tensor can be larger."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    """-1 is an axis that depends on the sizes of a run."""
    strides: tuple[int, ...]
    unknown: str | None = "1"
    """The product of the axes that are -1, for `svd_trt.engine.size_expressions`; None if nothing explains them."""

    def elements(self, sizes: Mapping[str, int]) -> int | None:
        """Number of elements at ``sizes``; None if not known."""
        if self.unknown is None:
            return None
        return math.prod(axis for axis in self.dims if axis != -1) * evaluate(self.unknown, sizes)

    @property
    def item_bytes(self) -> int:
        """Bytes of an element."""
        return _BYTES.get(self.dtype, 2)


class Kernel(msgspec.Struct, frozen=True, array_like=True):
    """One kernel; its tensors are positions in `ProfileKernels.tensors`."""

    name: str
    type: str
    """The builder's word, such as ``kgen`` for generated code."""
    kind: Kind
    inputs: tuple[int, ...]
    constants: tuple[int, ...]
    outputs: tuple[int, ...]
    flops: str | None
    """Floating-point operations of its products and convolutions, as an expression; None if it has none."""
    layers: tuple[str, ...]
    """The ONNX nodes that were fused into it."""


class ProfileKernels(msgspec.Struct, frozen=True):
    """The kernels that run when an engine uses one of its optimisation profiles, in order."""

    ranges: dict[str, Range]
    activation_bytes: int | None
    """At the largest sizes of the ranges, as the builder reports it."""
    tensors: tuple[KernelTensor, ...]
    kernels: tuple[Kernel, ...]

    def sizes(self, wanted: Mapping[str, int]) -> dict[str, int] | None:
        """A size for each symbol: the one in ``wanted``, else the largest. None if the profile lacks one of them."""
        if any(symbol in self.ranges and size not in self.ranges[symbol] for symbol, size in wanted.items()):
            return None
        return {symbol: wanted.get(symbol, r.max) for symbol, r in self.ranges.items()}


class KernelList(msgspec.Struct, frozen=True):
    """The kernels of one plan, for each of its profiles; empty if the builder's log lists none."""

    network: NetworkName
    profiles: tuple[ProfileKernels, ...]

    @property
    def known(self) -> bool:
        """True if the builder listed kernels."""
        return any(profile.kernels for profile in self.profiles)


class KernelCost(msgspec.Struct, frozen=True):
    """What one kernel moves and computes at certain sizes."""

    kernel: Kernel
    read: int
    """Bytes of its inputs."""
    written: int
    """Bytes of its outputs."""
    weights: int
    """Bytes of its constants."""
    spilled: int
    """Bytes of its outputs that are fp32 and that another kernel reads, in a network of half precision."""
    flops: int
    half: bool
    """True if it computes with half precision, which has another peak."""
    known: bool
    """False if the size of one of its tensors is not known; that tensor is not counted."""

    @property
    def moved(self) -> int:
        """Bytes of its inputs and outputs, without constants: what is meant by a kernel's bytes everywhere."""
        return self.read + self.written


def parse_kernels(
    messages: Iterable[str], spec: NetworkSpec, profiles: Sequence[tuple[dict[str, Range], int | None]]
) -> KernelList:
    """The kernels in the log of a builder whose ``profiling_verbosity`` is DETAILED.

    Args:
        messages: those that `svd_trt.engine.builder_log.concerns_kernels` keeps, in order.
        spec: of the network.
        profiles: ranges and activation bytes of each optimisation profile, in the builder's order.
    """
    kernels, layers = read_log(messages)
    found = []
    for index, (ranges, activation_bytes) in enumerate(profiles):
        resolver = AxisResolver(spec, layers)
        table = _Table(resolver)
        entries = tuple(table.add(k) for k in kernels if k.profile == index and not is_host_work(k))
        found.append(ProfileKernels(ranges, activation_bytes, tuple(table.tensors), entries))
    return KernelList(spec.name, tuple(found))


class _Table:
    """Collects the tensors of a profile's kernels, each view once."""

    def __init__(self, resolver: AxisResolver) -> None:
        self.tensors: dict[KernelTensor, int] = {}
        self._resolver = resolver

    def add(self, kernel: LoggedKernel) -> Kernel:
        """The entry of ``kernel``, the next one that runs."""
        inputs, outputs = self._resolver.resolve(kernel)
        kind = kind_of(kernel)
        computes = kind in ("product", "convolution", "attention")
        flops = self._resolver.operations(kernel, outputs) if computes else None
        return Kernel(
            name=kernel.name,
            type=kernel.type,
            kind=kind,
            inputs=self._places(kernel.inputs, inputs),
            constants=self._places(kernel.constants, [Product(1)] * len(kernel.constants)),
            outputs=self._places(kernel.outputs, outputs),
            flops=flops.text if flops else None,
            layers=kernel.layers,
        )

    def _places(self, tensors: Sequence[LoggedTensor], unknown: Sequence[Product | None]) -> tuple[int, ...]:
        views = (
            KernelTensor(t.name, t.dtype, t.dims, t.strides, rest.text if rest else None)
            for t, rest in zip(tensors, unknown, strict=True)
        )
        return tuple(self.tensors.setdefault(view, len(self.tensors)) for view in views)


def kernel_costs(profile: ProfileKernels, sizes: Mapping[str, int]) -> list[KernelCost]:
    """What each kernel of ``profile`` moves and computes at ``sizes``, a size for each symbol of its ranges.

    A kernel that sees one tensor several times reads it once; parts of a tensor count as far as they add up to the
    whole.

    Raises:
        ArgumentError: an expression in the list is damaged.
    """
    elements = [tensor.elements(sizes) for tensor in profile.tensors]
    nbytes = [None if n is None else n * t.item_bytes for n, t in zip(elements, profile.tensors, strict=True)]
    whole: dict[str, int] = {}
    for tensor, size in zip(profile.tensors, nbytes, strict=True):
        whole[tensor.name] = max(size or 0, whole.get(tensor.name, 0))
    spilled = _spilled_tensors(profile)

    def total(places: Sequence[int]) -> int:
        by_name: dict[str, int] = {}
        for place in places:
            name = profile.tensors[place].name
            by_name[name] = by_name.get(name, 0) + (nbytes[place] or 0)
        return sum(min(size, whole[name]) for name, size in by_name.items())

    return [
        KernelCost(
            kernel=kernel,
            read=total(kernel.inputs),
            written=total(kernel.outputs),
            weights=total(kernel.constants),
            spilled=total([p for p in kernel.outputs if profile.tensors[p].name in spilled]),
            flops=0 if kernel.flops is None else evaluate(kernel.flops, sizes),
            half=any(profile.tensors[place].dtype in ("Half", "BFloat16") for place in kernel.inputs),
            known=all(nbytes[place] is not None for place in kernel.inputs + kernel.outputs),
        )
        for kernel in profile.kernels
    ]


def _spilled_tensors(profile: ProfileKernels) -> set[str]:
    """Names of the fp32 tensors between kernels of a half-precision network."""
    if all(tensor.dtype != "Half" for tensor in profile.tensors):
        return set()
    tensors = (profile.tensors[place] for kernel in profile.kernels for place in kernel.inputs)
    return {tensor.name for tensor in tensors if tensor.dtype == "Float"}


def write_kernels(kernels: KernelList, path: Path) -> None:
    """Write the list as compact JSON."""
    path.write_bytes(msgspec.json.encode(kernels) + b"\n")


def read_kernels(path: Path) -> KernelList:
    """Read and check what `write_kernels` wrote.

    Raises:
        BundleError: the file is missing or damaged; `svd_trt.engine.bundle.Bundle.kernels` adds how to repair it.
    """
    try:
        kernels = msgspec.json.decode(path.read_bytes(), type=KernelList)
        for profile in kernels.profiles:
            kernel_costs(profile, {symbol: r.max for symbol, r in profile.ranges.items()})
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror})") from error
    except (msgspec.MsgspecError, ArgumentError, IndexError) as error:
        raise BundleError(f"{path} is not a list of kernels ({error})") from error
    return kernels
