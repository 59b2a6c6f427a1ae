"""What a video is generated with: `Parameters`, with the bundle's defaults and limits, become `Settings`.

`Settings` also become the metadata of the video's file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from typing import Any

from svd_trt.engine.manifest import Manifest
from svd_trt.engine.memory import MemoryPlan, MemoryRequest
from svd_trt.engine.spec import Range
from svd_trt.errors import ArgumentError
from svd_trt.runtime.framing import ResizeMode
from svd_trt.runtime.guidance import GuidanceShape, guided_steps, largest_scale
from svd_trt.runtime.parameters import Parameters
from svd_trt.runtime.picture_colours import Icc
from svd_trt.runtime.schedules import SCHEDULES, checkpoint_sigmas, lcm_sigmas

__all__ = ["Settings", "guided_steps_of", "memory_request", "require_shallow", "resolve"]


@dataclass(frozen=True)
class Settings:
    """`Parameters` with everything decided: what a video is generated with.

    Attributes:
        sigmas: noise levels, ``[num_inference_steps + 1]``.
        schedule: its name; None if the noise levels are the caller's or the checkpoint's own.
        quality: name of the preset; what it sets is in the other fields.
        seed: of all videos, or one for each; None if the caller passed a generator that had drawn numbers before.
        custom_sigmas: whether the caller gave the noise levels; if not, they are those of the schedule.
    """

    num_frames: int
    extend: int
    num_inference_steps: int
    sigmas: tuple[float, ...]
    schedule: str | None
    min_guidance_scale: float
    max_guidance_scale: float
    guidance_shape: GuidanceShape
    guidance_interval: tuple[float, float] | None
    fps: int
    motion_bucket_id: int
    noise_aug_strength: float
    decode_chunk_size: int
    deep_every: int
    num_videos_per_prompt: int
    seed: int | tuple[int, ...] | None
    height: int
    width: int
    sampler: str
    quality: str | None
    resize_mode: ResizeMode
    icc: Icc
    background: str | None
    custom_sigmas: InitVar[bool]
    _custom_sigmas = False

    def __post_init__(self, custom_sigmas: bool) -> None:
        object.__setattr__(self, "_custom_sigmas", custom_sigmas)

    @property
    def total_frames(self) -> int:
        """Frames of a video: those of the first part, and the others."""
        return self.num_frames + self.extend

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON. With ``seed`` and these arguments the video can be generated again.

        ``sigmas`` is None if they are those of the schedule.
        """
        fields = dataclasses.asdict(self)
        fields["seed"] = list(self.seed) if isinstance(self.seed, tuple) else self.seed
        fields["sigmas"] = list(self.sigmas) if self._custom_sigmas else None
        fields["guidance_interval"] = None if self.guidance_interval is None else list(self.guidance_interval)
        return fields


def memory_request(parameters: Parameters, manifest: Manifest, pictures: int) -> MemoryRequest:
    """Make the request to the memory planner for ``pictures`` pictures, with the bundle's defaults for sizes.

    Raises:
        ArgumentError: a size is outside the range that the bundle was built for; the message names the build option.
            Or there are several seeds, and not one for each video. Or no step is in the interval of guidance. Or the
            bundle has no shallow denoiser.
    """
    ranges = manifest.ranges
    frames = parameters.num_frames or ranges.frames.clamp(manifest.model.num_frames)
    height, width = parameters.height or ranges.height.opt, parameters.width or ranges.width.opt
    _check_frames(frames, parameters.extend, ranges.frames)
    for name, size in (("height", height), ("width", width)):
        ranges.of(name).require(size, name, f"--{name}")
        multiple = manifest.host.symbols[name].multiple
        if size % multiple:
            raise ArgumentError(f"{name} {size} is not a multiple of {multiple}")
    require_shallow(manifest, parameters.deep_every)
    videos = pictures * parameters.num_videos_per_prompt
    if isinstance(parameters.seed, tuple) and len(parameters.seed) != videos:
        raise ArgumentError(
            f"{len(parameters.seed)} seeds were given for {videos} video{'' if videos == 1 else 's'}; "
            "give one for each video, or one for all"
        )
    guided = set(guided_steps_of(parameters, _sigmas(parameters, manifest)))
    return MemoryRequest(
        frames=frames,
        height=height,
        width=width,
        videos=videos,
        pictures=pictures,
        guided=True in guided,
        guided_in_part=len(guided) > 1,
        decode_chunk_size=parameters.decode_chunk_size,
        shallow_steps=parameters.deep_every > 1 and parameters.num_inference_steps > 1,
    )


