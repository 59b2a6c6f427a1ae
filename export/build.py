"""Checkpoint to bundle: what has to be made, what exists already, and the order of the work."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import msgspec

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.host import describe_host
from svd_trt.engine.manifest import (
    SCHEMA_VERSION,
    FileEntry,
    GoldenEntry,
    Manifest,
    NetworkEntry,
    OnnxEntry,
    PlanEntry,
    ProfileEntry,
    TensorRtEntry,
    TensorRtName,
    write_manifest,
)
from svd_trt.engine.plan import build_plan, kernels_path, plan_stage
from svd_trt.engine.profiles import Profile, profiles_of
from svd_trt.engine.spec import NetworkName, NetworkSpec, Ranges, network_specs
from svd_trt.engine.tensorrt_build import EngineOptions
from svd_trt.engine.tensorrt_import import TensorRt, select_tensorrt
from svd_trt.errors import ArgumentError, EngineBuildError, ExportError, MissingDependencyError, OutputError
from svd_trt.export.checkpoint import COMPONENT_OF
from svd_trt.export.checkpoint_kinds import AnyCheckpoint, open_checkpoint
from svd_trt.export.code_digest import graph_code_digest, plan_code_digest
from svd_trt.export.export_process import Exporter
from svd_trt.export.options import BuildOptions, exact_points, ranges_of
from svd_trt.export.preflight import Work, check_resources
from svd_trt.export.recipe import Recipe, make_recipe
from svd_trt.progress import Progress, ignore_progress
from svd_trt.runtime.golden import short_video_flops, write_golden
from svd_trt.runtime.parameters import describe_arguments
from svd_trt.runtime.schedules import adds_one
from svd_trt.version import __version__

if TYPE_CHECKING:
    from svd_trt.engine.staging import Staging

__all__ = ["BuildResult", "Stage", "build_bundle"]

_Form: TypeAlias = Literal["onnx"] | TensorRtName
_Entry = TypeVar("_Entry", OnnxEntry, PlanEntry)

# The golden video is made by default if the CPU makes it in seconds.
_QUICK_FLOPS = 1e11

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
    """One network exported, or one engine built."""

    network: NetworkName
    kind: _Form
    seconds: float
    reused: bool
    """It was finished already: in the cache, in the bundle at the target, or in an interrupted build."""
    from_cache: bool = False


@dataclass(frozen=True)
class BuildResult:
    """The bundle and how it was made; ``up_to_date`` if it existed already and nothing was done."""

    bundle: Bundle
    stages: tuple[Stage, ...]
    up_to_date: bool


def build_bundle(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: BuildOptions | None = None,
    progress: Progress = ignore_progress,
) -> BuildResult:
    """Export a checkpoint's four networks to ONNX, build their engines, and write the bundle ``output``.

    An existing bundle is left alone if the build would give the same. Finished networks are reused from an interrupted
    build, from an older bundle at ``output`` and from the cache, as far as the options do not change them.

    While another build of the same bundle runs, this one waits for it, and says so to the logger ``svd_trt``.

    Args:
        model: see `svd_trt.export.checkpoint_kinds.open_checkpoint`.
        output: the folder to write.
        options: what to build.
        progress: called with the stages ``reading the checkpoint``, ``denoiser: exporting to ONNX``,
            ``denoiser: building the engine`` and so on.

    Raises:
        CheckpointError, ArgumentError: the checkpoint or an option is not usable.
        MissingDependencyError, BackendError: the backend cannot be used here.
        ExportError, EngineBuildError: a network could not be exported or built.
        OutputError: ``output`` or the cache cannot be written, or ``output`` is something other than a bundle.
        ResourceError: there is not enough disk or memory.
    """
    options = options or BuildOptions()
    _require_export_packages()
    job = _make_job(os.fspath(model), options, progress)
    from svd_trt.engine.network_cache import NetworkCache
    from svd_trt.engine.staging import Staging

    folder = _cache_folder(options)
    try:
        with Staging(Path(output), NetworkCache(folder) if folder else None) as staging:
            if (bundle := _find_current(job, staging)) is not None:
                return BuildResult(bundle, (), up_to_date=True)
            with _true_reason(staging):
                return _build(job, staging, progress)
    except OSError as error:
        raise OutputError(
            f"cannot write {output}: {error.strerror or error}; free space or choose another place"
        ) from error


@contextlib.contextmanager
def _true_reason(staging: Staging) -> Iterator[None]:
    """Say that the folder of the build was removed, if that is why the block cannot read or write files in it."""
    try:
        yield
    except (OSError, OutputError, ExportError, EngineBuildError) as error:
        if not staging.vanished:
            raise
        raise OutputError(
            f"{staging.path}, in which the bundle grows, was removed by another program during the build; "
            "run the command again"
        ) from error


@dataclass(frozen=True)
class _Job:
    """What is to be built, resolved: recipes and keys of the four networks, and keys of their engines if wanted."""

    checkpoint: AnyCheckpoint
    path: str | None
    """Of a checkpoint that is a local folder or file."""
    options: BuildOptions
    tensorrt: TensorRt | None
    ranges: Ranges
    specs: Mapping[NetworkName, NetworkSpec]
    recipes: Mapping[NetworkName, Recipe]
    onnx_keys: Mapping[NetworkName, str]
    profiles: Mapping[NetworkName, tuple[Profile, ...]]
    plan_keys: Mapping[NetworkName, str]


def _make_job(model: str, options: BuildOptions, progress: Progress) -> _Job:
    """Read the checkpoint and check the options, before anything is written."""
    reading = "reading the checkpoint"
    progress(reading, 0, 0)
    checkpoint = open_checkpoint(
        model,
        revision=options.revision,
        variant=options.variant,
        local_files_only=options.local_files_only,
        config=options.config,
    )
    description = checkpoint.description
    ranges, graph = ranges_of(options, description.model), options.graph
    tensorrt = select_tensorrt(options.backend, options.device, tuple(options.targets))
    if options.timing_cache is not None and (tensorrt is None or tensorrt.name != "tensorrt"):
        raise ArgumentError("--timing-cache is for --backend tensorrt, which times kernels on a GPU; leave it out")
    if options.optimization_level is not None and tensorrt is None:
        raise ArgumentError("--optimization-level is for engines, and this build makes none; leave it out")
    if options.weight_streaming and tensorrt is None:
        raise ArgumentError("--weight-streaming is for engines, and this build makes none; leave it out")
    if (options.exact_frames or options.exact_sizes) and tensorrt is None:
        raise ArgumentError(
            "--exact-frames and --exact-sizes are for engines, and this build makes none; leave them out"
        )
    specs = network_specs(description.model, ranges)
    recipes = {n: make_recipe(s, options.precision, graph, description.upsamplers) for n, s in specs.items()}
    onnx_keys = {name: _onnx_key(checkpoint, recipe) for name, recipe in recipes.items()}
    points = exact_points(options, ranges, description.model)
    profiles = {name: profiles_of(spec, points) for name, spec in specs.items()}
    engines = specs if tensorrt else {}
    plan_keys = {n: _plan_key(onnx_keys[n], profiles[n], tensorrt, _engine_options(n, options)) for n in engines}
    progress(reading, 1, 1)
    return _Job(
        checkpoint, _local_path(model), options, tensorrt, ranges, specs, recipes, onnx_keys, profiles, plan_keys
    )


def _local_path(model: str) -> str | None:
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else None


def _onnx_key(checkpoint: AnyCheckpoint, recipe: Recipe) -> str:
    return _digest(
        code=graph_code_digest(),
        recipe=msgspec.to_builtins(recipe),
        weights=checkpoint.source.digests[COMPONENT_OF[recipe.network]],
        packages={name: importlib.metadata.version(name) for name in _GRAPH_PACKAGES},
    )


def _plan_key(onnx_key: str, profiles: tuple[Profile, ...], tensorrt: TensorRt | None, options: EngineOptions) -> str:
    assert tensorrt is not None
    return _digest(
        code=plan_code_digest(),
        onnx=onnx_key,
        profiles=[{symbol: str(r) for symbol, r in profile.items()} for profile in profiles],
        tensorrt=[tensorrt.name, tensorrt.version, tensorrt.target, tensorrt.gpu],
        options=msgspec.to_builtins(options),
    )


def _engine_options(name: NetworkName, options: BuildOptions) -> EngineOptions:
    """How the engine of one network is built; the weights of the others are small beside the denoiser's."""
    streams = options.weight_streaming and name == "denoiser"
    return EngineOptions(weight_streaming=streams, optimization_level=options.optimization_level)


