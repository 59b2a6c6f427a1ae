"""One generation: encode the pictures, denoise, decode in chunks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import PIL.Image

from svd_trt.engine.spec import NetworkName
from svd_trt.errors import ArgumentError, BackendError
from svd_trt.runtime.denoise import Conditions, StepCallback, denoise
from svd_trt.runtime.device import Array, Session
from svd_trt.runtime.noise import TorchGenerator
from svd_trt.runtime.parameters import Parameters, chunk_sizes
from svd_trt.runtime.preprocess import clip_pixels, vae_image
from svd_trt.runtime.samplers import SAMPLERS, custom_sigmas, initial_std, karras_sigmas

if TYPE_CHECKING:
    from svd_trt.runtime.pipeline import VideoPipeline

__all__ = ["Frames", "Generation", "Progress"]

Frames: TypeAlias = npt.NDArray[np.uint8]
Progress: TypeAlias = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``; stage is ``encode`` (pictures), ``denoise`` (steps) or ``decode``
(frames)."""


@dataclass
class Generation:
    """One run of a pipeline: checked arguments, and the stages that turn them into frames.

    Attributes:
        pipe: the pipeline that runs it.
        parameters: resolved against the bundle.
        pictures: RGB.
        given_latents: noise to start from, or None for the seed's.
        progress: told of every step and chunk.
        timings: seconds by stage, as they come to be known.
    """

    pipe: VideoPipeline
    parameters: Parameters
    pictures: list[PIL.Image.Image]
    given_latents: npt.ArrayLike | None
    progress: Progress
    timings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        p, manifest = self.parameters, self.pipe.bundle.manifest
        assert p.num_frames is not None, "parameters are resolved"
        assert p.height is not None
        assert p.width is not None
        assert p.decode_chunk_size is not None
        self.frames, self.height, self.width = p.num_frames, p.height, p.width
        self.num_videos = len(self.pictures) * p.num_videos_per_prompt
        self.chunks = chunk_sizes(self.num_videos * self.frames, p.decode_chunk_size, manifest.ranges.chunk)
        self.groups = _groups(self.num_videos, manifest.ranges.batch.min, manifest.ranges.batch.max)
        factor = manifest.model.vae_scale_factor
        self.latent_size = (self.height // factor, self.width // factor)
        self.sigmas = custom_sigmas(p.sigmas) if p.sigmas else karras_sigmas(manifest.sampler, p.num_inference_steps)
        self.start = self._checked_latents()

    def denoise(self, callback: StepCallback | None) -> npt.NDArray[np.float32]:
        """Encode the pictures and run the loop: latents ``[B, F, 4, h, w]``."""
        noise = TorchGenerator(self.parameters.seed or 0)
        image_noise = noise.randn((len(self.pictures), 3, self.height, self.width))
        start = self.start if self.start is not None else self._draw_latents(noise)
        start = start * initial_std(self.pipe.bundle.manifest.sampler, self.sigmas)
        conditions = self._encode(image_noise)
        denoiser = self._session("denoiser")
        table = SAMPLERS[self.parameters.sampler](self.sigmas)
        steps: list[float] = self.timings.setdefault("steps", [])
        total = len(table) * len(self.groups)
        results: list[Array] = []

        def on_step(seconds: float) -> None:
            steps.append(seconds)
            self.progress("denoise", len(steps), total)

        with self._timed("denoise"):
            for group in self.groups:
                results.append(
                    denoise(
                        self.pipe,
                        denoiser,
                        np.ascontiguousarray(start[group], np.float32),
                        conditions.part(group),
                        table,
                        callback,
                        on_step,
                    )
                )
        result = np.concatenate(results)
        if not np.isfinite(result).all():
            raise BackendError(
                "denoising ended in values that are not finite: fp16 overflowed (build with --precision fp32), "
                "or a callback returned such latents"
            )
        return result

    def decode(self, latents: npt.NDArray[np.float32]) -> Iterator[Frames]:
        """Latents ``[B, F, 4, h, w]`` to chunks of frames ``[n, H, W, 3]``.

        Chunks run on over the end of a video into the next, as diffusers' do.
        """
        device, decoder = self.pipe.device, self._session("vae_decoder")
        flat = latents.reshape(-1, *latents.shape[2:])
        done = 0
        for size in self.chunks:
            with self._timed("decode"):
                source = device.upload(np.ascontiguousarray(flat[done : done + size]))
                frames = device.empty((size, self.height, self.width, 3), np.uint8)
                decoder.enqueue({"latents": source, "frames": frames})
                chunk = device.download(frames)
            done += size
            self.progress("decode", done, len(flat))
            yield chunk

    def _encode(self, image_noise: npt.NDArray[np.float32]) -> Conditions:
        """Run both encoders on every picture; conditions of every video."""
        model, p = self.pipe.bundle.manifest.model, self.parameters
        clip, vae = self._session("image_encoder"), self._session("vae_encoder")
        with self._timed("preprocess"):
            pixels = np.stack([clip_pixels(i, mean=model.image_mean, std=model.image_std) for i in self.pictures])
            images = np.stack([vae_image(i, self.height, self.width) for i in self.pictures])
            images += np.float32(p.noise_aug_strength) * image_noise
        count, repeats = len(self.pictures), p.num_videos_per_prompt
        together = self.pipe.bundle.manifest.ranges.pictures
        embeds, latents = [], []
        for group in _groups(count, together.min, together.max):
            with self._timed("image_encoder"):
                embeds.append(self._through(clip, "pixels", pixels[group], "image_embeds"))
            with self._timed("vae_encoder"):
                latents.append(self._through(vae, "image", images[group], "image_latents"))
            self.progress("encode", group.stop, count)
        return Conditions(
            image_embeds=np.concatenate(embeds).repeat(repeats, axis=0),
            image_latents=np.concatenate(latents).repeat(repeats, axis=0),
            added_time_ids=np.array([p.fps - 1, p.motion_bucket_id, p.noise_aug_strength], np.float32),
            guidance=np.linspace(p.min_guidance_scale, p.max_guidance_scale, self.frames, dtype=np.float32),
        )

    def _through(self, session: Session, source: str, array: Array, result: str) -> Array:
        """One input through a network with one output."""
        device = self.pipe.device
        sizes = {"pictures": len(array), "height": self.height, "width": self.width}
        output = device.empty(session.spec.tensor(result).resolve(sizes), np.float32)
        session.enqueue({source: device.upload(array), result: output})
        return device.download(output)

    def _draw_latents(self, noise: TorchGenerator) -> npt.NDArray[np.float32]:
        # An fp16 pipeline draws in half precision, which rounds and, for some lengths, orders the draws differently.
        precision = self.pipe.bundle.manifest.precision
        drawn = noise.randn(self._latent_shape(), np.float16 if precision == "fp16" else np.float32)
        return drawn.astype(np.float32)

    def _latent_shape(self) -> tuple[int, ...]:
        channels = self.pipe.bundle.manifest.model.latent_channels
        return (self.num_videos, self.frames, channels, *self.latent_size)

    def _checked_latents(self) -> npt.NDArray[np.float32] | None:
        if self.given_latents is None:
            return None
        try:
            latents = np.asarray(self.given_latents, np.float32)
        except (TypeError, ValueError):
            raise ArgumentError("latents must be an array of numbers") from None
        if latents.shape != self._latent_shape() or not np.isfinite(latents).all():
            raise ArgumentError(f"latents must be finite and of shape {self._latent_shape()}, not {latents.shape}")
        return latents

    def _session(self, network: NetworkName) -> Session:
        with self._timed("load"):
            return self.pipe.session(network)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - started


def _groups(count: int, smallest: int, largest: int) -> list[slice]:
    """Cut ``count`` videos into groups that the engine takes together."""
    groups = [slice(start, min(start + largest, count)) for start in range(0, count, largest)]
    last = groups[-1].stop - groups[-1].start
    if last < smallest:
        raise ArgumentError(
            f"{count} videos leave a group of {last}, and this bundle was built for at least {smallest} together; "
            "build one with another --batch"
        )
    return groups