def require_shallow(manifest: Manifest, deep_every: int) -> None:
    """Check that a bundle can leave out the deep levels in all but every ``deep_every``-th step.

    Raises:
        ArgumentError: it has no shallow denoiser; the message names the build option.
    """
    if deep_every > 1 and manifest.graph.deep_channels is None:
        raise ArgumentError(
            f"deep_every {deep_every} needs a shallow denoiser, and this bundle has none; "
            "build one with --shallow-steps, or leave deep_every out"
        )


def resolve(
    parameters: Parameters,
    manifest: Manifest,
    request: MemoryRequest,
    plan: MemoryPlan,
    seed: int | tuple[int, ...] | None,
) -> Settings:
    """Decide everything that ``parameters`` leaves open.

    Args:
        parameters: of the caller.
        manifest: its sampler gives the noise levels and the update rule.
        request: has the sizes.
        plan: has the decode chunk.
        seed: of the noise.
    """
    return Settings(
        num_frames=request.frames,
        extend=parameters.extend,
        num_inference_steps=parameters.num_inference_steps,
        sigmas=_sigmas(parameters, manifest),
        custom_sigmas=parameters.sigmas is not None,
        schedule=parameters.schedule,
        min_guidance_scale=parameters.min_guidance_scale,
        max_guidance_scale=parameters.max_guidance_scale,
        guidance_shape=parameters.guidance_shape,
        guidance_interval=parameters.guidance_interval,
        fps=parameters.fps,
        motion_bucket_id=parameters.motion_bucket_id,
        noise_aug_strength=parameters.noise_aug_strength,
        decode_chunk_size=plan.decode_chunk_size,
        deep_every=parameters.deep_every,
        num_videos_per_prompt=parameters.num_videos_per_prompt,
        seed=seed,
        height=request.height,
        width=request.width,
        sampler=parameters.sampler or manifest.sampler.solver,
        quality=parameters.quality,
        resize_mode=parameters.resize_mode or "stretch",
        icc=parameters.icc or "ignore",
        background=parameters.background,
    )


def guided_steps_of(given: Parameters | Settings, sigmas: Sequence[float]) -> tuple[bool, ...]:
    """Whether each step of ``sigmas``, ``[S + 1]``, has guidance; see `svd_trt.runtime.guidance.guided_steps`."""
    largest = largest_scale(given.guidance_shape, given.min_guidance_scale, given.max_guidance_scale)
    return guided_steps(sigmas, largest, given.guidance_interval)


def _check_frames(frames: int, extend: int, span: Range) -> None:
    if frames > span.max > 1:
        raise ArgumentError(
            f"num_frames {frames} is outside what this bundle was built for ({span.words}); build one with another "
            f"--frames, or go on after {span.max} frames with extend={frames - span.max} (--extend)"
        )
    span.require(frames, "num_frames", "--frames")
    if extend and frames < 2:
        raise ArgumentError("extend goes on from the motion of several frames; num_frames must be at least 2")


def _sigmas(parameters: Parameters, manifest: Manifest) -> tuple[float, ...]:
    if parameters.sigmas is not None:
        return parameters.sigmas
    steps, sampler = parameters.num_inference_steps, parameters.sampler or manifest.sampler.solver
    if parameters.schedule is not None:
        levels = SCHEDULES[parameters.schedule](manifest.sampler, steps)
    else:
        levels = lcm_sigmas(steps) if sampler == "lcm" else checkpoint_sigmas(manifest.sampler, steps)
    return tuple(map(float, levels))
