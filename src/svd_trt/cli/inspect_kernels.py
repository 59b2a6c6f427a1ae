"""``svd-trt inspect --kernels``: which kernels are shown, at which sizes, and in which form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from svd_trt.cli.console import stderr
from svd_trt.cli.kernels_report import (
    ShownKernels,
    kernels_dict,
    print_comparison,
    print_kernels,
    profile_text,
    ranges_text,
    sizes_text,
)
from svd_trt.engine.bundle import Bundle
from svd_trt.engine.gpu_table import GpuFigures, find_gpu
from svd_trt.engine.kernels import KernelList
from svd_trt.engine.manifest import Manifest
from svd_trt.engine.spec import SYMBOLS, NetworkName, Range, Ranges, network_specs
from svd_trt.errors import ArgumentError, MissingDependencyError, OutputError

__all__ = ["KernelOptions", "add_kernels", "show_kernels"]

_FREE = Range(1, 1, 2)  # a range that makes its symbol an axis of the tensors
_BUILD_OPTIONS = {"chunk": "--decode-chunk"}


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
    """The bundle before a change; the inspected one is that after it."""
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
    gpus = _find_gpus(options.gpus)
    shown, before = _read_both(bundle, options)
    if options.compare is None:
        print_kernels(console, shown, gpus, options.top)
        for name in _unserved(bundle, gpus):
            console.print(f"TensorRT for RTX does not serve the {name}: its figures are for comparing graphs.")
    else:
        print_comparison(console, str(options.compare), before, str(bundle.path), shown)


def add_kernels(fields: dict[str, Any], bundle: Bundle, options: KernelOptions) -> dict[str, Any]:
    """``fields``, the JSON of ``svd-trt inspect``, with the profiles of each network, and of the other bundle's.

    Raises:
        SvdTrtError: as `show_kernels`.
    """
    gpus = _find_gpus(options.gpus)
    shown, before = _read_both(bundle, options)
    for one in shown:
        fields["networks"][one.kernels.network]["profiles"] = kernels_dict(one, gpus, options.top)
    if options.compare is not None:
        compared = {one.kernels.network: {"profiles": kernels_dict(one, gpus, options.top)} for one in before}
        fields["compared"] = {"bundle": str(options.compare), "networks": compared}
    return fields


def _find_gpus(names: Sequence[str]) -> list[GpuFigures]:
    """Each GPU that is named, once."""
    return list(dict.fromkeys(find_gpu(name) for name in names))


def _unserved(bundle: Bundle, gpus: Sequence[GpuFigures]) -> list[str]:
    """Names of the GPUs that the bundle's engines cannot run on."""
    built = bundle.manifest.tensorrt
    if built is None or built.name != "tensorrt-rtx":
        return []
    return [gpu.name for gpu in gpus if gpu.name.startswith("H")]  # Hopper


def _read_both(bundle: Bundle, options: KernelOptions) -> tuple[list[ShownKernels], list[ShownKernels]]:
    """The kernels of the bundle and of the one to compare it with, which are drawn if a plot is wanted."""
    if options.plot is not None:
        _check_plot(options.plot)
    before: list[ShownKernels] = []
    if options.compare is None:
        shown = _read(bundle, options.network, options.sizes)
    else:
        other = Bundle.open(options.compare, verify=False)
        pictures = min(one.manifest.ranges.pictures.max for one in (bundle, other))
        shown = _read(bundle, options.network, options.sizes, pictures)
        before = [match for one in shown for match in _read_alike(other, bundle, one)]
    if options.plot is not None:
        _plot(options.plot, bundle.path, shown, options.compare, before)
    return shown, before


def _read_alike(other: Bundle, bundle: Bundle, one: ShownKernels) -> list[ShownKernels]:
    """The same network of another bundle at the same sizes, those included that are fixed in either bundle."""
    name = one.kernels.network
    sizes = {symbol: _size_of(bundle.manifest, one, symbol) for symbol in _symbols(bundle.manifest, name)}
    for symbol, size in sizes.items():
        others = other.manifest.ranges.of(symbol)
        if size not in others:
            raise ArgumentError(
                f"{name} of {bundle.path} is shown at {symbol} {size}, and {other.path} was built for {symbol} "
                f"{others.words}; {_common_size(symbol, bundle.manifest.ranges.of(symbol), others)}"
            )
    return _read(other, name, sizes)


def _common_size(symbol: str, one: Range, other: Range) -> str:
    low, high = max(one.min, other.min), min(one.max, other.max)
    return f"give a size that both have, such as --{symbol} {high}" if low <= high else "no size is common to both"


def _size_of(manifest: Manifest, one: ShownKernels, symbol: str) -> int:
    return one.sizes.get(symbol, manifest.ranges.of(symbol).max)


def _symbols(manifest: Manifest, network: NetworkName) -> tuple[str, ...]:
    """The symbols of a network, those included that are fixed in this bundle."""
    free = Ranges(**dict.fromkeys(SYMBOLS, _FREE))
    return network_specs(manifest.model, free, manifest.graph.kept(manifest.precision))[network].symbols


