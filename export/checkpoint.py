"""What a Stable Video Diffusion checkpoint is to the export, of whatever kind it is.

The kinds of checkpoints are in `svd_trt.export.checkpoint_kinds`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from svd_trt.engine.manifest import SamplerInfo, SourceInfo
from svd_trt.engine.spec import ModelInfo, NetworkName
from svd_trt.errors import CheckpointError
from svd_trt.export.scheduler import read_scheduler
from svd_trt.units import shorten

__all__ = ["COMPONENT_OF", "Checkpoint", "Component", "Description", "describe"]

Component: TypeAlias = Literal["image_encoder", "unet", "vae"]

COMPONENT_OF: dict[NetworkName, Component] = {
    "image_encoder": "image_encoder",
    "vae_encoder": "vae",
    "denoiser": "unet",
    "shallow_denoiser": "unet",
    "vae_decoder": "vae",
}
"""The component of the checkpoint that each network is made of."""


_DEPTHS = ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers")
_MOST_LAYERS = 100


class Description(msgspec.Struct, frozen=True):
    """The description of a checkpoint in its configuration files."""

    model: ModelInfo
    sampler: SamplerInfo
    upsamplers: int
    """Times that the UNet halves its input; fixes the least size of a symbolic latent."""
    deep_channels: int | None
    """Channels of the UNet's second level; None if it has one level alone."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint whose configuration was read and checked; its weights are not in memory.

    Plain data, so that the process that exports gets it as JSON.
    """

    description: Description
    source: SourceInfo
    parameters: dict[Component, int]
    """Number of weights of each component, counted without loading them; what a build needs is estimated from it."""
    configurations: dict[str, dict[str, Any]]
    """Of ``unet``, ``vae``, ``image_encoder``, ``feature_extractor`` and ``scheduler``, as the files have them."""

    def check(self, component: Component) -> None:
        """Compare names and shapes of one component's weights with those that SVD has, without loading them.

        Raises:
            CheckpointError: some are missing, or of another shape; the message names one of them.
        """
        raise NotImplementedError

    def load(self, component: Component, dtype: Any) -> Any:
        """The model of one component, with weights of ``dtype`` (a torch dtype).

        Raises:
            CheckpointError: weights are damaged, or are not those of this architecture.
        """
        raise NotImplementedError


def describe(where: str, configurations: Mapping[str, Mapping[str, Any]]) -> Description:
    """Read the configurations of a checkpoint, component by component, and check that they are SVD's.

    Args:
        where: the checkpoint, for messages.
        configurations: of ``unet``, ``vae``, ``image_encoder``, ``feature_extractor`` and ``scheduler``.

    Raises:
        CheckpointError: a value is missing, or is not one that SVD has.
    """
    _refuse_deep(where, configurations)
    try:
        return Description(
            model=_model_info(where, configurations),
            sampler=read_scheduler(where, configurations["scheduler"]),
            upsamplers=len(configurations["unet"]["block_out_channels"]) - 1,
            deep_channels=_deep_channels(configurations["unet"]["block_out_channels"]),
        )
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"{where}: a configuration is not SVD's: {error}") from error


def _deep_channels(channels: Sequence[Any]) -> int | None:
    if len(channels) < 2:
        return None
    if type(channels[1]) is not int or channels[1] < 1:
        raise ValueError(f"block_out_channels of the unet has {shorten(json.dumps(channels[1]))}")
    return channels[1]


def _refuse_deep(where: str, configurations: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse numbers of layers that no SVD has, and with which the libraries would work until memory runs out."""
    for component, settings in configurations.items():
        for name in _DEPTHS:
            value = settings.get(name)
            most = max((n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)), default=0)
            if most > _MOST_LAYERS:
                raise CheckpointError(f"{where}: {name} of the {component} is {most:,}, and SVD has a few; correct it")


def _model_info(where: str, configurations: Mapping[str, Mapping[str, Any]]) -> ModelInfo:
    unet, vae, clip = (configurations[name] for name in ("unet", "vae", "image_encoder"))
    pictures = configurations["feature_extractor"]
    try:
        info = ModelInfo(
            latent_channels=vae["latent_channels"],
            vae_scale_factor=2 ** (len(vae["block_out_channels"]) - 1),
            embed_dim=clip["projection_dim"],
            image_size=clip["image_size"],
            image_mean=tuple(pictures["image_mean"]),
            image_std=tuple(pictures["image_std"]),
            num_frames=unet["num_frames"],
            decoder_channels=vae["block_out_channels"][:2][-1],  # the last level's input, at its full size
        )
        expected = {
            "unet/config.json in_channels": (unet["in_channels"], 2 * info.latent_channels),
            "unet/config.json out_channels": (unet["out_channels"], info.latent_channels),
            "unet/config.json projection_class_embeddings_input_dim": (
                unet["projection_class_embeddings_input_dim"],
                3 * unet["addition_time_embed_dim"],
            ),
            "unet/config.json cross_attention_dim": (unet["cross_attention_dim"], info.embed_dim),
            "image_encoder/config.json image_size": (info.image_size, 224),
        }
        levels = len(unet["block_out_channels"])
    except KeyError as error:
        raise CheckpointError(f"{where}: a configuration lacks {error}, so this is not SVD as published") from error
    for what, (value, right) in expected.items():
        if value not in (right, [right] * levels):
            raise CheckpointError(f"{where}: {what} is {shorten(json.dumps(value))}, and SVD's layout has {right}")
    return info
