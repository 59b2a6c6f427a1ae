"""Checkpoint to bundle: what to make, in which order, and what of it is there already."""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

import svd_trt
from svd_trt.engine.bundle import Bundle
from svd_trt.engine.flavour import BuildBackend, Flavour, select_flavour
from svd_trt.engine.manifest import (
    SCHEMA_VERSION,
    FileEntry,
    FlavourEntry,
    Manifest,
    NetworkEntry,
    OnnxEntry,
    PlanEntry,
    Precision,
)
from svd_trt.engine.plan import build_plan
from svd_trt.engine.spec import ModelInfo, NetworkName, NetworkSpec, Range, Ranges, network_specs
from svd_trt.errors import ArgumentError, MissingDependencyError, OutputError
from svd_trt.export.checkpoint import COMPONENT_OF, Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from svd_trt.engine.staging import Staging

__all__ = ["BuildOptions", "BuildProgress", "BuildResult", "Stage", "build_bundle"]

# Raised when the same checkpoint and options would give other graphs or plans, so that old ones are not reused.
_EXPORT_REVISION = 1
_PLAN_REVISION = 1

# Releases of these change the graphs they export.
_GRAPH_PACKAGES = ("torch", "diffusers", "transformers", "onnxscript", "onnx_ir")
_EXPORT_MODULES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "huggingface_hub",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "filelock",
)
_Entry = TypeVar("_Entry", OnnxEntry, PlanEntry)

_LARGEST_SIDE = 4096
_LARGEST_COUNT = 1024


@dataclass(frozen=True)
class BuildOptions:
    """What to build; every default is the checkpoint's own or diffusers'.

    Attributes:
        height, width: frame size in pixels, multiples of 8; a fixed one makes a smaller, faster network.
        frames: frames of one video, from 2 up; None is 2 up to what the checkpoint was trained for.
        decode_chunk: frames decoded together, from 1 up; None is 1 up to the most frames.
        batch: videos denoised together.
        precision: of all networks but the VAE encoder, which stays in fp32 as the checkpoints ask.
        backend: which engines to build beside the ONNX networks, which every bundle holds.
        revision, variant, local_files_only: as in diffusers' ``from_pretrained``.
    """

    height: Range = Range(576, 576, 576)
    width: Range = Range(1024, 1024, 1024)
    frames: Range | None = None
    decode_chunk: Range | None = None
    batch: Range = Range(1, 1, 1)
    precision: Precision = "fp16"
    backend: BuildBackend = "auto"
    revision: str | None = None
    variant: str | None = None
    local_files_only: bool = False


@dataclass(frozen=True)
class Stage:
    """One finished piece of work."""

    network: NetworkName
    kind: str
    """``onnx`` or the TensorRT flavour."""
    seconds: float
    reused: bool


@dataclass(frozen=True)
class BuildResult:
    """What a build came to; ``up_to_date`` where the bundle was there already and nothing was done."""

    bundle: Bundle
    stages: tuple[Stage, ...]
    up_to_date: bool


class BuildProgress:
    """Told how a build goes; override what is of interest."""

    def waiting(self, target: Path) -> None:
        """Another build of the same bundle is running; this one waits for it."""

    def started(self, network: NetworkName, kind: str) -> None:
        """A stage starts."""

    def advanced(self, fraction: float) -> None:
        """The running stage is done to ``fraction``; called from another thread, and only by engine builds."""

    def finished(self, stage: Stage) -> None:
        """A stage is done, or was found done."""


