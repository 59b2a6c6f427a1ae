"""What can be asked of a pipeline: names and defaults are diffusers', limits and help are written here once.

The command line makes its options from `Parameters`, the Python call its keyword arguments, and files their metadata.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from svd_trt.engine.manifest import Manifest
from svd_trt.engine.spec import LARGEST_STEPS, Range, chunk_choices
from svd_trt.errors import ArgumentError
from svd_trt.runtime.samplers import SAMPLERS, custom_sigmas

__all__ = ["ParameterArguments", "Parameters", "resolve"]


def _option(default: Any, help_text: str, low: float | None = None, high: float | None = None) -> Any:
    return field(default=default, metadata={"help": help_text, "min": low, "max": high})


@dataclass(frozen=True)
class Parameters:
    """Arguments of a generation. None stands for what the bundle, or chance, decides.

    Raises:
        ArgumentError: a value is not a number of its kind, or outside its limits.
    """

    num_frames: int | None = _option(None, "Frames to make.  [default: as the checkpoint was trained]", 1)
    num_inference_steps: int = _option(25, "Denoising steps.", 1, LARGEST_STEPS)
    sigmas: tuple[float, ...] | None = _option(
        None, "Noise levels to step through instead of the checkpoint's, such as 700,100,10,1,0."
    )
    min_guidance_scale: float = _option(1.0, "Guidance of the first frame.", -100, 100)
    max_guidance_scale: float = _option(
        3.0, "Guidance of the last frame; 1 or less for both turns guidance off.", -100, 100
    )
    fps: int = _option(7, "Frames a second: of the file, and a condition of the motion.", 1, 1000)
    motion_bucket_id: int = _option(127, "Amount of motion, 1 to 255 in training.", 0, 10000)
    noise_aug_strength: float = _option(0.02, "Noise on the picture; more moves away from it.", 0, 100)
    decode_chunk_size: int | None = _option(
        None,
        "Frames decoded together; fewer need less memory.  [default: all, or what bundle and memory take]",
        1,
    )
    num_videos_per_prompt: int = _option(1, "Videos to make of each picture.", 1, 1000)
    seed: int | None = _option(
        None, "Seed of the noise; gives what torch.manual_seed gives diffusers.  [default: random]", 0, 2**64 - 1
    )
    height: int | None = _option(None, "Frame height in pixels.  [default: the bundle's]", 8)
    width: int | None = _option(None, "Frame width in pixels.  [default: the bundle's]", 8)
    sampler: str = field(default="euler", metadata={"help": "How to step.", "choices": tuple(SAMPLERS)})

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if value is None and spec.default is None:
                continue
            if spec.name == "sigmas":
                sigmas = tuple(map(float, custom_sigmas(value)))
                object.__setattr__(self, "sigmas", sigmas)
                object.__setattr__(self, "num_inference_steps", len(sigmas) - 1)
            elif "choices" in spec.metadata:
                if value not in spec.metadata["choices"]:
                    raise ArgumentError(
                        f"{spec.name} must be one of {', '.join(spec.metadata['choices'])}, not {value!r}"
                    )
            else:
                kind = float if isinstance(spec.default, float) else int
                object.__setattr__(self, spec.name, _number(spec.name, value, kind, spec.metadata))

    @classmethod
    def fields(cls) -> Mapping[str, dataclasses.Field[Any]]:
        """Every parameter by name, with ``help``, ``min`` and ``max`` in its metadata."""
        return {spec.name: spec for spec in dataclasses.fields(cls)}

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


class ParameterArguments(TypedDict, total=False):
    """`Parameters` as keyword arguments."""

    num_frames: int | None
    num_inference_steps: int
    sigmas: Sequence[float] | None
    min_guidance_scale: float
    max_guidance_scale: float
    fps: int
    motion_bucket_id: int
    noise_aug_strength: float
    decode_chunk_size: int | None
    num_videos_per_prompt: int
    seed: int | None
    height: int | None
    width: int | None
    sampler: str


def resolve(parameters: Parameters, manifest: Manifest, *, pictures: int, seed: int) -> Parameters:
    """``parameters`` with every None decided, checked against the ranges that the bundle was built for.

    Raises:
        ArgumentError: outside one of them; the message names the range and the build option that sets it.
    """
    ranges = manifest.ranges
    num_frames = parameters.num_frames
    if num_frames is None:
        num_frames = min(max(manifest.model.num_frames, ranges.frames.min), ranges.frames.max)
    resolved = dataclasses.replace(
        parameters,
        num_frames=num_frames,
        decode_chunk_size=parameters.decode_chunk_size
        or _default_chunk(num_frames, pictures * parameters.num_videos_per_prompt, ranges.chunk),
        seed=seed if parameters.seed is None else parameters.seed,
        height=parameters.height or ranges.height.opt,
        width=parameters.width or ranges.width.opt,
    )
    _within("num_frames", resolved.num_frames, ranges.frames, "--frames")
    for name, size, span in (
        ("height", resolved.height, ranges.height),
        ("width", resolved.width, ranges.width),
    ):
        _within(name, size, span, f"--{name}")
        if size is not None and size % max(8, manifest.model.vae_scale_factor):
            raise ArgumentError(f"{name} {size} is not a multiple of {max(8, manifest.model.vae_scale_factor)}")
    return resolved


def _default_chunk(num_frames: int, videos: int, span: Range) -> int:
    """Diffusers' default, a whole video at once, or the most that the bundle takes without an impossible rest."""
    return next(chunk_choices(num_frames, videos, span), min(num_frames, span.max))


def _within(name: str, value: int | None, span: Range, option: str) -> None:
    if value not in span:
        raise ArgumentError(
            f"{name} {value} is outside what this bundle was built for ({span.words}); build one with another {option}"
        )


def _number(name: str, value: Any, kind: type, limits: Mapping[str, Any]) -> Any:
    low, high = limits["min"], limits["max"]
    try:
        number = kind(value)
        exact = number == value and math.isfinite(number)
    except (TypeError, ValueError, OverflowError):
        exact = False
    if not exact or isinstance(value, bool | str):
        raise ArgumentError(f"{name} must be {'a number' if kind is float else 'a whole number'}, not {value!r}")
    if (low is not None and number < low) or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"{low} to {high}"
        raise ArgumentError(f"{name} must be {bounds}, not {value}")
    return number
