"""One generation: encode the pictures, denoise, decode in chunks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import PIL.Image

from svd_trt.engine.memory import MemoryPlan, MemoryRequest
from svd_trt.engine.spec import NetworkName, chunk_sizes
from svd_trt.errors import ArgumentError, BackendError
from svd_trt.runtime.decode import ChunkedDecode, Frames
from svd_trt.runtime.denoise import Conditions, Floats, Lease, StepCallback
from svd_trt.runtime.device import Array, download, settled, upload
from svd_trt.runtime.noise import TorchGenerator
from svd_trt.runtime.parameters import Parameters
from svd_trt.runtime.preprocess import clip_pixels, vae_image
from svd_trt.runtime.samplers import SAMPLERS, custom_sigmas, initial_std, karras_sigmas

if TYPE_CHECKING:
    from svd_trt.runtime.pipeline import VideoPipeline

__all__ = ["Frames", "Generation", "Progress"]

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
        plan: how memory is used.
        request: what the plan is for.
        timings: seconds by stage, as they come to be known. Stages overlap, so their sum may exceed the whole.
    """

    pipe: VideoPipeline
    parameters: Parameters
    pictures: list[PIL.Image.Image]
    given_latents: npt.ArrayLike | None
    progress: Progress
    plan: MemoryPlan
    request: MemoryRequest
    timings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        p, manifest = self.parameters, self.pipe.bundle.manifest
        assert p.num_frames is not None, "parameters are resolved"
        assert p.height is not None
        assert p.width is not None
        assert p.decode_chunk_size is not None
        self.frames, self.height, self.width = p.num_frames, p.height, p.width
        self.num_videos = self.request.videos
        self.chunks = chunk_sizes(self.num_videos * self.frames, p.decode_chunk_size, manifest.ranges.chunk)
        self.groups = _groups(self.num_videos, manifest.ranges.batch.min, manifest.ranges.batch.max)
        factor = manifest.model.vae_scale_factor
        self.latent_size = (self.height // factor, self.width // factor)
        self.sigmas = custom_sigmas(p.sigmas) if p.sigmas else karras_sigmas(manifest.sampler, p.num_inference_steps)
        self.start = self._checked_latents()

    def denoise(self, callback: StepCallback | None) -> Floats:
        """Encode the pictures and run the loop: latents ``[B, F, 4, h, w]``."""
        noise = TorchGenerator(self.parameters.seed or 0)
        image_noise = noise.randn((len(self.pictures), 3, self.height, self.width))
        start = self.start if self.start is not None else self._draw_latents(noise)
        start = start * initial_std(self.pipe.bundle.manifest.sampler, self.sigmas)
        conditions = self._encode(image_noise)
        table = SAMPLERS[self.parameters.sampler](self.sigmas)
        lease = self._loaded("denoiser")
        steps: list[float] = self.timings.setdefault("steps", [])
        total = len(table) * len(self.groups)

        def on_step(seconds: float) -> None:
            steps.append(seconds)
            self.progress("denoise", len(steps), total)

        results: list[Array] = []
        with self._timed("denoise"), self.pipe.denoising():
            for group in self.groups:
                latents = np.ascontiguousarray(start[group], np.float32)
                passes = conditions.part(group).passes(1 if self.plan.split_guidance else 2)
                loop = self.pipe.loop(passes, latents.shape, len(table))
                results.append(loop.run(self.pipe, lease, latents, passes, table, callback, on_step))
        result = np.concatenate(results)
        if not np.isfinite(result).all():
            raise BackendError(
                "denoising ended in values that are not finite: fp16 overflowed (build with --precision fp32), "
                "or a callback returned such latents"
            )
        return result

    def decode(self, latents: Floats) -> Iterator[Frames]:
        """Latents ``[B, F, 4, h, w]`` to chunks of frames ``[n, H, W, 3]``.

        Chunks run on over the end of a video into the next, as diffusers' do.
        """
        flat = latents.reshape(-1, *latents.shape[2:])
        self._loaded("vae_decoder")
        lease = partial(self.pipe.engines.lend, "vae_decoder")
        size = (self.height, self.width)
        done = 0
        with ChunkedDecode(self.pipe.device, lease, flat, self.chunks, size, self._count_decode) as chunks:
            self.pipe.watch(chunks)
            for chunk in chunks:
                done += len(chunk)
                self.progress("decode", done, len(flat))
                yield chunk

    def _count_decode(self, seconds: float) -> None:
        self.timings["decode"] = self.timings.get("decode", 0.0) + seconds

    def _encode(self, image_noise: Floats) -> Conditions:
        """Run both encoders on every picture; conditions of every video."""
        model, p = self.pipe.bundle.manifest.model, self.parameters
        with self._timed("preprocess"):
            pixels = np.stack([clip_pixels(i, mean=model.image_mean, std=model.image_std) for i in self.pictures])
            images = np.stack([vae_image(i, self.height, self.width) for i in self.pictures])
            images += np.float32(p.noise_aug_strength) * image_noise
        count, repeats = len(self.pictures), p.num_videos_per_prompt
        together = self.pipe.bundle.manifest.ranges.pictures
        embeds, latents = [], []
        for group in _groups(count, together.min, together.max):
            embeds.append(self._through("image_encoder", pixels[group]))
        for group in _groups(count, together.min, together.max):
            latents.append(self._through("vae_encoder", images[group]))
            self.progress("encode", group.stop, count)
        return Conditions(
            image_embeds=np.concatenate(embeds).repeat(repeats, axis=0),
            image_latents=np.concatenate(latents).repeat(repeats, axis=0),
            added_time_ids=np.array([p.fps - 1, p.motion_bucket_id, p.noise_aug_strength], np.float32),
            guidance=np.linspace(p.min_guidance_scale, p.max_guidance_scale, self.frames, dtype=np.float32),
        )

    def _through(self, network: NetworkName, array: Array) -> Array:
        """One input through a network with one output."""
        device, lease = self.pipe.device, self._loaded(network)
        spec = self.pipe.bundle.network(network).spec
        (source,), (result,) = spec.inputs, spec.outputs
        shape = result.resolve({"pictures": len(array), "height": self.height, "width": self.width})
        with (
            self._timed(network),
            upload(device, array, source.name) as given,
            device.empty(shape, np.float32, result.name) as output,
            settled(device),
        ):  # before the buffers are freed
            with lease() as session:
                session.enqueue({source.name: given, result.name: output})
            return download(device, output)

    def _draw_latents(self, noise: TorchGenerator) -> Floats:
        # An fp16 pipeline draws in half precision, which rounds and, for some lengths, orders the draws differently.
        precision = self.pipe.bundle.manifest.precision
        drawn = noise.randn(self.latent_shape, np.float16 if precision == "fp16" else np.float32)
        return drawn.astype(np.float32)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of all videos: ``[B, F, C, h, w]``."""
        channels = self.pipe.bundle.manifest.model.latent_channels
        return (self.num_videos, self.frames, channels, *self.latent_size)

    def _checked_latents(self) -> Floats | None:
        if self.given_latents is None:
            return None
        try:
            latents = np.asarray(self.given_latents, np.float32)
        except (TypeError, ValueError):
            raise ArgumentError("latents must be an array of numbers") from None
        if latents.shape != self.latent_shape or not np.isfinite(latents).all():
            raise ArgumentError(f"latents must be finite and of shape {self.latent_shape}, not {latents.shape}")
        return latents

    def _loaded(self, network: NetworkName) -> Lease:
        """Load ``network``, and what lends it."""
        with self._timed("load"):
            self.pipe.engines.load(network)
        return partial(self.pipe.engines.lend, network)

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
