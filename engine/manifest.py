"""``manifest.json``: everything that a reader needs to know about a bundle, as plain data.

The structures here are the schema. Reading is strict about types and about the schema version, and lenient about
fields that a later minor version may add.
"""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias

import msgspec

from svd_trt.engine.host import HostInfo
from svd_trt.engine.spec import KeptFeatures, ModelInfo, NetworkName, NetworkSpec, Range, Ranges
from svd_trt.errors import BundleError, first_line

__all__ = [
    "CHECKSUM_NAME",
    "GOLDEN_FOLDER",
    "MANIFEST_NAME",
    "NOT_JSON",
    "SCHEMA_VERSION",
    "FileEntry",
    "GoldenEntry",
    "GraphEntry",
    "LoraInfo",
    "Manifest",
    "NetworkEntry",
    "OnnxEntry",
    "Operators",
    "PlanEntry",
    "Precision",
    "ProfileEntry",
    "SamplerInfo",
    "SamplerName",
    "Schedule",
    "SourceInfo",
    "TensorRtEntry",
    "TensorRtName",
    "UnetInfo",
    "precision_of",
    "read_manifest",
    "sha256_of",
    "write_manifest",
]

NOT_JSON = (msgspec.MsgspecError, ValueError, RecursionError)
"""What msgspec raises for bytes that are not the JSON that was asked for: ValueError if they are not even text."""

SCHEMA_VERSION = 4
MANIFEST_NAME = "manifest.json"
CHECKSUM_NAME = "manifest.json.sha256"
GOLDEN_FOLDER = "golden"

Precision: TypeAlias = Literal["fp16", "fp32"]
TensorRtName: TypeAlias = Literal["tensorrt", "tensorrt-rtx"]
Operators: TypeAlias = Literal["onnx", "onnxruntime"]
Schedule: TypeAlias = Literal["karras", "exponential", "training"]
SamplerName: TypeAlias = Literal["euler", "dpmpp-2m"]


def precision_of(network: NetworkName, precision: Precision) -> Precision:
    """The precision of ``network`` in a bundle of ``precision``."""
    # Published checkpoints set force_upcast: half precision overflows in the VAE's encoder.
    return "fp32" if network == "vae_encoder" else precision


class SamplerInfo(msgspec.Struct, frozen=True):
    """The checkpoint's noise schedule and update rule, as in its scheduler configuration.

    `svd_trt.runtime.schedules.checkpoint_sigmas` makes noise levels of it.
    """

    sigma_min: float | None
    """None: the least of the levels of training that a run takes."""
    sigma_max: float | None
    """None: the greatest of the levels of training that a run takes."""
    rho: float
    """Exponent of the Karras schedule."""
    timestep_spacing: str
    """``leading`` starts from noise of standard deviation sqrt(sigma_max^2 + 1), the others from sigma_max. It is also
    how the levels of a run are chosen from those of training, if the schedule needs them."""
    schedule: Schedule = "karras"
    """``karras`` (Karras et al. 2022, eq. 5) and ``exponential`` go from sigma_max to sigma_min; ``training`` takes
    levels of training as they are."""
    final_sigma: float | None = 0.0
    """The level of the finished video; None is the last of the others again, so that the last step changes nothing."""
    solver: SamplerName = "euler"
    """The default of ``--sampler``."""
    steps_offset: int = 0
    """Of the ``leading`` spacing."""
    training_sigmas: tuple[float, ...] = ()
    """The levels of training, the least first; empty if the schedule does not need them."""


class UnetInfo(msgspec.Struct, frozen=True):
    """The UNet that took the place of the checkpoint's own (``svd-trt build --unet``)."""

    model: str
    """Hub id, or the name of the folder or file."""
    commit: str | None
    path: str | None
    """Where a local folder or file was when the bundle was built; it does not identify the UNet."""
    files: tuple[str, ...]
    """Its files, relative to the folder or the repository."""


class LoraInfo(msgspec.Struct, frozen=True):
    """A LoRA that was merged into the UNet (``svd-trt build --lora``)."""

    model: str
    """The file's name."""
    digest: str
    """sha256 over the file and PEFT's settings of it."""
    scale: float
    path: str | None
    """Where the file was when the bundle was built; it does not identify the LoRA."""


class SourceInfo(msgspec.Struct, frozen=True):
    """The checkpoint that the weights are from."""

    model: str
    """Hub id, or the name of the folder."""
    commit: str | None
    variant: str | None
    """The variant that was asked for; ``files`` has the names of the weights that were found."""
    digests: dict[str, str]
    """sha256 over configuration and weights of each component."""
    path: str | None = None
    """Where a local folder or file was when the bundle was built; it does not identify the checkpoint."""
    files: dict[str, tuple[str, ...]] = {}
    """Of a folder or a hub id: the weight files of each component, relative to it."""
    config: str | None = None
    """Of a single file: the published architecture that it was taken for, or the folder of its configurations."""
    unet: UnetInfo | None = None
    """The UNet, if it is not the checkpoint's own."""
    loras: tuple[LoraInfo, ...] = ()
    """What was merged into the UNet; they add up."""


