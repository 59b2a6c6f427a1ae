"""Checkpoint to bundle: what has to be made, what exists already, and the order of the work."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import msgspec

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.manifest import (
    FileEntry,
    GoldenEntry,
    Manifest,
    NetworkEntry,
    OnnxEntry,
    PlanEntry,
    ProfileEntry,
    TensorRtName,
    write_manifest,
)
from svd_trt.engine.plan import build_plan, kernels_path, plan_stage
from svd_trt.engine.spec import NetworkName, NetworkSpec
from svd_trt.errors import EngineBuildError, ExportError, MissingDependencyError, OutputError
from svd_trt.export.build_job import Job, cache_folder, engine_options, make_job, manifest_of, timing_cache
from svd_trt.export.checkpoint import COMPONENT_OF
from svd_trt.export.export_process import Exporter
from svd_trt.export.options import BuildOptions
from svd_trt.export.preflight import Work, check_resources
from svd_trt.progress import Progress, ignore_progress
from svd_trt.runtime.golden import short_video_flops, write_golden

if TYPE_CHECKING:
    from svd_trt.engine.staging import Staging

__all__ = ["BuildResult", "Stage", "build_bundle"]

_Form: TypeAlias = Literal["onnx"] | TensorRtName
_Entry = TypeVar("_Entry", OnnxEntry, PlanEntry)

# The golden video is made by default if the CPU makes it in seconds.
_QUICK_FLOPS = 1e11

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
    job = make_job(os.fspath(model), options, progress)
    from svd_trt.engine.network_cache import NetworkCache
    from svd_trt.engine.staging import Staging

    folder = cache_folder(options)
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


def _find_current(job: Job, staging: Staging) -> Bundle | None:
    """The bundle at the target if this build would give the same; the staging folder is then removed."""
    manifest = staging.existing()
    if manifest is None:
        return None
    # The manifest itself matters, beside the networks: the runtime reads its sigmas from there.
    wanted = manifest_of(job, {})
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


def _build(job: Job, staging: Staging, progress: Progress) -> BuildResult:
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
    manifest = manifest_of(job, networks)
    golden = _write_golden(job, manifest, staging, progress)
    bundle = staging.publish(msgspec.structs.replace(manifest, golden=golden))
    return BuildResult(bundle, tuple(stages), up_to_date=False)


def _write_golden(job: Job, manifest: Manifest, staging: Staging, progress: Progress) -> GoldenEntry:
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


def _check_resources(job: Job, to_export: list[NetworkName], to_build: list[NetworkName], folder: Path) -> None:
    if job.options.skip_checks:
        return
    parameters, precision, rewrites = job.checkpoint.parameters, job.options.precision, job.options.rewrites
    check_resources(folder, Work(to_export, to_build, parameters, precision, rewrites), cache_folder(job.options))


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


def _new_network(job: Job, name: NetworkName, exporter: Exporter, staging: Staging, progress: Progress) -> OnnxEntry:
    stage = _stage_of(name, "onnx")
    progress(stage, 0, 0)
    done = exporter.export(job.recipes[name], _onnx_path(staging, name))
    graph, *weights = (FileEntry.of(staging.path, Path(file)) for file in done.files)
    progress(stage, 1, 1)
    return OnnxEntry(job.onnx_keys[name], graph, tuple(weights), done.nodes, done.parameters)


def _new_plan(job: Job, name: NetworkName, staging: Staging, progress: Progress) -> PlanEntry:
    assert job.tensorrt is not None
    spec, path = job.specs[name], staging.path / job.tensorrt.name / f"{name}.plan"
    profiles, options = job.profiles[name], engine_options(name, job.options)
    timings = timing_cache(job.tensorrt, job.options)
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


def _require_export_packages() -> None:
    """Refuse at once when a package is missing, before the checkpoint is read."""
    missing = [name for name in _EXPORT_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"svd-trt build (lacking {', '.join(missing)})", "export")
