"""Before a generation: every argument is checked, the pictures are read, and the memory is planned."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image

from svd_trt.engine.decode_chunks import chunk_sizes
from svd_trt.engine.memory import MemoryRequest
from svd_trt.errors import ArgumentError
from svd_trt.progress import Progress, ignore_progress
from svd_trt.runtime.argument_values import colour_of
from svd_trt.runtime.callback import StepCallback, bind_callback
from svd_trt.runtime.cancellation import Cancellation
from svd_trt.runtime.diffusers_call import check_names
from svd_trt.runtime.executor import Executor
from svd_trt.runtime.framing import framed
from svd_trt.runtime.generation import Job, groups_of, latents_dtype
from svd_trt.runtime.guidance import largest_scale
from svd_trt.runtime.images import ImageInput, load_image, name_of, pictures_in
from svd_trt.runtime.latents import checked_latents
from svd_trt.runtime.longer import parts_of
from svd_trt.runtime.noise import TorchGenerator
from svd_trt.runtime.parameters import ParameterArguments, Parameters
from svd_trt.runtime.samplers import few_step_notes, known_harm, noisy_steps
from svd_trt.runtime.settings import memory_request, resolve
from svd_trt.runtime.timings import Timings, timed
from svd_trt.runtime.torch_state import TorchSources

__all__ = ["Given", "prepare"]

_log = logging.getLogger("svd_trt")


@dataclass(frozen=True)
class Given:
    """What a caller passes for one generation, unchecked; see `svd_trt.runtime.pipeline.VideoPipeline.__call__`.

    Attributes:
        pipe: the first argument of the callback.
        on_device: leave the frames on the device.
        cancellation: ends the generation, also while it is prepared.
    """

    pipe: object
    image: ImageInput | Sequence[ImageInput]
    parameters: ParameterArguments
    generator: Any
    latents: Any
    callback: StepCallback | None
    callback_inputs: Sequence[str]
    progress: Progress | None
    on_device: bool = False
    cancellation: Cancellation = field(default_factory=Cancellation)


def prepare(executor: Executor, given: Given) -> tuple[Job, list[PIL.Image.Image]]:
    """Check every argument, read the pictures, and then plan the memory, which may load the engines.

    The caller's generators of torch are advanced at the end, when nothing is refused any more.
    """
    given.cancellation.check()
    executor.require_open()
    check_names(given.parameters, Parameters.fields().keys())
    images = pictures_in(given.image)
    on_step_end = bind_callback(given.callback, given.pipe, given.callback_inputs)
    parameters = Parameters(**given.parameters)  # type: ignore[arg-type]  # sigmas and seed may be lists
    manifest = executor.bundle.manifest
    request = memory_request(parameters, manifest, len(images))
    factor = manifest.model.vae_scale_factor
    latent_size = (request.height // factor, request.width // factor)
    shape = (request.videos, request.frames, manifest.model.latent_channels, *latent_size)  # [B, F, C, h, w]
    groups = groups_of(request.videos, manifest.ranges.batch)
    if parameters.extend:
        _check_extension(given, request)
    start = None if given.latents is None else checked_latents(given.latents, shape)
    generators = _generators(given.generator, parameters, request)
    notes: list[str] = []
    pictures = _read(images, parameters, request, notes.append)
    timings = Timings()
    with timed(timings, "load"):
        plan = executor.settle(request)  # checks the decode chunk before it loads
    seed, noise = _noise(parameters, generators)
    settings = resolve(parameters, manifest, request, plan, seed)
    schedule = None if parameters.sigmas is not None else settings.schedule or manifest.sampler.schedule
    if harm := known_harm(settings.sampler, schedule, settings.num_inference_steps):
        notes.append(harm)
    largest = largest_scale(settings.guidance_shape, settings.min_guidance_scale, settings.max_guidance_scale)
    notes += few_step_notes(settings.sampler, settings.num_inference_steps, largest)
    repeats = 1  # of what is drawn: once for each part of a longer video
    if settings.extend:
        parts = parts_of(request.frames, settings.extend, settings.decode_chunk_size, manifest.ranges.chunk)
        repeats = len(parts)
        groups, chunks = groups * repeats, [chunk for part in parts for chunk in part.chunks]
    else:
        chunks = chunk_sizes(request.videos * request.frames, settings.decode_chunk_size, manifest.ranges.chunk)
    for note in notes:  # now that nothing is refused any more
        _log.warning(note)
    if generators is not None:
        latents = (shape, latents_dtype(manifest))
        count = (start is None) + noisy_steps(settings.sampler, settings.sigmas)
        picture = ((request.pictures, 3, request.height, request.width), np.float32)
        generators.advance([picture, *[latents] * count] * repeats)
    job = Job(
        settings,
        request,
        plan,
        latent_shape=shape,
        groups=groups,
        chunks=chunks,
        start=start,
        noise=noise,
        on_step_end=on_step_end,
        progress=given.progress or ignore_progress,
        on_device=given.on_device,
        timings=timings,
        cancellation=given.cancellation,
    )
    executor.watch(job.cancellation)
    return job, pictures


def _check_extension(given: Given, request: MemoryRequest) -> None:
    if request.videos > 1:
        raise ArgumentError(f"extend makes one video at a time, not {request.videos}; make a call for each")
    for name, value in (("latents", given.latents), ("callback_on_step_end", given.callback)):
        if value is not None:
            raise ArgumentError(f"{name} cannot be used with extend, which denoises part after part")


def _generators(generator: Any, parameters: Parameters, request: MemoryRequest) -> TorchSources | None:
    if generator is None:
        return None
    if parameters.seed is not None:
        raise ArgumentError("seed and generator were both given; give one of them")
    return TorchSources(generator, request.videos)


def _noise(
    parameters: Parameters, generators: TorchSources | None
) -> tuple[int | tuple[int, ...] | None, list[TorchGenerator]]:
    """The seed to report, and what the noise is drawn from."""
    if generators is not None:
        return generators.seed(), generators.copies
    seed = secrets.randbits(32) if parameters.seed is None else parameters.seed
    return seed, [TorchGenerator(one) for one in (seed if isinstance(seed, tuple) else (seed,))]


def _read(
    images: Sequence[ImageInput], parameters: Parameters, request: MemoryRequest, warn: Callable[[str], None]
) -> list[PIL.Image.Image]:
    """Read the pictures and fit them to the shape of the frames."""
    background = None if parameters.background is None else colour_of(parameters.background)
    pictures = []
    for number, image in enumerate(images, 1):
        name = name_of(image, number if len(images) > 1 else None)
        picture = load_image(image, icc=parameters.icc, background=background, name=name, warn=warn)
        height, width, mode = request.height, request.width, parameters.resize_mode
        pictures.append(framed(picture, height, width, mode, background=background, name=name, warn=warn))
    return pictures
