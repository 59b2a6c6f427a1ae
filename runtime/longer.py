"""Videos of more frames than the model makes at once: parts, each of which continues the one before.

A part begins with the last frames of the one before, and its picture is the first of those. While it is denoised, their
latents are held at what is known, with the noise of the step added, so that the motion goes on. The same is done to the
known pixels of a picture in RePaint (arXiv:2201.09865) and to earlier frames in video diffusion models
(arXiv:2204.03458, section 3.1, "replacement").
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image

from svd_trt.engine.decode_chunks import chunk_sizes
from svd_trt.engine.spec import Range
from svd_trt.progress import ignore_progress
from svd_trt.runtime.decode import Frames
from svd_trt.runtime.denoise import Floats
from svd_trt.runtime.executor import Executor
from svd_trt.runtime.generation import Job, decode_frames, denoise_group, encode, raising_reason, schedule
from svd_trt.runtime.schedules import initial_std
from svd_trt.runtime.tracing import traced

__all__ = ["generate_longer", "parts_of"]

_OVERLAP = 3
"""Frames that a part repeats. One alone shows no motion to go on with; each more is one new frame less in a part."""


@dataclass(frozen=True)
class Part:
    """Some of the frames of a video.

    Attributes:
        known: frames at its beginning that are those of the part before.
        chunks: decode chunks of its new frames.
    """

    known: int
    chunks: list[int]

    @property
    def frames(self) -> int:
        """How many frames are new."""
        return sum(self.chunks)


def parts_of(frames: int, extend: int, chunk: int, span: Range) -> list[Part]:
    """The parts of a video of ``frames`` and ``extend`` more, each of ``frames`` with those that are known.

    Args:
        frames: of a part; at least 2.
        extend: frames after those of the first part.
        chunk: the most frames that are decoded together.
        span: how many the bundle decodes together.

    Raises:
        ArgumentError: the bundle cannot decode so few frames as a part has new ones.
    """
    known = _overlap(frames)
    parts = [Part(0, chunk_sizes(frames, chunk, span))]
    left = extend
    while left > 0:
        new = min(frames - known, left)
        parts.append(Part(known, chunk_sizes(new, min(chunk, new), span)))
        left -= new
    return parts


def generate_longer(executor: Executor, job: Job, picture: PIL.Image.Image) -> Generator[Frames | list[Any]]:
    """Generate one video of ``num_frames`` and ``extend`` more. Its memory is that of ``num_frames``.

    The first part has the frames that `generate` makes. Every part draws its noise after the one before.

    Yields:
        Chunks of frames, as `generate`.

    Raises:
        CancelledError: another thread cancelled it.
        BackendError: the device failed, or denoising ended in values that are not finite.
    """
    settings, manifest = job.settings, executor.bundle.manifest
    frames, sigmas = settings.num_frames, np.asarray(settings.sigmas, np.float32)
    parts = parts_of(frames, settings.extend, settings.decode_chunk_size, manifest.ranges.chunk)
    latents = np.empty(job.latent_shape, np.float32)  # of the part before
    last: deque[Frames] = deque(maxlen=_overlap(frames))  # frames; a short part makes only some
    encoding, done = job, 0
    with (
        raising_reason(job.cancellation),
        executor.stopping(job.cancellation),
        executor.running(job.request, job.plan, job.latent_shape),
    ):
        for part in parts:
            # 1. Encode the picture, which is the first of the frames that are known, and draw the noise.
            if part.known:
                picture = PIL.Image.fromarray(last[0])
            with traced("encode"):
                conditions = encode(executor, encoding, [picture])
            table, start, step_noise = schedule(manifest, job)
            encoding = replace(job, progress=ignore_progress)  # one picture was given, and it is encoded

            # 2. Denoise, with the frames that are known held.
            noise = start[:, : part.known] / initial_std(manifest.sampler, sigmas)
            hold = _holding(latents[:, frames - part.known :], noise, sigmas) if part.known else None
            if hold is not None:
                start = hold(-1, 0.0, start)
            with traced("denoise"):
                latents = denoise_group(executor, replace(job, on_step_end=hold), start, conditions, table, step_noise)

            # 3. Decode the new frames. The last ones are copied before the caller has them and may write to them.
            left = part.frames
            for chunk in decode_frames(executor, job, latents[0, part.known :][: part.frames], part.chunks, done):
                left -= len(chunk)
                last.extend(np.array(frame) for frame in chunk[max(0, len(chunk) + left - _OVERLAP) :])
                done += len(chunk)
                yield chunk


def _overlap(frames: int) -> int:
    return min(_OVERLAP, frames - 1)


def _holding(known: Floats, noise: Floats, sigmas: Floats) -> Callable[[int, float, Floats], Floats]:
    """Make what replaces the first latents after a step by ``known`` with the noise of the next step.

    Args:
        known: latents of the frames, ``[1, k, C, h, w]``.
        noise: of unit variance, of that shape.
        sigmas: of all steps, ``[S + 1]``.
    """

    def hold(step: int, _timestep: float, latents: Floats) -> Floats:
        held = latents.copy()
        held[:, : known.shape[1]] = known + sigmas[step + 1] * noise
        return held

    return hold