def _timing_cache(tensorrt: TensorRt, options: BuildOptions) -> Path | None:
    """The file of kernel times: the one that the options name, else one in the cache for each TensorRT and GPU."""
    if options.timing_cache is not None:
        return Path(options.timing_cache).expanduser()
    folder = _cache_folder(options)
    if tensorrt.name != "tensorrt" or folder is None:
        return None
    gpu = re.sub(r"\W+", "-", tensorrt.gpu)
    return folder / f"timings-{tensorrt.version}-{gpu}.cache"


def _digest(**parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _find_current(job: _Job, staging: Staging) -> Bundle | None:
    """The bundle at the target if this build would give the same; the staging folder is then removed."""
    manifest = staging.existing()
    if manifest is None:
        return None
    # The manifest itself matters, beside the networks: the runtime reads its sigmas from there.
    wanted = _manifest(job, {})
    if job.options.golden_frames and (manifest.golden is None or manifest.golden.frames is None):
        return None
    source = msgspec.structs.replace(manifest.source, path=job.path)  # a checkpoint may be moved
    same = msgspec.structs.replace(
        manifest, networks={}, golden=None, svd_trt_version=wanted.svd_trt_version, source=source
    )
    if same != wanted:
        return None
    found = {name: (entry.onnx.key, entry.spec) for name, entry in manifest.networks.items()}
    plans = {name: entry.plan.key for name, entry in manifest.networks.items() if entry.plan}
    if found != {name: (job.onnx_keys[name], spec) for name, spec in job.specs.items()} or plans != job.plan_keys:
        return None
    if (bundle := staging.open_existing()) is not None:
        staging.discard()
    return bundle


def _build(job: _Job, staging: Staging, progress: Progress) -> BuildResult:
    onnx = _find_finished(job.onnx_keys, OnnxEntry, "onnx", staging, progress)
    plans: dict[NetworkName, tuple[PlanEntry, Stage]] = {}
    if job.tensorrt is not None:
        plans = _find_finished(job.plan_keys, PlanEntry, job.tensorrt.name, staging, progress)
    to_export = [name for name in job.onnx_keys if name not in onnx]
    to_build = [name for name in job.plan_keys if name not in plans]
    _check_resources(job, to_export, to_build, staging.path)
    with Exporter(job.checkpoint, list(dict.fromkeys(COMPONENT_OF[name] for name in to_export))) as exporter:
        for name in to_export:
            new = partial(_new_network, job, name, exporter, staging, progress)
            onnx[name] = _make(name, job.onnx_keys[name], OnnxEntry, "onnx", new, staging, progress)
    for name in to_build:
        assert job.tensorrt is not None
        new_plan = partial(_new_plan, job, name, staging, progress)
        plans[name] = _make(name, job.plan_keys[name], PlanEntry, job.tensorrt.name, new_plan, staging, progress)
    networks = {
        name: NetworkEntry(spec, onnx[name][0], plans[name][0] if plans else None, _flops(staging, spec))
        for name, spec in job.specs.items()
    }
    stages = [onnx[name][1] for name in job.onnx_keys] + [plans[name][1] for name in job.plan_keys]
    manifest = _manifest(job, networks)
    golden = _write_golden(job, manifest, staging, progress)
    bundle = staging.publish(msgspec.structs.replace(manifest, golden=golden))
    return BuildResult(bundle, tuple(stages), up_to_date=False)


def _write_golden(job: _Job, manifest: Manifest, staging: Staging, progress: Progress) -> GoldenEntry:
    """Make the values that hosts check themselves with; frames only if the CPU makes them in seconds, or if asked."""
    wanted = job.options.golden_frames
    with_frames = short_video_flops(manifest) <= _QUICK_FLOPS if wanted is None else wanted
    stage = "golden values"
    progress(stage, 0, 0)
    write_manifest(manifest, staging.path)  # the runtime compares it with the one that it opened
    entry = write_golden(staging.path, manifest, with_frames=with_frames)
    progress(stage, 1, 1)
    return entry


def _find_finished(
    keys: Mapping[NetworkName, str],
    kind: type[_Entry],
    form: _Form,
    staging: Staging,
    progress: Progress,
) -> dict[NetworkName, tuple[_Entry, Stage]]:
    """Networks, or engines, that need not be made; their files are in the staging folder."""
    found: dict[NetworkName, tuple[_Entry, Stage]] = {}
    for name, key in keys.items():
        started = time.perf_counter()
        if (reused := staging.reuse(name, key, kind)) is not None:
            entry, from_cache = reused
            progress(_stage_of(name, form), 1, 1)
            found[name] = entry, Stage(name, form, time.perf_counter() - started, reused=True, from_cache=from_cache)
    return found


def _check_resources(job: _Job, to_export: list[NetworkName], to_build: list[NetworkName], folder: Path) -> None:
    if job.options.skip_checks:
        return
    parameters, precision, rewrites = job.checkpoint.parameters, job.options.precision, job.options.rewrites
    check_resources(folder, Work(to_export, to_build, parameters, precision, rewrites), _cache_folder(job.options))


def _make(
    name: NetworkName,
    key: str,
    kind: type[_Entry],
    form: _Form,
    new: Callable[[], _Entry],
    staging: Staging,
    progress: Progress,
) -> tuple[_Entry, Stage]:
    """Make one network or engine with ``new``, unless another build adds it to the cache first."""
    started = time.perf_counter()
    with staging.making(key):
        reused = staging.reuse(name, key, kind)
        if reused is not None:
            entry = reused[0]
            progress(_stage_of(name, form), 1, 1)
        else:
            entry = new()
            staging.finish(name, entry)
    return entry, Stage(name, form, time.perf_counter() - started, bool(reused), from_cache=bool(reused))


def _new_network(job: _Job, name: NetworkName, exporter: Exporter, staging: Staging, progress: Progress) -> OnnxEntry:
    stage = _stage_of(name, "onnx")
    progress(stage, 0, 0)
    done = exporter.export(job.recipes[name], _onnx_path(staging, name))
    graph, *weights = (FileEntry.of(staging.path, Path(file)) for file in done.files)
    progress(stage, 1, 1)
    return OnnxEntry(job.onnx_keys[name], graph, tuple(weights), done.nodes, done.parameters)


def _new_plan(job: _Job, name: NetworkName, staging: Staging, progress: Progress) -> PlanEntry:
    assert job.tensorrt is not None
    spec, path = job.specs[name], staging.path / job.tensorrt.name / f"{name}.plan"
    profiles, options = job.profiles[name], _engine_options(name, job.options)
    timings = _timing_cache(job.tensorrt, job.options)
    graph = _onnx_path(staging, name)
    report = build_plan(job.tensorrt, graph, spec, path, profiles, options, progress, timing_cache=timings)
    return PlanEntry(
        key=job.plan_keys[name],
        file=FileEntry.of(staging.path, path),
        kernels=FileEntry.of(staging.path, kernels_path(path)),
        profiles=tuple(ProfileEntry(*both) for both in zip(profiles, report.activation_bytes, strict=True)),
        layers=report.layers,
        weight_bytes=report.weight_bytes,
        weight_streaming=report.weight_streaming,
    )


def _stage_of(name: NetworkName, form: _Form) -> str:
    return f"{name}: exporting to ONNX" if form == "onnx" else plan_stage(name)


def _onnx_path(staging: Staging, name: NetworkName) -> Path:
    return staging.path / "onnx" / f"{name}.onnx"


def _flops(staging: Staging, spec: NetworkSpec) -> int:
    from svd_trt.export.flops import count_flops

    return count_flops(_onnx_path(staging, spec.name), spec)


def _manifest(job: _Job, networks: dict[NetworkName, NetworkEntry]) -> Manifest:
    tensorrt, model, sampler = job.tensorrt, job.checkpoint.description.model, job.checkpoint.description.sampler
    return Manifest(
        schema_version=SCHEMA_VERSION,
        svd_trt_version=__version__,
        family="stable-video-diffusion",
        source=msgspec.structs.replace(job.checkpoint.source, path=job.path),
        precision=job.options.precision,
        model=model,
        sampler=sampler,
        ranges=job.ranges,
        graph=job.options.graph,
        tensorrt=TensorRtEntry(tensorrt.name, tensorrt.version, tensorrt.target) if tensorrt else None,
        networks=networks,
        host=describe_host(
            model,
            half=job.options.precision == "fp16",
            adds_one=adds_one(sampler),
            arguments=describe_arguments(model, job.ranges, sampler),
        ),
        golden=None,
    )


def _cache_folder(options: BuildOptions) -> Path | None:
    """The cache that the options name, else the environment; None without either."""
    folder = options.cache or os.environ.get("SVD_TRT_CACHE")
    return Path(folder).expanduser() if folder else None


def _require_export_packages() -> None:
    """Refuse at once when a package is missing, before the checkpoint is read."""
    missing = [name for name in _EXPORT_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"svd-trt build (lacking {', '.join(missing)})", "export")
