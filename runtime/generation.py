"""One generation, from pictures to frames: noise, encode, denoise, decode, in the order of diffusers' pipeline."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from svd_trt.engine.manifest import Manifest
from svd_trt.engine.memory import MemoryPlan, MemoryRequest
from svd_trt.engine.spec import Range
from svd_trt.errors import ArgumentError, BackendError
from svd_trt.progress import Progress
from svd_trt.runtime.callback import OnStepEnd
from svd_trt.runtime.cancellation import Cancellation
from svd_trt.runtime.decode import Frames, decode
from svd_trt.runtime.deep_steps import deep_steps
from svd_trt.runtime.denoise import Conditions, Floats, denoise
from svd_trt.runtime.executor import Executor
from svd_trt.runtime.guidance import guidance_scales
from svd_trt.runtime.noise import TorchGenerator, draw_rows
from svd_trt.runtime.preprocess import clip_pixels, vae_image
from svd_trt.runtime.samplers import SAMPLERS, noisy_steps
from svd_trt.runtime.schedules import initial_std
from svd_trt.runtime.settings import Settings, guided_steps_of
from svd_trt.runtime.timings import Timings, timed
from svd_trt.runtime.tracing import traced

__all__ = [
    "Job",
    "decode_frames",
    "denoise_group",
    "encode",
    "generate",
    "groups_of",
    "latents_dtype",
    "raising_reason",
    "schedule",
]


@dataclass(frozen=True)
class Job:
    """Checked arguments of one generation.

    Attributes:
        settings: everything decided.
        request: what the plan is for.
        plan: how device memory is used.
        latent_shape: of all videos, ``[B, F, C, h, w]``.
        groups: videos that are denoised together; of a longer video, the same one for each of its parts.
        chunks: frames that are decoded together; all frames of one video, then of the next.
        start: noise of unit variance to start from, ``[B, F, C, h, w]``; None draws it from ``noise``.
        noise: what random numbers are drawn from: one source, or one for each video.
        on_step_end: the caller's callback, bound to its pipeline.
        progress: called as ``progress(stage, done, total)`` with the stages ``encode`` (pictures), ``denoise`` (steps)
            and ``decode`` (frames). The last two take turns, group by group.
        on_device: leave the frames on the device.
        timings: filled in while the generation runs.
        cancellation: ends the generation.
    """

    settings: Settings
    request: MemoryRequest
    plan: MemoryPlan
    latent_shape: tuple[int, ...]
    groups: list[slice]
    chunks: list[int]
    start: Floats | None
    noise: Sequence[TorchGenerator]
    on_step_end: OnStepEnd | None
    progress: Progress
    on_device: bool = False
    timings: Timings = field(default_factory=Timings)
    cancellation: Cancellation = field(default_factory=Cancellation)


def generate(
    executor: Executor, job: Job, pictures: Sequence[PIL.Image.Image], *, latents_only: bool = False
) -> Generator[Frames | Floats | list[Any]]:
    """Generate the videos of ``job`` from RGB pictures, one group after the other.

    Yields:
        Chunks of frames, uint8 ``[n, H, W, 3]``, all of the first video, then of the next; a group is denoised when the
        frames of the one before it have been taken. With ``latents_only``, the denoised latents of each group instead,
        float32 ``[B, F, C, h, w]``. With ``on_device`` and a GPU, chunks are lists of arrays on it.

    Raises:
        CancelledError: another thread cancelled it.
        BackendError: the device failed, or denoising ended in values that are not finite.
    """
    with (
        raising_reason(job.cancellation),
        executor.stopping(job.cancellation),
        executor.running(job.request, job.plan, job.latent_shape),
    ):
        # 1. Encode the pictures into what the videos are conditioned on.
        with traced("encode"):
            conditions = encode(executor, job, pictures)
        del pictures  # they may take more memory than all the rest

        # 2. Make the schedule, and the noise to start from.
        table, start, noise = schedule(executor.bundle.manifest, job)

        # 3. Denoise and decode, so that videos are finished one group after the other.
        pending = start[:0, 0]  # latents of frames that wait for the rest of their chunk, [n, C, h, w]
        frames = 0  # that are decoded
        for group, chunks in zip(job.groups, chunks_of_groups(job), strict=True):
            with traced("denoise"):
                latents = denoise_group(executor, job, start[group], conditions.of(group), table, noise[:, group])
            if latents_only:
                yield latents
                continue
            pending = np.concatenate([pending, latents.reshape(-1, *latents.shape[2:])])
            if ready := sum(chunks):
                yield from decode_frames(executor, job, pending[:ready], chunks, frames)
                pending, frames = pending[ready:], frames + ready


def encode(executor: Executor, job: Job, pictures: Sequence[PIL.Image.Image]) -> Conditions:
    """Run both encoders on every picture; return the conditions of every video.

    Draws ``[P, 3, H, W]`` numbers for P pictures, which are added to them with the strength ``noise_aug_strength``.
    """
    settings, model, ranges = job.settings, executor.bundle.manifest.model, executor.bundle.manifest.ranges
    count, sizes = len(pictures), {"height": settings.height, "width": settings.width}
    groups, stop = groups_of(count, ranges.pictures), job.cancellation.event
    job.progress("encode", 0, count)
    with timed(job.timings, "load"):
        executor.load("image_encoder")
    embeds = []  # [P, 1, D]
    for group in groups:
        job.cancellation.check()
        with timed(job.timings, "preprocess"):
            pixels = np.stack([clip_pixels(p, mean=model.image_mean, std=model.image_std) for p in pictures[group]])
        with timed(job.timings, "image_encoder"):
            outputs = executor.run("image_encoder", {"pixels": pixels}, {"pictures": len(pixels)}, stop)
        embeds.append(outputs["image_embeds"])
    with timed(job.timings, "load"):
        executor.load("vae_encoder")
    latents = []  # [P, C, h, w]
    for group in groups:
        job.cancellation.check()
        with timed(job.timings, "preprocess"):
            images = np.stack([vae_image(p, settings.height, settings.width) for p in pictures[group]])
            # torch draws all pictures' noise at once. It draws 16 numbers at a time, and each picture has a multiple of
            # that, so groups draw the same.
            images += np.float32(settings.noise_aug_strength) * draw_rows(job.noise, images.shape, first=group.start)
        with timed(job.timings, "vae_encoder"):
            outputs = executor.run("vae_encoder", {"image": images}, sizes | {"pictures": len(images)}, stop)
        latents.append(outputs["image_latents"])
        job.progress("encode", group.stop, count)
    repeats = settings.num_videos_per_prompt
    return Conditions(
        image_embeds=np.concatenate(embeds).repeat(repeats, axis=0),
        image_latents=np.concatenate(latents).repeat(repeats, axis=0),
        added_time_ids=np.array([settings.fps - 1, settings.motion_bucket_id, settings.noise_aug_strength], np.float32),
        guidance=guidance_scales(
            settings.guidance_shape, settings.min_guidance_scale, settings.max_guidance_scale, settings.num_frames
        ),
        guided_steps=guided_steps_of(settings, settings.sigmas),
    )


def schedule(manifest: Manifest, job: Job) -> tuple[Floats, Floats, Floats]:
    """The sampler's coefficients, the latents of all videos at the first sigma, and the noise of steps that take some.

    The latents' noise is drawn after the pictures', as in diffusers, and then that of each step, for all videos.

    Returns:
        ``[S, 7]``, ``[B, F, C, h, w]`` and ``[n, B, F, C, h, w]`` for the first n steps.
    """
    sigmas, dtype = np.asarray(job.settings.sigmas, np.float32), latents_dtype(manifest)
    start = draw_rows(job.noise, job.latent_shape, dtype) if job.start is None else job.start
    latents = start.astype(np.float32) * initial_std(manifest.sampler, sigmas)
    noise = np.empty((noisy_steps(job.settings.sampler, job.settings.sigmas), *job.latent_shape), np.float32)
    for step in range(len(noise)):
        noise[step] = draw_rows(job.noise, job.latent_shape, dtype)
    return SAMPLERS[job.settings.sampler](sigmas), latents, noise


def latents_dtype(manifest: Manifest) -> npt.DTypeLike:
    """The type that the first latents are drawn in.

    An fp16 pipeline draws in half precision, which rounds and, for some lengths, orders the draws differently.
    """
    return np.float16 if manifest.precision == "fp16" else np.float32


def denoise_group(
    executor: Executor, job: Job, latents: Floats, conditions: Conditions, table: Floats, noise: Floats
) -> Floats:
    """Denoise one group."""
    steps = job.timings.setdefault("steps", [])
    total = len(table) * len(job.groups)

    def on_step(new: int) -> None:
        if new or not steps:
            job.progress("denoise", len(steps), total)

    return denoise(
        executor,
        latents,
        conditions,
        table,
        noise=noise,
        plan=job.plan,
        deep=deep_steps(job.settings.deep_every, conditions.guided_steps),
        on_step_end=job.on_step_end,
        on_step=on_step,
        timings=job.timings,
        cancellation=job.cancellation,
    )


def decode_frames(
    executor: Executor, job: Job, latents: Floats, chunks: list[int], before: int
) -> Generator[Frames | list[Any]]:
    """Decode the latents of frames, ``[n, C, h, w]``, after ``before`` others."""
    done, total = before, sum(job.chunks)

    def on_frames(new: int) -> None:
        nonlocal done
        done += new
        if new or not done:
            job.progress("decode", done, total)

    size = (job.settings.height, job.settings.width)
    return decode(
        executor,
        latents,
        chunks=chunks,
        size=size,
        on_frames=on_frames,
        timings=job.timings,
        cancellation=job.cancellation,
        on_device=job.on_device,
    )


@contextmanager
def raising_reason(cancellation: Cancellation) -> Iterator[None]:
    """Turn the failure of a run that was cancelled into the reason why it was."""
    try:
        yield
    except BackendError:
        cancellation.check()
        raise


def chunks_of_groups(job: Job) -> list[list[int]]:
    """The decode chunks that can be decoded after each group.

    Chunks continue over the end of a video into the next, as in diffusers, so the last frames of a group may have to
    wait for the next group.
    """
    frames = job.latent_shape[1]
    found: list[list[int]] = [[] for _ in job.groups]
    done = index = 0
    for chunk in job.chunks:
        done += chunk
        while done > job.groups[index].stop * frames:
            index += 1
        found[index].append(chunk)
    return found


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
