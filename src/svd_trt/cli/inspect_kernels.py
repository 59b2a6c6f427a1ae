"""``svd-trt inspect --kernels``: which kernels are shown, at which sizes, and in which form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from svd_trt.cli.kernels_report import (
    ShownKernels,
    kernels_dict,
    print_comparison,
    print_kernels,
    ranges_text,
    sizes_text,
)
from svd_trt.engine.bundle import Bundle
from svd_trt.engine.gpu_table import find_gpu
from svd_trt.engine.kernels import KernelList
from svd_trt.engine.spec import NETWORKS, NetworkName
from svd_trt.errors import ArgumentError, MissingDependencyError

__all__ = ["KernelOptions", "add_kernels", "show_kernels"]


@dataclass(frozen=True)
class KernelOptions:
    """The options of ``svd-trt inspect --kernels``; a size that is None was not given."""

    network: str | None
    """None for all of them."""
    frames: int | None = None
    branches: int | None = None
    chunk: int | None = None
    batch: int | None = None
    height: int | None = None
    width: int | None = None
    gpus: tuple[str, ...] = ()
    top: int = 8
    compare: Path | None = None
    plot: Path | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that were given."""
        all_sizes = {
            "batch": self.batch,
            "branches": self.branches,
            "frames": self.frames,
            "chunk": self.chunk,
            "height": self.height,
            "width": self.width,
        }
        return {symbol: size for symbol, size in all_sizes.items() if size is not None}


def show_kernels(console: Console, bundle: Bundle, options: KernelOptions) -> None:
    """Print the kernels of ``bundle``, or how they differ from those of another, and draw the plot if one is wanted.

    Raises:
        ArgumentError: a network, a GPU or a size is not one that there is, or there are no lists of kernels.
        BundleError: a list is damaged, or the other bundle is.
        MissingDependencyError: a plot is wanted and matplotlib is not installed.
        OutputError: the plot cannot be written.
    """
    gpus = [find_gpu(name) for name in options.gpus]
    shown, others = _read_both(bundle, options)
    if options.compare is None:
        print_kernels(console, shown, gpus, options.top)
    else:
        console.print(f"{bundle.path} -> {options.compare}\n")
        print_comparison(console, shown, others)


def add_kernels(fields: dict[str, Any], bundle: Bundle, options: KernelOptions) -> dict[str, Any]:
    """``fields``, the JSON of ``svd-trt inspect``, with the profiles of each network, and of the other bundle's.

    Raises:
        SvdTrtError: as `show_kernels`.
    """
    gpus = [find_gpu(name) for name in options.gpus]
    shown, others = _read_both(bundle, options)
    for one in shown:
        fields["networks"][one.kernels.network]["profiles"] = kernels_dict(one, gpus, options.top)
    if options.compare is not None:
        compared = {one.kernels.network: {"profiles": kernels_dict(one, gpus, options.top)} for one in others}
        fields["compared"] = {"bundle": str(options.compare), "networks": compared}
    return fields


def _read_both(bundle: Bundle, options: KernelOptions) -> tuple[list[ShownKernels], list[ShownKernels]]:
    """The kernels of the bundle and of the one to compare it with, which are drawn if a plot is wanted."""
    shown = _read(bundle, options.network, options.sizes)
    others: list[ShownKernels] = []
    bundles = {str(bundle.path): shown}
    if options.compare is not None:
        other = Bundle.open(options.compare, verify=False)
        others = [match for one in shown for match in _read_alike(other, one)]
        bundles = _short_labels(bundle.path, other.path, shown, others)
    if options.plot is not None:
        _plot(options.plot, bundles)
    return shown, others


def _read_alike(other: Bundle, one: ShownKernels) -> list[ShownKernels]:
    """The same network of another bundle at the same sizes."""
    outside = [f"{symbol} {size}" for symbol, size in one.sizes.items() if size not in other.manifest.ranges.of(symbol)]
    if outside:
        raise ArgumentError(
            f"{other.path} is not for {', '.join(outside)}; give sizes that both bundles have, such as --frames 14"
        )
    return _read(other, one.kernels.network, one.sizes)


def _short_labels(
    first: Path, second: Path, shown: list[ShownKernels], others: list[ShownKernels]
) -> dict[str, list[ShownKernels]]:
    same = first.name == second.name
    labels = (str(first), f"{second} (compared)") if same else (first.name, second.name)
    return dict(zip(labels, (shown, others), strict=True))


def _plot(path: Path, bundles: Mapping[str, Sequence[ShownKernels]]) -> None:
    try:
        from svd_trt.benchmarks.kernel_plots import plot_kernels
    except ModuleNotFoundError as error:
        raise MissingDependencyError("--plot", "bench") from error
    panels: dict[str, dict[str, Any]] = {}
    for label, shown in bundles.items():
        for one in shown:
            title = one.kernels.network + (f" at {sizes_text(one.sizes)}" if one.sizes else "")
            panels.setdefault(title, {})[label] = one.costs
    plot_kernels(panels, path)


def _read(bundle: Bundle, network: str | None, wanted: Mapping[str, int]) -> list[ShownKernels]:
    """The kernels of ``network``, or of all networks for None, at the sizes in ``wanted``.

    A size that is not given is the largest of the first profile that holds the others.

    Raises:
        ArgumentError: there is no such network, no list of kernels, or no profile for the sizes.
        BundleError: a list is damaged.
    """
    names = _network_names(network)
    for symbol, size in wanted.items():
        bundle.manifest.ranges.of(symbol).require(size, symbol, f"--{'decode-' if symbol == 'chunk' else ''}{symbol}")
    if bundle.manifest.tensorrt is None:
        raise ArgumentError(
            f"{bundle.path} has no engines, so no kernels; svd-trt build --backend tensorrt-rtx adds them"
        )
    listed = [kernels for name in names if (kernels := bundle.kernels(name)) is not None and kernels.known]
    if not listed:
        raise ArgumentError(
            f"{bundle.manifest.tensorrt.name} {bundle.manifest.tensorrt.version} listed no kernels when it built "
            f"{bundle.path}; svd-trt build --backend tensorrt-rtx makes a bundle with lists"
        )
    return [_shown(kernels, wanted) for kernels in listed]


def _network_names(network: str | None) -> Sequence[NetworkName]:
    if network is None:
        return NETWORKS
    found = [name for name in get_args(NetworkName) if name == network]
    if not found:
        raise ArgumentError(f"there is no network {network!r}; choose one of: {', '.join(NETWORKS)}")
    return found


def _shown(kernels: KernelList, wanted: Mapping[str, int]) -> ShownKernels:
    for index, profile in enumerate(kernels.profiles):
        sizes = profile.sizes(wanted)
        if sizes is not None:
            return ShownKernels(kernels, index, sizes)
    held = "; ".join(ranges_text(profile) for profile in kernels.profiles)
    raise ArgumentError(f"no profile of {kernels.network} holds {sizes_text(wanted)}; its profiles are: {held}")