def build_bundle(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: BuildOptions | None = None,
    progress: BuildProgress | None = None,
) -> BuildResult:
    """Export a checkpoint's four networks to ONNX, build their engines, and write the bundle ``output``.

    A bundle that is there already is left alone if it would come out the same. Finished networks of an interrupted
    build, and those of an older bundle at ``output`` that the options do not change, are taken over.

    Raises:
        CheckpointError, ArgumentError: the checkpoint or an option is not usable.
        MissingDependencyError, BackendError: the backend cannot be used here.
        ExportError, EngineBuildError: a network could not be exported or built.
        OutputError: ``output`` cannot be written, or is something other than a bundle.
    """
    options = options or BuildOptions()
    progress = progress or BuildProgress()
    _require_export_packages()
    checkpoint = open_checkpoint(
        os.fspath(model),
        revision=options.revision,
        variant=options.variant,
        local_files_only=options.local_files_only,
    )
    _ranges(options, checkpoint.model)  # a bad range is refused before anything is written
    flavour = select_flavour(options.backend)
    target = Path(output)
    from svd_trt.engine.staging import Staging

    try:
        with Staging(target, lambda: progress.waiting(target)) as staging:
            return _Build(checkpoint, options, flavour, staging, progress).run()
    except OSError as error:
        raise OutputError(
            f"cannot write {target}: {error.strerror or error}; free space or choose another place"
        ) from error