def _check_plot(path: Path) -> None:
    """Check before the work that ``path`` can be the name of a plot."""
    if path.suffix.lower() != ".png":
        raise OutputError(f"--plot writes a PNG, and {path} has another name; choose one such as kernels.png")
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file for --plot, such as {path / 'kernels.png'}")
    if not path.resolve().parent.is_dir():
        raise OutputError(f"cannot write {path}: the folder {path.resolve().parent} does not exist; create it first")


def _plot(
    path: Path, bundle: Path, shown: Sequence[ShownKernels], compared: Path | None, before: Sequence[ShownKernels]
) -> None:
    try:
        from svd_trt.benchmarks.kernel_plots import plot_kernels
    except ModuleNotFoundError as error:
        raise MissingDependencyError("--plot", "bench") from error
    panels: dict[str, dict[str, Any]] = {}
    old = {one.kernels.network: one for one in before}
    new_label, old_label = _labels(bundle, compared)
    for one in shown:
        other = old.get(one.kernels.network)
        title = _title([side for side in (other, one) if side is not None])
        sides = {} if other is None else {old_label: other.costs}
        panels[title] = sides | {new_label: one.costs}
    plot_kernels(panels, path)
    stderr().print(f"wrote {path}")


def _title(sides: Sequence[ShownKernels]) -> str:
    """``denoiser, branches 2, frames 3: exact | range, branches 1 to 2, frames 2 to 8``."""
    network = sides[0].kernels.network
    profiles = list(dict.fromkeys(map(profile_text, sides)))
    if all(side.sizes == sides[0].sizes for side in sides):
        profiles[1:] = [text.removeprefix(f"{sizes_text(sides[0].sizes)}: ") for text in profiles[1:]]
    return f"{network}, {' | '.join(profiles)}"


def _labels(bundle: Path, compared: Path | None) -> tuple[str, str]:
    """Different labels for both bundles, short if the names of the folders differ."""
    name = bundle.resolve().name
    if compared is None:
        return name, ""
    if name == compared.resolve().name:
        return f"after ({bundle})", f"before ({compared})"
    return f"after ({name})", f"before ({compared.resolve().name})"


def _read(
    bundle: Bundle, network: str | None, wanted: Mapping[str, int], pictures: int | None = None
) -> list[ShownKernels]:
    """The kernels of ``network``, or of all networks for None, at the sizes in ``wanted``.

    A size that is not given is that of the network's first profile; no option gives ``pictures``.

    Raises:
        ArgumentError: there is no such network, no list of kernels, or no profile for the sizes.
        BundleError: a list is damaged.
    """
    names = _network_names(bundle, network)
    _check_sizes(bundle, names, wanted)
    built = bundle.manifest.tensorrt
    if built is None:
        raise ArgumentError(
            f"{bundle.path} has no engines, so no kernels; svd-trt build --backend tensorrt-rtx adds them"
        )
    listed = [kernels for name in names if (kernels := bundle.kernels(name)) is not None and kernels.known]
    if not listed:
        raise ArgumentError(
            f"{built.name} {built.version} listed no kernels when it built "
            f"{bundle.path}; svd-trt build --backend tensorrt-rtx makes a bundle with lists"
        )
    sizes = dict(wanted) if pictures is None else {"pictures": pictures, **wanted}
    return [_shown(bundle, kernels, sizes) for kernels in listed]


def _check_sizes(bundle: Bundle, names: Sequence[NetworkName], wanted: Mapping[str, int]) -> None:
    """Check that the bundle was built for each size, and that one of the networks has it."""
    for symbol, size in wanted.items():
        try:
            bundle.manifest.ranges.of(symbol).require(size, symbol, _BUILD_OPTIONS.get(symbol, f"--{symbol}"))
        except ArgumentError as error:
            raise ArgumentError(f"{bundle.path}: {error}") from error
        having = [name for name in bundle.manifest.networks if symbol in _symbols(bundle.manifest, name)]
        if not set(having) & set(names):
            raise ArgumentError(f"{names[0]} has no size {symbol}; it is a size of {', '.join(having)}")


def _network_names(bundle: Bundle, network: str | None) -> Sequence[NetworkName]:
    there = tuple(bundle.manifest.networks)
    if network is None:
        return there
    found = [name for name in there if name == network]
    if not found and "," in network:
        raise ArgumentError(f"--kernels {network} is a list; name one of {', '.join(there)}, or none for all of them")
    if not found:
        raise ArgumentError(f"there is no network {network!r}; choose one of: {', '.join(there)}")
    return found


def _shown(bundle: Bundle, kernels: KernelList, wanted: Mapping[str, int]) -> ShownKernels:
    first = kernels.profiles[0].ranges
    sizes = {symbol: wanted.get(symbol, r.max) for symbol, r in first.items()}
    for index, profile in enumerate(kernels.profiles):
        if profile.sizes(sizes) is not None:
            return ShownKernels(kernels, index, sizes)
    held = "; ".join(ranges_text(profile) for profile in kernels.profiles)
    given = {symbol: size for symbol, size in wanted.items() if symbol in first}
    raise ArgumentError(
        f"no profile of {kernels.network} in {bundle.path} holds {sizes_text(given)}; its profiles are: {held}"
    )
