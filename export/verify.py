"""Compare a bundle with diffusers: each network alone, and whole videos."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from polygraphy.comparator import IterationResult, PsnrCompareFunc, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from svd_trt.engine.manifest import Precision
from svd_trt.engine.spec import DEEP_FEATURES, NETWORKS, NetworkName, NetworkSpec
from svd_trt.errors import CheckpointError
from svd_trt.export.checkpoint import Checkpoint
from svd_trt.export.fidelity import IDENTICAL_DB, draw_picture, psnr
from svd_trt.export.reference import diffusers_output, draw_inputs, load_models
from svd_trt.progress import Progress, ignore_progress
from svd_trt.runtime.pipeline import VideoPipeline

__all__ = ["LEAST_DB", "Difference", "Sizes", "differing_weights", "sizes_to_try", "verify_networks", "verify_videos"]

Sizes: TypeAlias = Mapping[str, int]

LEAST_DB: dict[Precision, tuple[float, float]] = {"fp32": (60.0, 50.0), "fp16": (40.0, 30.0)}
"""Least PSNR of a network's output and of a video's worst frame. fp32 differs by the order of sums alone."""


@dataclass(frozen=True)
class Difference:
    """How far one output is from the reference's.

    Attributes:
        what: network and output, or ``video``.
        shape: of the output.
        max_abs, mean_abs: of the difference, by Polygraphy's comparator.
        psnr_db: relative to the reference's peak; for frames relative to 255, and of a video's worst frame.
        least_db: the least PSNR that passes.
        reference_std: standard deviation of the reference. Near 0 the comparison shows nothing.
    """

    what: str
    shape: tuple[int, ...]
    max_abs: float
    mean_abs: float
    psnr_db: float
    least_db: float
    reference_std: float

    @property
    def ok(self) -> bool:
        """Within tolerance; an output with values that are not finite is not."""
        return math.isfinite(self.max_abs) and self.psnr_db >= self.least_db


def differing_weights(pipe: VideoPipeline, checkpoint: Checkpoint) -> list[str]:
    """Components whose weights are not those that the bundle was built from."""
    built = pipe.bundle.manifest.source.digests
    return [name for name, digest in checkpoint.source.digests.items() if built.get(name) != digest]


def sizes_to_try(pipe: VideoPipeline, frames: Sequence[int], sides: Sequence[tuple[int, int]]) -> list[Sizes]:
    """A value of every symbol for each pair of ``frames`` and ``sides`` (height, width); the ranges' optimum if empty.

    Raises:
        ArgumentError: a value is outside the bundle's ranges.
    """
    ranges = pipe.bundle.manifest.ranges
    for count in frames:
        ranges.frames.require(count, "frames", "--frames")
    for height, width in sides:
        ranges.height.require(height, "height", "--height")
        ranges.width.require(width, "width", "--width")
    shared = {"batch": ranges.batch.min, "pictures": ranges.pictures.min, "branches": ranges.branches.max}
    return [
        shared | {"frames": count, "height": height, "width": width, "chunk": ranges.chunk.clamp(count)}
        for count in frames or [ranges.frames.opt]
        for height, width in sides or [(ranges.height.opt, ranges.width.opt)]
    ]


def verify_networks(
    pipe: VideoPipeline,
    checkpoint: Checkpoint,
    sizes: Sequence[Sizes],
    networks: Sequence[NetworkName] = NETWORKS,
    least_db: float | None = None,
    progress: Progress = ignore_progress,
) -> Iterator[Difference]:
    """Yield the difference of each output of ``networks`` at each of ``sizes``. One torch model is in memory at a time.

    Raises:
        CheckpointError: the checkpoint has another architecture than the bundle.
    """
    least = LEAST_DB[pipe.bundle.manifest.precision][0] if least_db is None else least_db
    for name in networks:
        spec = pipe.bundle.network(name).spec
        distinct = {tuple((symbol, size[symbol]) for symbol in spec.ranges): size for size in sizes}
        progress(name, 0, len(distinct))
        with load_models(checkpoint, name) as models:
            for index, size in enumerate(distinct.values()):
                inputs = draw_inputs(spec, size)
                keeps = any(tensor.name == DEEP_FEATURES for tensor in spec.outputs)
                theirs = diffusers_output(models, name, inputs, keeps_features=keeps)
                ours = _run(pipe, spec, inputs, size)
                for tensor, a, b in zip(spec.outputs, ours, theirs, strict=True):
                    yield _difference(f"{name}.{tensor.name}", a, b, least)
                progress(name, index + 1, len(distinct))


def verify_videos(
    pipe: VideoPipeline,
    reference: Any,
    sizes: Sequence[Sizes],
    steps: int,
    seed: int,
    least_db: float | None = None,
    progress: Progress = ignore_progress,
) -> Iterator[Difference]:
    """Yield the difference of a video at each of ``sizes`` from that of ``reference``, diffusers' pipeline in fp32.

    Both start from the same latents, because an fp16 pipeline would draw other ones.
    """
    manifest = pipe.bundle.manifest
    least = LEAST_DB[manifest.precision][1] if least_db is None else least_db
    factor = manifest.model.vae_scale_factor
    progress("video", 0, len(sizes))
    for index, size in enumerate(sizes):
        height, width, frames = size["height"], size["width"], size["frames"]
        shape = (1, frames, manifest.model.latent_channels, height // factor, width // factor)
        latents = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        picture = draw_picture(height, width)
        arguments: dict[str, Any] = {
            "num_frames": frames,
            "height": height,
            "width": width,
            "num_inference_steps": steps,
            "decode_chunk_size": manifest.ranges.chunk.clamp(frames),
            "output_type": "np",
        }
        ours = pipe(picture, latents=latents, seed=seed, **arguments).frames[0]
        generator = torch.Generator().manual_seed(seed)
        theirs = reference(picture, latents=torch.from_numpy(latents), generator=generator, **arguments).frames[0]
        yield _video_difference(ours, (theirs * 255).round().astype(np.uint8), least)
        progress("video", index + 1, len(sizes))


def _run(
    pipe: VideoPipeline, spec: NetworkSpec, inputs: dict[str, npt.NDArray[Any]], size: Sizes
) -> list[npt.NDArray[Any]]:
    """The outputs of the bundle's network on the pipeline's device."""
    given = {t.name: np.ascontiguousarray(inputs[t.name]) for t in spec.inputs}
    outputs = pipe.executor.run(spec.name, given, size)
    return [outputs[t.name] for t in spec.outputs]


def _difference(what: str, ours: npt.NDArray[Any], theirs: npt.NDArray[Any], least_db: float) -> Difference:
    if ours.shape != theirs.shape:
        raise CheckpointError(
            f"{what} has shape {ours.shape} in the bundle and {theirs.shape} in the checkpoint; "
            "pass the checkpoint that the bundle was built from"
        )
    pair = [IterationResult(outputs={what: array.astype(np.float32)}) for array in (ours, theirs)]
    G_LOGGER.module_severity = G_LOGGER.CRITICAL  # it would print every statistic
    found = SimpleCompareFunc()(*pair)[what]
    decibels = psnr(ours, theirs) if ours.dtype == np.uint8 else float(PsnrCompareFunc()(*pair)[what].psnr)
    finite = bool(np.isfinite(ours).all())
    return Difference(
        what=what,
        shape=ours.shape,
        max_abs=float(found.max_absdiff) if finite else math.nan,
        mean_abs=float(found.mean_absdiff) if finite else math.nan,
        psnr_db=min(decibels, IDENTICAL_DB) if finite else math.nan,
        least_db=least_db,
        reference_std=float(theirs.std()),
    )


def _video_difference(ours: npt.NDArray[Any], theirs: npt.NDArray[Any], least_db: float) -> Difference:
    error = np.abs(ours.astype(np.float32) - theirs)
    return Difference(
        what="video",
        shape=ours.shape,
        max_abs=float(error.max()),
        mean_abs=float(error.mean()),
        psnr_db=min(psnr(a, b) for a, b in zip(ours, theirs, strict=True)),
        least_db=least_db,
        reference_std=float(theirs.std()),
    )