class _Build:
    """One build, with its lock held."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: BuildOptions,
        flavour: Flavour | None,
        staging: Staging,
        progress: BuildProgress,
    ) -> None:
        self.checkpoint = checkpoint
        self.options = options
        self.flavour = flavour
        self.staging = staging
        self.progress = progress
        self.ranges = _ranges(options, checkpoint.model)
        self.specs = network_specs(checkpoint.model, self.ranges)
        self.stages: list[Stage] = []

    def run(self) -> BuildResult:
        if self._is_current() and (bundle := self.staging.open_existing()) is not None:
            self.staging.discard()
            return BuildResult(bundle, (), up_to_date=True)
        networks = {name: self._network(spec) for name, spec in self.specs.items()}
        bundle = self.staging.publish(self._manifest(networks))
        return BuildResult(bundle, tuple(self.stages), up_to_date=False)

    def _network(self, spec: NetworkSpec) -> NetworkEntry:
        onnx = self._stage(spec, "onnx", OnnxEntry, self._onnx_key(spec), self._export)
        if self.flavour is None:
            return NetworkEntry(spec, onnx, None)
        plan = self._stage(spec, self.flavour.name, PlanEntry, self._plan_key(spec), self._build_plan)
        return NetworkEntry(spec, onnx, plan)

    def _stage(
        self,
        spec: NetworkSpec,
        kind: str,
        entry_type: type[_Entry],
        key: str,
        make: Callable[[NetworkSpec, str], _Entry],
    ) -> _Entry:
        self.progress.started(spec.name, kind)
        started = time.perf_counter()
        entry = self.staging.reuse(spec.name, key, entry_type)
        reused = entry is not None
        if entry is None:
            entry = make(spec, key)
            self.staging.finish(spec.name, entry)
        stage = Stage(spec.name, kind, time.perf_counter() - started, reused)
        self.stages.append(stage)
        self.progress.finished(stage)
        return entry

    def _export(self, spec: NetworkSpec, key: str) -> OnnxEntry:
        # torch takes seconds to import, so only a build that exports does it.
        from svd_trt.export.networks import dtype_of, make_network
        from svd_trt.export.onnx_export import export_network

        model = self.checkpoint.load(COMPONENT_OF[spec.name], dtype_of(spec.name, self.options.precision))
        path = self.staging.path / "onnx" / f"{spec.name}.onnx"
        report = export_network(
            make_network(spec.name, model), spec, path, smallest_latent=2**self.checkpoint.upsamplers + 1
        )
        del model
        gc.collect()  # exported programs hold cycles, and with them gigabytes of weights
        files = tuple(FileEntry.of(self.staging.path, file) for file in report.files)
        return OnnxEntry(key=key, files=files, nodes=report.nodes, parameters=report.parameters)

    def _build_plan(self, spec: NetworkSpec, key: str) -> PlanEntry:
        assert self.flavour is not None
        path = self.staging.path / self.flavour.name / f"{spec.name}.plan"
        onnx_path = self.staging.path / "onnx" / f"{spec.name}.onnx"
        report = build_plan(self.flavour, onnx_path, spec, path, self.progress.advanced)
        return PlanEntry(
            key=key,
            file=FileEntry.of(self.staging.path, path),
            layers=report.layers,
            activation_bytes=report.activation_bytes,
            weight_bytes=report.weight_bytes,
        )

    def _onnx_key(self, spec: NetworkSpec) -> str:
        # Ranges of symbolic axes are not in it: the graph is the same for all of them.
        return _key(
            revision=_EXPORT_REVISION,
            network=spec.name,
            axes=[list(t.shape) for t in spec.tensors],
            precision=self.options.precision,
            weights=self.checkpoint.source.digests[COMPONENT_OF[spec.name]],
            packages={name: importlib.metadata.version(name) for name in _GRAPH_PACKAGES},
        )

    def _plan_key(self, spec: NetworkSpec) -> str:
        assert self.flavour is not None
        return _key(
            revision=_PLAN_REVISION,
            onnx=self._onnx_key(spec),
            ranges={symbol: str(r) for symbol, r in spec.ranges.items()},
            flavour=[self.flavour.name, self.flavour.version, self.flavour.target],
        )

    def _is_current(self) -> bool:
        """True where the bundle at the target was built from the same things for the same ranges."""
        manifest = self.staging.existing()
        if manifest is None:
            return False
        # Networks apart, all that the manifest says matters too: the runtime reads its sigmas from there.
        wanted_rest = self._manifest({})
        if msgspec.structs.replace(manifest, networks={}, svd_trt_version=wanted_rest.svd_trt_version) != wanted_rest:
            return False
        wanted = {name: (self._onnx_key(spec), spec) for name, spec in self.specs.items()}
        found = {name: (entry.onnx.key, entry.spec) for name, entry in manifest.networks.items()}
        plans = {name: entry.plan.key for name, entry in manifest.networks.items() if entry.plan}
        wanted_plans = {name: self._plan_key(spec) for name, spec in self.specs.items()} if self.flavour else {}
        return wanted == found and plans == wanted_plans

    def _manifest(self, networks: dict[NetworkName, NetworkEntry]) -> Manifest:
        return Manifest(
            schema_version=SCHEMA_VERSION,
            svd_trt_version=svd_trt.__version__,
            family="stable-video-diffusion",
            source=self.checkpoint.source,
            precision=self.options.precision,
            model=self.checkpoint.model,
            sampler=self.checkpoint.sampler,
            ranges=self.ranges,
            flavour=FlavourEntry(self.flavour.name, self.flavour.version, self.flavour.target)
            if self.flavour
            else None,
            networks=networks,
        )


def _key(**parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _ranges(options: BuildOptions, model: ModelInfo) -> Ranges:
    """The ranges of the bundle: what was asked, with the checkpoint's defaults.

    Raises:
        ArgumentError: a range that no SVD can serve.
    """
    most = model.num_frames
    frames = options.frames or Range(min(2, most), most, most)
    largest = frames.max
    chunk = options.decode_chunk or Range(1, min(8, largest), largest)
    factor = model.vae_scale_factor
    for what, size in (("height", options.height), ("width", options.width)):
        if any(value % 8 or value % factor for value in (size.min, size.opt, size.max)):
            raise ArgumentError(f"--{what} {size}: sizes are multiples of {max(8, factor)}")
        if size.max > _LARGEST_SIDE:
            raise ArgumentError(f"--{what} {size}: sizes up to {_LARGEST_SIDE} are supported")
    if frames.min < 2:
        raise ArgumentError(f"--frames {frames}: a video has at least 2 frames")
    for what, count in (("frames", frames), ("decode-chunk", chunk), ("batch", options.batch)):
        if count.max > _LARGEST_COUNT:
            raise ArgumentError(f"--{what} {count}: counts up to {_LARGEST_COUNT} are supported")
    return Ranges(
        batch=options.batch,
        pictures=Range(1, 1, options.batch.max),
        branches=Range(1, 2, 2),
        frames=frames,
        chunk=chunk,
        height=options.height,
        width=options.width,
    )


def _require_export_packages() -> None:
    """Say at once what is missing, rather than after the checkpoint has been read."""
    missing = [name for name in _EXPORT_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"svd-trt build (lacking {', '.join(missing)})", "export")