class FileEntry(msgspec.Struct, frozen=True):
    """One file of the bundle; ``path`` is relative and written with ``/``."""

    path: str
    size: int
    sha256: str

    @classmethod
    def of(cls, root: Path, path: Path) -> FileEntry:
        """The entry of the file ``path``, which is inside ``root``; reads the file to hash it."""
        return cls(path.relative_to(root).as_posix(), path.stat().st_size, sha256_of(path))

    @property
    def outside_bundle(self) -> bool:
        """True if ``path`` would lead out of the folder that it is relative to."""
        path = PurePosixPath(self.path)
        return path.is_absolute() or ".." in path.parts

    def is_whole(self, root: Path) -> bool:
        """True if the file is under ``root`` with this size and content."""
        path = root / self.path
        try:
            return path.stat().st_size == self.size and sha256_of(path) == self.sha256
        except OSError:
            return False


class OnnxEntry(msgspec.Struct, frozen=True):
    """An exported network."""

    key: str
    """Hash of everything that the export depends on: equal keys mean equal networks."""
    graph: FileEntry
    weights: tuple[FileEntry, ...]
    """Files that the graph names, in its folder; empty if the weights are in the graph."""
    nodes: int
    parameters: int

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """The graph and its weights."""
        return (self.graph, *self.weights)

    def is_whole(self, root: Path) -> bool:
        """True if all files are under ``root`` as they were written."""
        return all(file.is_whole(root) for file in self.files)


class ProfileEntry(msgspec.Struct, frozen=True):
    """One optimisation profile of a plan."""

    ranges: dict[str, Range]
    """The range of each symbol of the network; all are fixed in an exact profile."""
    activation_bytes: int | None
    """What the builder, or the engine on a GPU, reports for the largest sizes of the ranges."""


class PlanEntry(msgspec.Struct, frozen=True):
    """A TensorRT plan. Memory is in bytes."""

    key: str
    file: FileEntry
    kernels: FileEntry | None
    """The list of compiled kernels, see `svd_trt.engine.kernels`; None if the builder printed none."""
    profiles: tuple[ProfileEntry, ...]
    """In TensorRT's order, so that an index here is an index there: exact ones, then the whole range."""
    layers: int
    weight_bytes: int | None
    weight_streaming: bool = False
    """The engine can run with a part of its weights in host memory."""

    @property
    def activation_bytes(self) -> int | None:
        """The most that one of the profiles needs; None if it is not known of one."""
        needs = [profile.activation_bytes for profile in self.profiles]
        known = [need for need in needs if need is not None]
        return max(known) if len(known) == len(needs) else None

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """The plan and its list of kernels."""
        return (self.file,) if self.kernels is None else (self.file, self.kernels)

    def is_whole(self, root: Path) -> bool:
        """True if the files are under ``root`` as they were written."""
        return all(file.is_whole(root) for file in self.files)


class NetworkEntry(msgspec.Struct, frozen=True):
    """One network of the bundle: its specification, its ONNX graph and, if there is one, its plan."""

    spec: NetworkSpec
    onnx: OnnxEntry
    plan: PlanEntry | None
    flops: int
    """Floating-point operations of one run at the largest sizes of its ranges; see `svd_trt.export.flops`."""

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """All files that belong to the network."""
        return self.onnx.files + (self.plan.files if self.plan else ())


class GraphEntry(msgspec.Struct, frozen=True):
    """How the graphs were written; see `svd_trt.export.rewrites`."""

    rewrites: bool
    """Exact rewrites were applied; without them the networks compute what diffusers computes."""
    ff_chunks: int
    """Number of parts into which the denoiser's widest feed-forwards are split."""
    operators: Operators = "onnx"
    """``onnx``: only the standard's, as TensorRT needs; ``onnxruntime``: also ONNX Runtime's own."""
    deep_channels: int | None = None
    """Channels of the features that the denoiser keeps for shallow steps; None if there is no shallow denoiser."""

    def kept(self, precision: Precision) -> KeptFeatures | None:
        """What deep steps of a bundle of ``precision`` keep; None without a shallow denoiser."""
        if self.deep_channels is None:
            return None
        return KeptFeatures(self.deep_channels, "float16" if precision == "fp16" else "float32")


