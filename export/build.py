"""Checkpoint to bundle: what to make, in which order, and what of it is there already."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.manifest import (
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
    NetworkEntry,
    OnnxEntry,
    PlanEntry,
    TensorRtEntry,
)
from svd_trt.engine.plan import build_plan
from svd_trt.engine.spec import (
    NETWORKS,
    NetworkName,
    NetworkSpec,
    network_specs,
)
from svd_trt.engine.tensorrt_import import TensorRt, select_tensorrt
from svd_trt.errors import ArgumentError, MissingDependencyError, OutputError
from svd_trt.export.checkpoint import COMPONENT_OF, Checkpoint, open_checkpoint
from svd_trt.export.export_process import Exported, Task, export_networks
from svd_trt.export.options import BuildOptions, ranges_of
from svd_trt.export.preflight import Work, check_resources
from svd_trt.version import __version__

if TYPE_CHECKING:
    from svd_trt.engine.staging import Staging

__all__ = ["BuildProgress", "BuildResult", "Stage", "build_bundle"]

# Raised when the same checkpoint and options would give other graphs or plans, so that old ones are not reused.
_EXPORT_REVISION = 3
_PLAN_REVISION = 3

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
    "psutil",
    "safetensors",
    "filelock",
)


@dataclass(frozen=True)
class Stage:
    """One finished piece of work."""

    network: NetworkName
    kind: str
    """``onnx`` or the TensorRT tensorrt."""
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

    def reading(self, model: str) -> None:
        """The checkpoint is looked for, checked and hashed; gigabytes take seconds."""

    def opened(self) -> None:
        """The checkpoint is there, and is SVD."""

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
        ResourceError: disk or memory would not last.
    """
    options = options or BuildOptions()
    progress = progress or BuildProgress()
    _require_export_packages()
    progress.reading(os.fspath(model))
    checkpoint = open_checkpoint(
        os.fspath(model),
        revision=options.revision,
        variant=options.variant,
        local_files_only=options.local_files_only,
        config=options.config,
    )
    progress.opened()
    ranges_of(options, checkpoint.description.model)  # a bad range is refused before anything is written
    _ = options.graph  # and so are contradictions
    tensorrt = select_tensorrt(options.backend)
    if options.weight_streaming and tensorrt is None:
        raise ArgumentError("--weight-streaming is for engines, and this build makes none; leave it out")
    target = Path(output)
    from svd_trt.engine.staging import Staging

    try:
        with Staging(target, lambda: progress.waiting(target)) as staging:
            return _Build(checkpoint, options, tensorrt, staging, progress).run()
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
        tensorrt: TensorRt | None,
        staging: Staging,
        progress: BuildProgress,
    ) -> None:
        self.checkpoint = checkpoint
        self.options = options
        self.tensorrt = tensorrt
        self.staging = staging
        self.progress = progress
        self.ranges = ranges_of(options, checkpoint.description.model)
        self.specs = network_specs(checkpoint.description.model, self.ranges)
        self.stages: list[Stage] = []
        self.checked = False

    def run(self) -> BuildResult:
        if self._is_current() and (bundle := self.staging.open_existing()) is not None:
            self.staging.discard()
            return BuildResult(bundle, (), up_to_date=True)
        onnx = self._exports()
        plans = {name: self._plan(spec) for name, spec in self.specs.items()} if self.tensorrt else {}
        networks = {
            name: NetworkEntry(spec, onnx[name], plans.get(name), self._flops(spec))
            for name, spec in self.specs.items()
        }
        bundle = self.staging.publish(self._manifest(networks))
        return BuildResult(bundle, tuple(self.stages), up_to_date=False)

    def _exports(self) -> dict[NetworkName, OnnxEntry]:
        """The ONNX form of every network, exported where there is none of the right key."""
        entries: dict[NetworkName, OnnxEntry] = {}
        for name, spec in self.specs.items():
            started = time.perf_counter()
            if (entry := self.staging.reuse(name, self._onnx_key(spec), OnnxEntry)) is not None:
                self.progress.started(name, "onnx")
                entries[name] = entry
                self._finish(Stage(name, "onnx", time.perf_counter() - started, reused=True))
        tasks = [Task(spec, self._onnx_path(spec)) for name, spec in self.specs.items() if name not in entries]
        if not tasks:
            return entries
        self._check_room([task.spec.name for task in tasks], list(self.specs) if self.tensorrt else [])
        begun = time.perf_counter()

        def started_one(name: NetworkName) -> None:
            self.progress.started(name, "onnx")

        def exported_one(done: Exported) -> None:
            nonlocal begun
            files = tuple(FileEntry.of(self.staging.path, Path(file)) for file in done.files)
            key = self._onnx_key(self.specs[done.network])
            entry = OnnxEntry(key=key, files=files, nodes=done.nodes, parameters=done.parameters)
            self.staging.finish(done.network, entry)
            now = time.perf_counter()
            entries[done.network] = entry
            self._finish(Stage(done.network, "onnx", now - begun, reused=False))
            begun = now

        export_networks(self.checkpoint, self.options.precision, self.options.graph, tasks, started_one, exported_one)
        return entries

    def _check_room(self, exports: list[NetworkName], engines: list[NetworkName]) -> None:
        """Before the first of what takes long; what is found finished by then needs no room."""
        if not self.options.skip_checks and not self.checked:
            work = Work(
                exports, engines, self.checkpoint.parameters, self.options.precision, self.options.graph.rewrites
            )
            check_resources(self.staging.path, work)
        self.checked = True

    def _finish(self, stage: Stage) -> None:
        self.stages.append(stage)
        self.progress.finished(stage)

    def _plan(self, spec: NetworkSpec) -> PlanEntry:
        """The engine of one network, built if there is none of the right key."""
        assert self.tensorrt is not None
        kind, key = self.tensorrt.name, self._plan_key(spec)
        self.progress.started(spec.name, kind)
        started = time.perf_counter()
        entry = self.staging.reuse(spec.name, key, PlanEntry)
        reused = entry is not None
        if entry is None:
            self._check_room([], [name for name in self.specs if NETWORKS.index(name) >= NETWORKS.index(spec.name)])
            entry = self._build_plan(spec, key)
            self.staging.finish(spec.name, entry)
        self._finish(Stage(spec.name, kind, time.perf_counter() - started, reused))
        return entry

    def _onnx_path(self, spec: NetworkSpec) -> Path:
        return self.staging.path / "onnx" / f"{spec.name}.onnx"

    def _flops(self, spec: NetworkSpec) -> int:
        from svd_trt.export.flops import count_flops

        return count_flops(self._onnx_path(spec), spec)

    def _build_plan(self, spec: NetworkSpec, key: str) -> PlanEntry:
        assert self.tensorrt is not None
        path = self.staging.path / self.tensorrt.name / f"{spec.name}.plan"
        report = build_plan(
            self.tensorrt,
            self._onnx_path(spec),
            spec,
            path,
            self.progress.advanced,
            weight_streaming=self._streamed(spec),
        )
        return PlanEntry(
            key=key,
            file=FileEntry.of(self.staging.path, path),
            layers=report.layers,
            activation_bytes=report.activation_bytes,
            weight_bytes=report.weight_bytes,
            weight_streaming=report.weight_streaming,
        )

    def _streamed(self, spec: NetworkSpec) -> bool:
        """Whether the engine's weights may stay in host memory; the other networks' are small beside the denoiser's."""
        return self.options.weight_streaming and spec.name == "denoiser"

    def _onnx_key(self, spec: NetworkSpec) -> str:
        # Ranges of symbolic axes are not in it: the graph is the same for all of them.
        graph = self.options.graph
        return _key(
            revision=_EXPORT_REVISION,
            network=spec.name,
            axes=[list(t.shape) for t in spec.tensors],
            precision=self.options.precision,
            weights=self.checkpoint.source.digests[COMPONENT_OF[spec.name]],
            graph=[graph.rewrites, graph.ff_chunks if spec.name == "denoiser" else 1, graph.operators],
            packages={name: importlib.metadata.version(name) for name in _GRAPH_PACKAGES},
        )

    def _plan_key(self, spec: NetworkSpec) -> str:
        assert self.tensorrt is not None
        # Absent where it is off, so that plans of before the option keep their keys.
        streaming = {"weight_streaming": True} if self._streamed(spec) else {}
        return _key(
            **streaming,
            revision=_PLAN_REVISION,
            onnx=self._onnx_key(spec),
            ranges={symbol: str(r) for symbol, r in spec.ranges.items()},
            tensorrt=[self.tensorrt.name, self.tensorrt.version, self.tensorrt.target],
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
        wanted_plans = {name: self._plan_key(spec) for name, spec in self.specs.items()} if self.tensorrt else {}
        return wanted == found and plans == wanted_plans

    def _manifest(self, networks: dict[NetworkName, NetworkEntry]) -> Manifest:
        return Manifest(
            schema_version=SCHEMA_VERSION,
            svd_trt_version=__version__,
            family="stable-video-diffusion",
            source=self.checkpoint.source,
            precision=self.options.precision,
            model=self.checkpoint.description.model,
            sampler=self.checkpoint.description.sampler,
            ranges=self.ranges,
            graph=self.options.graph,
            tensorrt=TensorRtEntry(self.tensorrt.name, self.tensorrt.version, self.tensorrt.target)
            if self.tensorrt
            else None,
            networks=networks,
        )


def _key(**parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _require_export_packages() -> None:
    """Say at once what is missing, rather than after the checkpoint has been read."""
    missing = [name for name in _EXPORT_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"svd-trt build (lacking {', '.join(missing)})", "export")
