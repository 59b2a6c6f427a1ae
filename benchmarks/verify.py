"""A bundle against diffusers: each network alone, and whole videos."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from polygraphy.comparator import IterationResult, PsnrCompareFunc, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from svd_trt.benchmarks.fidelity import IDENTICAL_DB
from svd_trt.benchmarks.picture import draw_picture
from svd_trt.benchmarks.reference import diffusers_output, draw_inputs
from svd_trt.engine.manifest import Precision
from svd_trt.engine.spec import NETWORKS, NetworkName, NetworkSpec
from svd_trt.errors import ArgumentError, CheckpointError
from svd_trt.export.checkpoint import COMPONENT_OF, Checkpoint
from svd_trt.export.presets import SCHEDULER
from svd_trt.runtime.device import download, upload
from svd_trt.runtime.pipeline import VideoPipeline

__all__ = ["LEAST_DB", "Difference", "Sizes", "differing_weights", "sizes_to_try", "verify_networks", "verify_videos"]

Sizes: TypeAlias = Mapping[str, int]

LEAST_DB: dict[Precision, tuple[float, float]] = {"fp32": (60.0, 50.0), "fp16": (40.0, 30.0)}
"""Least PSNR of a network's output and of a video's worst frame. fp32 differs by the order of sums alone."""

_FRAMES_PEAK = 255.0


@dataclass(frozen=True)
class Difference:
    """How far one output is from the reference's.

    Attributes:
        what: network and output, or ``video``.
        shape: of the output.
        max_abs, mean_abs: of the difference, by Polygraphy's comparator.
        psnr_db: against the reference's peak; for frames against 255, of the worst frame in a video.
        least_db: what is asked for.
    """

    what: str
    shape: tuple[int, ...]
    max_abs: float
    mean_abs: float
    psnr_db: float
    least_db: float

    @property
    def ok(self) -> bool:
        """Within tolerance; what is not a number is not."""
        return math.isfinite(self.max_abs) and self.psnr_db >= self.least_db


def differing_weights(pipe: VideoPipeline, checkpoint: Checkpoint) -> list[str]:
    """Components whose weights are not those that the bundle was built from."""
    built = pipe.bundle.manifest.source.digests
    return [name for name, digest in checkpoint.source.digests.items() if built.get(name) != digest]


def sizes_to_try(pipe: VideoPipeline, frames: Sequence[int], sides: Sequence[tuple[int, int]]) -> list[Sizes]:
    """Values of every symbol for each run: the ranges' own middle, with each of ``frames`` and (height, width).

    Raises:
        ArgumentError: a value that the bundle was not built for.
    """
    ranges = pipe.bundle.manifest.ranges
    for name, allowed, values in (
        ("frames", ranges.frames, list(frames)),
        ("height", ranges.height, [height for height, _ in sides]),
        ("width", ranges.width, [width for _, width in sides]),
    ):
        for value in values:
            if value not in allowed:
                raise ArgumentError(f"{name} {value}: this bundle was built for {allowed.words}")
    base = {
        "batch": ranges.batch.min,
        "pictures": ranges.pictures.min,
        "branches": ranges.branches.max,
        "frames": ranges.frames.opt,
        "height": ranges.height.opt,
        "width": ranges.width.opt,
    }
    tried: list[Sizes] = []
    for count in frames or [ranges.frames.opt]:
        for height, width in sides or [(ranges.height.opt, ranges.width.opt)]:
            size = {"frames": count, "height": height, "width": width}
            tried.append(base | size | {"chunk": ranges.chunk.clamp(count)})
    return tried


def verify_networks(
    pipe: VideoPipeline,
    checkpoint: Checkpoint,
    sizes: Sequence[Sizes],
    networks: Sequence[NetworkName] = NETWORKS,
    least_db: float | None = None,
    started: Callable[[str], object] = lambda _: None,
) -> Iterator[Difference]:
    """Each output of ``networks`` at each of ``sizes``, as it comes to be known. One model in memory at a time.

    Raises:
        CheckpointError: the checkpoint has another architecture than the bundle.
    """
    precision = pipe.bundle.manifest.precision
    asked = LEAST_DB[precision][0] if least_db is None else least_db
    for name in networks:
        spec = pipe.bundle.network(name).spec
        started(name)
        unique = {tuple((s, size[s]) for s in _symbols(spec)): size for size in sizes}
        with _Reference(checkpoint, name) as reference:
            for size in unique.values():
                inputs = draw_inputs(spec, size)
                theirs = reference(inputs)
                ours = _run(pipe, spec, inputs, size)
                for tensor, a, b in zip(spec.outputs, ours, theirs, strict=True):
                    yield _difference(f"{name}.{tensor.name}", a, b, asked)


def verify_videos(
    pipe: VideoPipeline, reference: Any, sizes: Sequence[Sizes], steps: int, seed: int, least_db: float | None = None
) -> Iterator[Difference]:
    """The whole pipeline at each of ``sizes`` against ``reference``, diffusers' pipeline in fp32.

    Both start from the same latents: an fp16 pipeline would draw others.
    """
    manifest = pipe.bundle.manifest
    asked = LEAST_DB[manifest.precision][1] if least_db is None else least_db
    factor = manifest.model.vae_scale_factor
    for size in sizes:
        height, width, frames = size["height"], size["width"], size["frames"]
        shape = (1, frames, manifest.model.latent_channels, height // factor, width // factor)
        latents = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        picture = draw_picture(height, width)
        both: dict[str, Any] = {
            "num_frames": frames,
            "height": height,
            "width": width,
            "num_inference_steps": steps,
            "decode_chunk_size": manifest.ranges.chunk.clamp(frames),
        }
        ours = pipe(picture, latents=latents, seed=seed, output_type="np", **both).frames[0]
        generator = torch.Generator().manual_seed(seed)
        made = reference(
            picture, latents=torch.from_numpy(latents), generator=generator, output_type="np", **both
        ).frames[0]
        yield _video_difference(ours, (made * 255).round().astype(np.uint8), asked)


class _Reference:
    """One network of diffusers, loaded while the block lasts."""

    def __init__(self, checkpoint: Checkpoint, name: NetworkName) -> None:
        self.checkpoint, self.name = checkpoint, name

    def __enter__(self) -> _Reference:
        from diffusers import EulerDiscreteScheduler

        model = self.checkpoint.load(COMPONENT_OF[self.name], torch.float32).eval()
        scheduler = EulerDiscreteScheduler.from_config(SCHEDULER)
        self.models: Any = SimpleNamespace(image_encoder=model, vae=model, unet=model, scheduler=scheduler)
        return self

    def __exit__(self, *_: object) -> None:
        self.models = None
        gc.collect()

    def __call__(self, inputs: dict[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()}
        try:
            return [output.numpy() for output in diffusers_output(self.models, self.name, tensors)]
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint's {self.name} does not take what the bundle's takes; is it another model?"
            ) from error


def _symbols(spec: NetworkSpec) -> list[str]:
    return list(spec.ranges)


def _run(
    pipe: VideoPipeline, spec: NetworkSpec, inputs: dict[str, npt.NDArray[Any]], size: Sizes
) -> list[npt.NDArray[Any]]:
    """The bundle's network on the pipeline's device."""
    device = pipe.device
    with ExitStack() as stack:
        tensors: dict[str, Any] = {
            t.name: stack.enter_context(upload(device, np.ascontiguousarray(inputs[t.name]), t.name))
            for t in spec.inputs
        }
        for t in spec.outputs:
            tensors[t.name] = stack.enter_context(device.empty(t.resolve(size), t.dtype, t.name))
        with pipe.engines.lend(spec.name) as session:
            session.enqueue(tensors)
        return [download(device, tensors[t.name]) for t in spec.outputs]


def _difference(what: str, ours: npt.NDArray[Any], theirs: npt.NDArray[Any], asked: float) -> Difference:
    if ours.shape != theirs.shape:
        raise CheckpointError(f"{what} has shape {ours.shape}, and the checkpoint's {theirs.shape}; another model?")
    pair = [IterationResult(outputs={what: array.astype(np.float32)}) for array in (ours, theirs)]
    G_LOGGER.module_severity = G_LOGGER.CRITICAL  # it would print every statistic
    found = SimpleCompareFunc()(*pair)[what]
    psnr = float(PsnrCompareFunc()(*pair)[what].psnr)
    if ours.dtype == np.uint8:
        psnr = _psnr(ours, theirs)
    finite = bool(np.isfinite(ours).all())
    return Difference(
        what=what,
        shape=ours.shape,
        max_abs=float(found.max_absdiff) if finite else math.nan,
        mean_abs=float(found.mean_absdiff) if finite else math.nan,
        psnr_db=min(psnr, IDENTICAL_DB) if finite else math.nan,
        least_db=asked,
    )


def _video_difference(ours: npt.NDArray[Any], theirs: npt.NDArray[Any], asked: float) -> Difference:
    worst = min(_psnr(a, b) for a, b in zip(ours, theirs, strict=True))
    error = np.abs(ours.astype(np.float32) - theirs)
    return Difference("video", ours.shape, float(error.max()), float(error.mean()), worst, asked)


def _psnr(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return IDENTICAL_DB if error == 0 else 10 * math.log10(_FRAMES_PEAK**2 / error)
