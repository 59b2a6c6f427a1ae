"""What a build is to make: the checkpoint and the options, resolved into recipes, keys and a manifest."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from svd_trt.engine.host import describe_host
from svd_trt.engine.manifest import SCHEMA_VERSION, GraphEntry, Manifest, NetworkEntry, TensorRtEntry
from svd_trt.engine.profiles import Profile, profiles_of
from svd_trt.engine.spec import NetworkName, NetworkSpec, Ranges, network_specs
from svd_trt.engine.tensorrt_build import EngineOptions
from svd_trt.engine.tensorrt_import import TensorRt, select_tensorrt
from svd_trt.errors import ArgumentError
from svd_trt.export.checkpoint import COMPONENT_OF
from svd_trt.export.checkpoint_kinds import AnyCheckpoint, open_checkpoint
from svd_trt.export.code_digest import graph_code_digest, plan_code_digest
from svd_trt.export.options import BuildOptions, exact_points, graph_of, ranges_of
from svd_trt.export.recipe import Recipe, make_recipe
from svd_trt.progress import Progress
from svd_trt.runtime.parameters import describe_arguments
from svd_trt.runtime.schedules import adds_one
from svd_trt.version import __version__

__all__ = ["Job", "cache_folder", "engine_options", "make_job", "manifest_of", "timing_cache"]

# Releases of these change the graphs they export.
_GRAPH_PACKAGES = ("torch", "diffusers", "transformers", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class Job:
    """What is to be built, resolved: recipes and keys of the networks, and keys of their engines if wanted."""

    checkpoint: AnyCheckpoint
    path: str | None
    """Of a checkpoint that is a local folder or file."""
    options: BuildOptions
    tensorrt: TensorRt | None
    ranges: Ranges
    graph: GraphEntry
    specs: Mapping[NetworkName, NetworkSpec]
    recipes: Mapping[NetworkName, Recipe]
    onnx_keys: Mapping[NetworkName, str]
    profiles: Mapping[NetworkName, tuple[Profile, ...]]
    plan_keys: Mapping[NetworkName, str]


def make_job(model: str, options: BuildOptions, progress: Progress) -> Job:
    """Read the checkpoint and check the options, before anything is written."""
    reading = "reading the checkpoint"
    progress(reading, 0, 0)
    checkpoint = open_checkpoint(
        model,
        revision=options.revision,
        variant=options.variant,
        local_files_only=options.local_files_only,
        config=options.config,
        unet=None if options.unet is None else os.fspath(options.unet),
        loras=[os.fspath(lora) for lora in options.loras],
    )
    description = checkpoint.description
    ranges, graph = ranges_of(options, description.model), graph_of(options, description.deep_channels)
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
    specs = network_specs(description.model, ranges, graph.kept(options.precision))
    recipes = {n: make_recipe(s, options.precision, graph, description.upsamplers) for n, s in specs.items()}
    onnx_keys = {name: _onnx_key(checkpoint, recipe) for name, recipe in recipes.items()}
    points = exact_points(options, ranges, description.model)
    profiles = {name: profiles_of(spec, points) for name, spec in specs.items()}
    engines = specs if tensorrt else {}
    plan_keys = {n: _plan_key(onnx_keys[n], profiles[n], tensorrt, engine_options(n, options)) for n in engines}
    progress(reading, 1, 1)
    return Job(
        checkpoint, _local_path(model), options, tensorrt, ranges, graph, specs, recipes, onnx_keys, profiles, plan_keys
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


def engine_options(name: NetworkName, options: BuildOptions) -> EngineOptions:
    """How the engine of one network is built; the weights of the others are small beside the denoiser's."""
    streams = options.weight_streaming and name == "denoiser"
    return EngineOptions(weight_streaming=streams, optimization_level=options.optimization_level)


def timing_cache(tensorrt: TensorRt, options: BuildOptions) -> Path | None:
    """The file of kernel times: the one that the options name, else one in the cache for each TensorRT and GPU."""
    if options.timing_cache is not None:
        return Path(options.timing_cache).expanduser()
    folder = cache_folder(options)
    if tensorrt.name != "tensorrt" or folder is None:
        return None
    gpu = re.sub(r"\W+", "-", tensorrt.gpu)
    return folder / f"timings-{tensorrt.version}-{gpu}.cache"


def _digest(**parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def manifest_of(job: Job, networks: dict[NetworkName, NetworkEntry]) -> Manifest:
    """The manifest of a bundle of ``networks``, without golden values."""
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
        graph=job.graph,
        tensorrt=TensorRtEntry(tensorrt.name, tensorrt.version, tensorrt.target) if tensorrt else None,
        networks=networks,
        host=describe_host(
            model,
            half=job.options.precision == "fp16",
            adds_one=adds_one(sampler),
            shallow=job.graph.deep_channels is not None,
            arguments=describe_arguments(model, job.ranges, sampler, shallow=job.graph.deep_channels is not None),
        ),
        golden=None,
    )


def cache_folder(options: BuildOptions) -> Path | None:
    """The cache that the options name, else the environment; None without either."""
    folder = options.cache or os.environ.get("SVD_TRT_CACHE")
    return Path(folder).expanduser() if folder else None
