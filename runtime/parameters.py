"""The arguments of a generation: names and defaults are those of diffusers; limits and help texts are only here.

The command line makes its options from `Parameters`, and the Python call its keyword arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from svd_trt.engine.host import ArgumentInfo, ArgumentKind
from svd_trt.engine.manifest import SamplerInfo
from svd_trt.engine.spec import LARGEST_STEPS, ModelInfo, Ranges
from svd_trt.errors import ArgumentError
from svd_trt.runtime.argument_values import choice_of, colour_of, number_of, seeds_of
from svd_trt.runtime.framing import RESIZE_MODES, ResizeMode
from svd_trt.runtime.guidance import (
    GUIDANCE_SHAPES,
    GuidanceShape,
    checked_interval,
)
from svd_trt.runtime.picture_colours import ICC, Icc
from svd_trt.runtime.quality_presets import QUALITIES
from svd_trt.runtime.samplers import SAMPLERS
from svd_trt.runtime.schedules import LCM_LEVELS, SCHEDULES, custom_sigmas, lcm_sigmas

__all__ = ["ParameterArguments", "Parameters", "describe_arguments"]


_DEFAULT_STEPS = 25

LARGEST_EXTEND = 100_000
"""Frames; an hour at 25 a second is 90,000."""


def _option(default: Any, help_text: str, low: float | None = None, high: float | None = None) -> Any:
    return field(default=default, metadata={"help": help_text, "min": low, "max": high})


def _presets() -> str:
    """What each preset of `QUALITIES` sets, for the help: ``fast takes 8 steps (ays, unic, guidance in 0,50)``."""
    return ", ".join(f"{name} takes {_preset(**preset)}" for name, preset in QUALITIES.items())


def _preset(
    schedule: str, num_inference_steps: int, sampler: str, guidance_interval: tuple[float, float] | None = None
) -> str:
    guided = (
        f", guided between noise levels {' and '.join(f'{n:g}' for n in guidance_interval)}"
        if guidance_interval
        else ""
    )
    return f"{num_inference_steps} steps ({schedule}, {sampler}{guided})"


@dataclass(frozen=True)
class Parameters:
    """Arguments of a generation as the caller gives them. None leaves the choice to the bundle, or the seed to chance.

    What ``quality`` sets takes the place of arguments that were not given.

    Raises:
        ArgumentError: a value is not a number of its kind, or outside its limits, or two contradict each other.
    """

    num_frames: int | None = _option(None, "Frames to make.  [default: as the checkpoint was trained]", 1)
    extend: int = _option(
        0, "Frames to make after --num-frames, in parts that each go on from the one before.", 0, LARGEST_EXTEND
    )
    num_inference_steps: int = _option(
        None, f"Denoising steps.  [default: {_DEFAULT_STEPS}, or those of --quality]", 1, LARGEST_STEPS
    )
    sigmas: tuple[float, ...] | None = field(
        default=None,
        metadata={
            "help": "Noise levels to step through instead of the checkpoint's, such as 700,100,10,1,0.",
            "numbers": "700,100,10,1,0",
            "min": None,
            "max": None,
        },
    )
    schedule: str | None = field(
        default=None,
        metadata={
            "help": "Noise levels by name; ays is Align Your Steps, for few steps.  [default: the checkpoint's]",
            "choices": tuple(SCHEDULES),
        },
    )
    min_guidance_scale: float = _option(1.0, "Guidance of the first frame.", -100, 100)
    max_guidance_scale: float = _option(
        3.0, "Guidance of the last frame; 1 or less for both turns guidance off.", -100, 100
    )
    guidance_shape: GuidanceShape = field(
        default="linear",
        metadata={
            "help": "Guidance over the frames: linear from --min-guidance-scale to --max-guidance-scale, constant at "
            "the latter, or triangular, with the latter in the middle and the former at both ends.",
            "choices": GUIDANCE_SHAPES,
        },
    )
    guidance_interval: tuple[float, float] | None = field(
        default=None,
        metadata={
            "help": "Guide only the steps from noise levels above the first number and up to the second, such as "
            "0,50; the others cost half.  [default: all steps]",
            "metavar": "LOW,HIGH",
            "numbers": "0,50",
            "min": None,
            "max": None,
        },
    )
    fps: int = _option(7, "Frames a second: of the file, and a condition of the motion.", 1, 1000)
    motion_bucket_id: int = _option(127, "Amount of motion, 1 to 255 in training.", 0, 10000)
    noise_aug_strength: float = _option(0.02, "Noise on the picture; more moves away from it.", 0, 100)
    decode_chunk_size: int | None = _option(
        None,
        "Frames decoded together; fewer need less memory.  [default: all, or what bundle and memory take]",
        1,
    )
    deep_every: int = _option(
        1,
        "Run the deep levels of the denoiser in every Nth step alone, and reuse what they gave in the others; for "
        "bundles with a shallow denoiser.",
        1,
        LARGEST_STEPS,
    )
    num_videos_per_prompt: int = _option(1, "Videos to make of each picture.", 1, 1000)
    seed: int | tuple[int, ...] | None = _option(
        None,
        "Seed of the noise; gives what torch.manual_seed gives diffusers.  [default: random; 1,2,3 for three videos]",
        0,
        2**64 - 1,
    )
    height: int | None = _option(None, "Frame height in pixels.  [default: the bundle's]", 8)
    width: int | None = _option(None, "Frame width in pixels.  [default: the bundle's]", 8)
    sampler: str | None = field(
        default=None,
        metadata={
            "help": "Update rule of a denoising step; lcm is for few-step UNets, in 1 to 8 steps with guidance 1 to "
            "1.5.  [default: the checkpoint's, normally euler]",
            "choices": tuple(SAMPLERS),
        },
    )
    quality: str | None = field(
        default=None,
        metadata={
            "help": f"Preset of other arguments: {_presets()}. Arguments given besides it win.",
            "choices": tuple(QUALITIES),
        },
    )
    resize_mode: ResizeMode | None = field(
        default=None,
        metadata={
            "help": "Fit a picture of another shape: stretch it, as diffusers does, crop it, or pad it with bars.  "
            "[default: stretch, and say so]",
            "choices": RESIZE_MODES,
        },
    )
    icc: Icc | None = field(
        default=None,
        metadata={
            "help": "Colour profile of a picture: ignore it, as diffusers does, or convert the colours to sRGB.  "
            "[default: ignore, and say so if it shows]",
            "choices": ICC,
        },
    )
    background: str | None = field(
        default=None,
        metadata={
            "help": "Colour to blend transparent pictures with, and of bars, such as white or #ff8000.  [default: "
            "transparency is dropped, as in diffusers; bars are black]",
            "metavar": "COLOUR",
        },
    )

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if value is None and spec.default is None:
                continue
            if spec.name == "sigmas":
                sigmas = tuple(map(float, custom_sigmas(value)))
                object.__setattr__(self, "sigmas", sigmas)
                object.__setattr__(self, "num_inference_steps", len(sigmas) - 1)
            elif spec.name == "guidance_interval":
                object.__setattr__(self, "guidance_interval", checked_interval(value))
            elif "choices" in spec.metadata:
                object.__setattr__(self, spec.name, choice_of(spec.name, value, spec.metadata["choices"]))
            elif spec.name == "seed":
                object.__setattr__(self, "seed", seeds_of(value, spec.metadata))
            elif spec.name == "background":
                colour_of(value)
            else:
                kind = float if isinstance(spec.default, float) else int
                object.__setattr__(self, spec.name, number_of(spec.name, value, kind, spec.metadata))
        if self.sigmas is not None and self.schedule is not None:
            raise ArgumentError("schedule and sigmas were both given; give one of them")
        preset = dict(QUALITIES[self.quality]) if self.quality else {}
        if self.sigmas is not None:
            preset.pop("schedule", None)
        for name, value in {"num_inference_steps": _DEFAULT_STEPS, **preset}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.sampler == "lcm" and self.num_inference_steps > LCM_LEVELS:
            lcm_sigmas(self.num_inference_steps)  # refuses it, also with other noise levels

    @classmethod
    def fields(cls) -> Mapping[str, dataclasses.Field[Any]]:
        """Every parameter by name, with ``help``, ``min`` and ``max`` in its metadata."""
        return {spec.name: spec for spec in dataclasses.fields(cls)}


class ParameterArguments(TypedDict, total=False):
    """`Parameters` as keyword arguments."""

    num_frames: int | None
    extend: int
    num_inference_steps: int
    sigmas: Sequence[float] | None
    schedule: str | None
    min_guidance_scale: float
    max_guidance_scale: float
    guidance_shape: GuidanceShape
    guidance_interval: Sequence[float] | None
    fps: int
    motion_bucket_id: int
    noise_aug_strength: float
    decode_chunk_size: int | None
    deep_every: int
    num_videos_per_prompt: int
    seed: int | Sequence[int] | None
    height: int | None
    width: int | None
    sampler: str | None
    quality: str | None
    resize_mode: ResizeMode | None
    icc: Icc | None
    background: str | None


def describe_arguments(
    model: ModelInfo, ranges: Ranges, sampler: SamplerInfo, *, shallow: bool
) -> dict[str, ArgumentInfo]:
    """The arguments of a generation with the defaults and limits of a bundle, ``shallow`` or not, for its manifest."""
    sizes = {"num_frames": ranges.frames, "height": ranges.height, "width": ranges.width}
    defaults = {
        "num_frames": ranges.frames.clamp(model.num_frames),
        "height": ranges.height.opt,
        "width": ranges.width.opt,
        "resize_mode": "stretch",
        "icc": "ignore",
        "sampler": sampler.solver,
        "num_inference_steps": _DEFAULT_STEPS,
    }
    described = {}
    for name, spec in Parameters.fields().items():
        low, high = spec.metadata.get("min"), spec.metadata.get("max")
        if name in sizes:
            low, high = sizes[name].min, sizes[name].max
        if name == "deep_every" and not shallow:
            high = 1
        default, help_text = defaults.get(name, spec.default), spec.metadata["help"]
        described[name] = ArgumentInfo(
            kind=_kind(spec),
            default=default,
            min=low,
            max=high,
            choices=tuple(spec.metadata.get("choices", ())),
            # The end of the text says what None stands for; a default of this bundle replaces it.
            help=help_text if default is None else help_text.partition("  [")[0],
        )
    return described


def _kind(spec: dataclasses.Field[Any]) -> ArgumentKind:
    if "numbers" in spec.metadata:
        return "numbers"
    if "choices" in spec.metadata:
        return "choice"
    if "metavar" in spec.metadata:
        return "text"
    return "number" if isinstance(spec.default, float) else "integer"
