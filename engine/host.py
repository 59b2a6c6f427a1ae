"""What a host must know beside the tensors of the networks, as data that the manifest holds.

A host is any program that makes videos with a bundle: this project's runtimes in Python and C++, or another one.
``docs/bundle.md`` explains each field, and has the loop that uses them.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

from svd_trt.engine.spec import COEFFICIENTS, SYMBOLS, Axis, ModelInfo, Symbol

__all__ = [
    "ArgumentInfo",
    "ArgumentKind",
    "BranchInfo",
    "ConditionInfo",
    "DrawInfo",
    "GuidanceInfo",
    "HostInfo",
    "NoiseInfo",
    "PictureInfo",
    "SymbolInfo",
    "describe_host",
    "size_multiple",
]

ArgumentKind: TypeAlias = Literal["integer", "number", "numbers", "choice", "text"]
InitialScale: TypeAlias = Literal["sigma", "sqrt(sigma^2 + 1)"]


class SymbolInfo(msgspec.Struct, frozen=True):
    """A symbol of the tensors' shapes; its range is in ``ranges`` and in each network's ``spec.ranges``."""

    meaning: str
    multiple: int
    """Every value must be a multiple of this."""


class ConditionInfo(msgspec.Struct, frozen=True):
    """One value of the denoiser's ``added_time_ids``: that of a generation argument, plus a constant."""

    argument: str
    add: float


class DrawInfo(msgspec.Struct, frozen=True):
    """One draw of normal noise; draws of one generation continue one stream."""

    name: str
    shape: tuple[Axis, ...]
    dtype: Literal["float32", "float16"]


class NoiseInfo(msgspec.Struct, frozen=True):
    """How the noise of a seed comes about."""

    generator: str
    draws: tuple[DrawInfo, ...]
    """In this order."""
    initial_scale: InitialScale
    """Factor of the drawn latents; ``sigma`` in it is the first noise level."""


class BranchInfo(msgspec.Struct, frozen=True):
    """One guidance branch. Its weight in a frame is ``constant + factor * scale``, with the frame's guidance scale."""

    name: str
    conditioned: bool
    """False: its ``image_latents`` and ``image_embeds`` are zeros."""
    constant: float
    factor: float


class GuidanceInfo(msgspec.Struct, frozen=True):
    """Classifier-free guidance. By default scales go linearly from ``first_frame`` to ``last_frame``, two arguments."""

    first_frame: str
    last_frame: str
    branches: tuple[BranchInfo, ...]
    """In the order of the axis ``branches``, and of passes if one pass takes fewer branches."""
    off_up_to: float
    """If no scale is larger, only conditioned branches run, with weight 1; so it is outside ``guidance_interval``."""


class PictureInfo(msgspec.Struct, frozen=True):
    """How the picture becomes two tensors. The names are those of the algorithms in ``docs/bundle.md``."""

    pixels: str
    """Of the image encoder's input, normalised with ``model.image_mean`` and ``model.image_std``."""
    image: str
    """Of the VAE encoder's input, before noise is added."""
    image_noise: str
    """The argument that is the factor of the noise added to ``image``."""


class ArgumentInfo(msgspec.Struct, frozen=True):
    """One argument of a generation."""

    kind: ArgumentKind
    default: Any
    """None: the host decides, as ``help`` says."""
    min: int | float | None
    max: int | float | None
    choices: tuple[str, ...]
    help: str


class HostInfo(msgspec.Struct, frozen=True):
    """Everything about a generation that the tensors do not say."""

    symbols: dict[str, SymbolInfo]
    coefficients: tuple[str, ...]
    """Names of the values of the denoiser's ``coefficients``, in order."""
    conditions: tuple[ConditionInfo, ...]
    """Values of ``added_time_ids``, in order."""
    noise: NoiseInfo
    guidance: GuidanceInfo
    picture: PictureInfo
    arguments: dict[str, ArgumentInfo]


def size_multiple(model: ModelInfo, *, shallow: bool) -> int:
    """The number that heights and widths are multiples of, in a bundle with a shallow denoiser or without one."""
    return max(8, model.vae_scale_factor * (2 if shallow else 1))


def describe_host(
    model: ModelInfo, *, half: bool, adds_one: bool, shallow: bool = False, arguments: dict[str, ArgumentInfo]
) -> HostInfo:
    """What a host must know about a bundle of ``model``.

    Args:
        model: facts about the checkpoint.
        half: the networks are in half precision, and so are the draws of latents in diffusers' pipeline.
        adds_one: the latents start with a standard deviation of sqrt(sigma^2 + 1), as Karras et al. 2022 have it for
            noise added to data, and not sigma.
        shallow: there is a shallow denoiser. It takes features of half the latents' size, which must be even then.
        arguments: of a generation, with defaults and limits of this bundle.
    """
    sides = {"height", "width"}
    pixels = size_multiple(model, shallow=shallow)
    height, width = Symbol("height"), Symbol("width")
    small = (Symbol("height", model.vae_scale_factor), Symbol("width", model.vae_scale_factor))
    return HostInfo(
        symbols={s: SymbolInfo(meaning, pixels if s in sides else 1) for s, meaning in SYMBOLS.items()},
        coefficients=COEFFICIENTS,
        conditions=(
            ConditionInfo("fps", -1),
            ConditionInfo("motion_bucket_id", 0),
            ConditionInfo("noise_aug_strength", 0),
        ),
        noise=NoiseInfo(
            generator="torch-cpu-mt19937",
            draws=(
                DrawInfo("image_noise", (Symbol("pictures"), 3, height, width), "float32"),
                DrawInfo(
                    "latents",
                    (Symbol("batch"), Symbol("frames"), model.latent_channels, *small),
                    "float16" if half else "float32",
                ),
            ),
            initial_scale="sqrt(sigma^2 + 1)" if adds_one else "sigma",
        ),
        guidance=GuidanceInfo(
            first_frame="min_guidance_scale",
            last_frame="max_guidance_scale",
            branches=(
                BranchInfo("unconditional", conditioned=False, constant=1, factor=-1),
                BranchInfo("conditional", conditioned=True, constant=0, factor=1),
            ),
            off_up_to=1,
        ),
        picture=PictureInfo(
            pixels="blur-bicubic-aligned", image="lanczos3-across-first", image_noise="noise_aug_strength"
        ),
        arguments=arguments,
    )