class TensorRtEntry(msgspec.Struct, frozen=True):
    """The TensorRT that built the plans.

    Only the same version loads them, and only on a GPU of ``target`` if that is not empty.
    """

    name: TensorRtName
    version: str
    target: str
    """Compute capabilities, as ``sm90`` or ``sm89,sm120``; empty if the engines run on several kinds."""

    @property
    def targets(self) -> tuple[str, ...]:
        """``target`` as a list."""
        return tuple(self.target.split(",")) if self.target else ()


class GoldenEntry(msgspec.Struct, frozen=True):
    """Values that every host must get; see `svd_trt.runtime.golden`."""

    picture: FileEntry
    values: FileEntry
    frames: FileEntry | None
    """The frames of a short video; None if making them would have taken the build too long."""

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """All of them."""
        return (self.picture, self.values) if self.frames is None else (self.picture, self.values, self.frames)


class Manifest(msgspec.Struct, frozen=True):
    """All of ``manifest.json``."""

    schema_version: int
    svd_trt_version: str
    family: str
    source: SourceInfo
    precision: Precision
    model: ModelInfo
    sampler: SamplerInfo
    ranges: Ranges
    graph: GraphEntry
    tensorrt: TensorRtEntry | None
    networks: dict[NetworkName, NetworkEntry]
    host: HostInfo
    golden: GoldenEntry | None
    """None only while the bundle is built."""

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Every file of the bundle except the manifest and its checksum."""
        networks = tuple(file for network in self.networks.values() for file in network.files)
        return networks + (self.golden.files if self.golden else ())


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Write ``manifest.json`` into ``directory``, and its sha256 in the format of ``sha256sum`` beside it."""
    content = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    (directory / MANIFEST_NAME).write_bytes(content)
    (directory / CHECKSUM_NAME).write_text(f"{hashlib.sha256(content).hexdigest()}  {MANIFEST_NAME}\n")


def read_manifest(directory: Path) -> Manifest:
    """Read and check ``manifest.json``.

    Raises:
        BundleError: there is none, it is not JSON, it was altered, or it has another schema.
    """
    path = directory / MANIFEST_NAME
    rebuild = "run `svd-trt build` again to repair it"
    try:
        content = path.read_bytes()
        recorded = _recorded_sha256(directory)
        fields = msgspec.json.decode(content, type=dict[str, Any])
    except FileNotFoundError:
        raise BundleError(_no_bundle(directory)) from None
    except NotADirectoryError:
        raise BundleError(
            f"{directory} is a file, not a bundle; make one with `svd-trt build MODEL -o BUNDLE`"
        ) from None
    except OSError as error:
        raise BundleError(
            f"{error.filename or path} cannot be read: {error.strerror or error}; "
            "make it readable, or free what the system has too little of"
        ) from error
    except NOT_JSON as error:
        raise BundleError(f"{path} cannot be read ({first_line(error)}); {rebuild}") from error
    version = fields.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BundleError(
            f"{directory} was written by a newer svd-trt (schema {version}, this one reads {SCHEMA_VERSION}): "
            "pip install -U svd-trt"
        )
    if isinstance(version, int) and 0 < version < SCHEMA_VERSION:
        raise BundleError(
            f"{directory} was written by an older svd-trt (schema {version}, this one reads {SCHEMA_VERSION}); "
            "run `svd-trt build` again"
        )
    if version != SCHEMA_VERSION:
        raise BundleError(f"{path} has no schema version that this svd-trt reads; {rebuild}")
    if recorded != hashlib.sha256(content).hexdigest():
        raise BundleError(f"{path} was altered since it was built; {rebuild}")
    try:
        manifest = msgspec.convert(fields, Manifest)
    except (msgspec.MsgspecError, ValueError) as error:
        raise BundleError(f"{path} is not a bundle's manifest ({error}); {rebuild}") from error
    if any(file.outside_bundle for file in manifest.files):
        raise BundleError(f"{path} names files outside the bundle; {rebuild}")
    return manifest


def _recorded_sha256(directory: Path) -> str:
    """What the checksum file says of the manifest; empty if there is none."""
    try:
        return (directory / CHECKSUM_NAME).read_text("ascii").partition(" ")[0]
    except (FileNotFoundError, UnicodeDecodeError):
        return ""


def _no_bundle(directory: Path) -> str:
    make = "make one with `svd-trt build MODEL -o BUNDLE`"
    if not directory.exists():
        return f"there is no bundle at {directory}; {make}"
    if (directory / "model_index.json").exists():
        return f"{directory} is a checkpoint, not a bundle: svd-trt build {directory} -o BUNDLE"
    return f"{directory} is not a bundle (it has no {MANIFEST_NAME}); {make}"
