"""One generation, from pictures to frames: noise, encode, denoise, decode, in the order of diffusers' pipeline."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import numpy as np
import PIL.Image

from svd_trt.engine.memory import MemoryPlan, MemoryRequest
from svd_trt.engine.spec import Range
from svd_trt.errors import ArgumentError
from svd_trt.progress import Progress
from svd_trt.runtime.callback import OnStepEnd
from svd_trt.runtime.decode import Frames, decode
from svd_trt.runtime.denoise import Conditions, Floats, denoise
from svd_trt.runtime.executor import Executor
from svd_trt.runtime.noise import TorchGenerator
from svd_trt.runtime.parameters import Settings
from svd_trt.runtime.preprocess import clip_pixels, vae_image
from svd_trt.runtime.samplers import SAMPLERS
from svd_trt.runtime.schedules import initial_std
from svd_trt.runtime.timings import Timings, timed
from svd_trt.runtime.tracing import traced

__all__ = ["Job", "encode", "generate", "groups_of"]


@dataclass(frozen=True)
class Job:
    """Checked arguments of one generation.

    Attributes:
        settings: everything decided.
        request: what the plan is for.
        plan: how device memory is used.
        latent_shape: of all videos, ``[B, F, C, h, w]``.
        groups: videos that are denoised together.
        chunks: frames that are decoded together; all frames of one video, then of the next.
        start: noise of unit variance to start from, ``[B, F, C, h, w]``; None draws it from the seed.
        on_step_end: the caller's callback, bound to its pipeline.
        progress: called as ``progress(stage, done, total)`` with the stages ``encode`` (pictures), ``denoise`` (steps)
            and ``decode`` (frames).
        timings: filled in while the generation runs.
    """

    settings: Settings
    request: MemoryRequest
    plan: MemoryPlan
    latent_shape: tuple[int, ...]
    groups: list[slice]
    chunks: list[int]
    start: Floats | None
    on_step_end: OnStepEnd | None
    progress: Progress
    timings: Timings = field(default_factory=Timings)


def generate(
    executor: Executor, job: Job, pictures: Sequence[PIL.Image.Image], *, latents_only: bool = False
) -> Generator[Frames | Floats]:
    """Generate the videos of ``job`` from RGB pictures.

    Yields:
        Chunks of frames, uint8 ``[n, H, W, 3]``, all of the first video, then of the next. With ``latents_only``, the
        denoised latents of all videos instead, float32 ``[B, F, C, h, w]``.
    """
    settings, manifest = job.settings, executor.bundle.manifest
    with executor.running(job.request, job.plan, job.latent_shape):
        # 1. Draw noise: the pictures' first, then the latents', as diffusers does.
        noise = TorchGenerator(settings.seed)
        image_noise = noise.randn((len(pictures), 3, settings.height, settings.width))
        # An fp16 pipeline draws in half precision, which rounds and, for some lengths, orders the draws differently.
        dtype = np.float16 if manifest.precision == "fp16" else np.float32
        start = noise.randn(job.latent_shape, dtype) if job.start is None else job.start

        # 2. Make the schedule: the sampler's coefficients, a row for each step.
        sigmas = np.asarray(settings.sigmas, np.float32)
        table = SAMPLERS[settings.sampler](sigmas)  # [S, 7]
        latents = start.astype(np.float32) * initial_std(manifest.sampler, sigmas)

        # 3. Encode the pictures into what the videos are conditioned on.
        with traced("encode"):
            conditions = encode(executor, job, pictures, image_noise)

        # 4. Denoise.
        with traced("denoise"):
            latents = denoise(
                executor,
                latents,
                conditions,
                table,
                groups=job.groups,
                split_guidance=job.plan.split_guidance,
                on_step_end=job.on_step_end,
                progress=job.progress,
                timings=job.timings,
            )
        if latents_only:
            yield latents
            return

        # 5. Decode.
        size = (settings.height, settings.width)
        yield from decode(executor, latents, chunks=job.chunks, size=size, progress=job.progress, timings=job.timings)


def encode(executor: Executor, job: Job, pictures: Sequence[PIL.Image.Image], image_noise: Floats) -> Conditions:
    """Run both encoders on every picture; return the conditions of every video.

    ``image_noise`` is ``[P, 3, H, W]`` for P pictures, and is added with the strength ``noise_aug_strength``.
    """
    settings, model, ranges = job.settings, executor.bundle.manifest.model, executor.bundle.manifest.ranges
    with timed(job.timings, "preprocess"):
        pixels = np.stack([clip_pixels(one, mean=model.image_mean, std=model.image_std) for one in pictures])
        images = np.stack([vae_image(one, settings.height, settings.width) for one in pictures])
        images += np.float32(settings.noise_aug_strength) * image_noise
    count, sizes = len(pictures), {"height": settings.height, "width": settings.width}
    groups = groups_of(count, ranges.pictures)
    job.progress("encode", 0, count)
    with timed(job.timings, "load"):
        executor.load("image_encoder")
    embeds = []  # [P, 1, D]
    for group in groups:
        with timed(job.timings, "image_encoder"):
            inputs = {"pixels": pixels[group]}
            outputs = executor.run("image_encoder", inputs, {"pictures": len(pixels[group])})
        embeds.append(outputs["image_embeds"])
    with timed(job.timings, "load"):
        executor.load("vae_encoder")
    latents = []  # [P, C, h, w]
    for group in groups:
        with timed(job.timings, "vae_encoder"):
            inputs = {"image": images[group]}
            outputs = executor.run("vae_encoder", inputs, sizes | {"pictures": len(images[group])})
        latents.append(outputs["image_latents"])
        job.progress("encode", group.stop, count)
    repeats = settings.num_videos_per_prompt
    return Conditions(
        image_embeds=np.concatenate(embeds).repeat(repeats, axis=0),
        image_latents=np.concatenate(latents).repeat(repeats, axis=0),
        added_time_ids=np.array([settings.fps - 1, settings.motion_bucket_id, settings.noise_aug_strength], np.float32),
        guidance=np.linspace(
            settings.min_guidance_scale, settings.max_guidance_scale, settings.num_frames, dtype=np.float32
        ),
        guided=job.request.guided,
    )


def groups_of(count: int, span: Range) -> list[slice]:
    """Cut ``count`` videos or pictures into groups that an engine takes together.

    Raises:
        ArgumentError: the last group is smaller than ``span`` allows.
    """
    groups = [slice(start, min(start + span.max, count)) for start in range(0, count, span.max)]
    last = groups[-1].stop - groups[-1].start
    if last < span.min:
        raise ArgumentError(
            f"{count} videos leave a group of {last}, and this bundle was built for at least {span.min} together; "
            "build one with another --batch"
        )
    return groups
