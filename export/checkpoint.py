"""What a Stable Video Diffusion checkpoint is to the export, wherever it comes from; checked before it is loaded.

`open_checkpoint` tells the kinds apart: a folder or hub id in diffusers format (`folder.py`), Stability's single
file (`single_file.py`), and random weights (``random:svd-xt``).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from svd_trt.engine.manifest import SamplerInfo, SourceInfo
from svd_trt.engine.spec import ModelInfo, NetworkName
from svd_trt.errors import CheckpointError

__all__ = ["COMPONENT_OF", "Checkpoint", "Component", "Description", "describe", "open_checkpoint"]

Component: TypeAlias = Literal["image_encoder", "unet", "vae"]

COMPONENT_OF: dict[NetworkName, Component] = {
    "image_encoder": "image_encoder",
    "vae_encoder": "vae",
    "denoiser": "unet",
    "vae_decoder": "vae",
}
"""The component of the checkpoint that each network is made of."""

RANDOM = "random:"

# The only noise schedule that SVD was published with, and what the runtime's tables reproduce.
_SCHEDULER: dict[str, object] = {
    "prediction_type": "v_prediction",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
    "final_sigmas_type": "zero",
}


@dataclass(frozen=True)
class Description:
    """What the configuration of a checkpoint says of it."""

    model: ModelInfo
    sampler: SamplerInfo
    upsamplers: int
    """Times that the UNet halves its input; fixes the least size of a symbolic latent."""


@dataclass(frozen=True)
class Checkpoint(abc.ABC):
    """A checked checkpoint; nothing of it is in memory but its configuration."""

    description: Description
    source: SourceInfo
    parameters: Mapping[Component, int]
    """Weights of each component, counted without loading them; what a build needs is foreseen from it."""

    @property
    @abc.abstractmethod
    def configurations(self) -> Mapping[str, Mapping[str, Any]]:
        """Of ``unet``, ``vae``, ``image_encoder``, ``feature_extractor`` and ``scheduler``, as files hold them."""

    @abc.abstractmethod
    def check(self, component: Component) -> None:
        """Compare names and shapes of one component's weights with what SVD has, without loading them.

        Raises:
            CheckpointError: some are missing, or of another shape; the message names one of them.
        """

    @abc.abstractmethod
    def load(self, component: Component, dtype: Any) -> Any:
        """Load one model in ``dtype`` (a torch dtype).

        Raises:
            CheckpointError: weights are damaged, or are not those of this architecture.
        """


def open_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
    config: str | None = None,
) -> Checkpoint:
    """Find MODEL and check that it is a Stable Video Diffusion that svd-trt can build.

    Args:
        model: a directory in diffusers format; a hub id such as
            ``stabilityai/stable-video-diffusion-img2vid-xt``, downloaded to (or found in) the hub's cache; a single
            file such as ``svd_xt.safetensors``; or ``random:PRESET``, ``random:PRESET@SEED``.
        revision: branch, tag or commit of a hub id.
        variant: weights to use, such as ``fp16``; by default the plain ones, or the only ones there are.
        local_files_only: never download (as HF_HUB_OFFLINE=1).
        config: for a single file, a folder in diffusers format with its configurations; by default it is taken for
            the published architecture.

    Raises:
        CheckpointError: nothing there, not SVD, parts missing, or a scheduler that is not supported.
        ArgumentError: no such preset.
    """
    if model.startswith(RANDOM):
        _refuse(model, revision=revision, variant=variant, config=config)
        from svd_trt.export.random_source import open_random

        return open_random(model.removeprefix(RANDOM))
    path = Path(model).expanduser()
    if path.is_file():
        _refuse(model, revision=revision, variant=variant)
        from svd_trt.export.single_file import open_single_file

        return open_single_file(path, Path(config) if config else None)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"there is no file {model}")
    _refuse(model, config=config)
    from svd_trt.export.folder import find_folder, open_folder

    folder, commit = find_folder(model, revision, variant, local_files_only)
    return open_folder(folder, variant, name=folder.resolve().name if commit is None else model, commit=commit)


def _refuse(model: str, **options: str | None) -> None:
    """Options that belong to other kinds of checkpoint are mistakes, not to be passed over."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        kind = "a single file" if given[0] == "config" else "a folder or a hub id"
        raise CheckpointError(f"--{given[0]} belongs to {kind}, and {model} is none")


def describe(where: str, configurations: Mapping[str, Mapping[str, Any]]) -> Description:
    """Read the configurations of a checkpoint, component by component, and check that they are SVD's.

    Args:
        where: the checkpoint, for messages.
        configurations: of ``unet``, ``vae``, ``image_encoder``, ``feature_extractor`` and ``scheduler``.

    Raises:
        CheckpointError: a value is missing, or is not one that SVD has.
    """
    try:
        return Description(
            model=_model_info(where, configurations),
            sampler=_sampler_info(where, configurations["scheduler"]),
            upsamplers=len(configurations["unet"]["block_out_channels"]) - 1,
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}: a configuration is not SVD's: {error}") from error


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
            raise CheckpointError(f"{where}: {what} is {value} where SVD's layout has {right}")
    return info


def _sampler_info(where: str, config: Mapping[str, Any]) -> SamplerInfo:
    kind = config.get("_class_name")
    if kind != "EulerDiscreteScheduler":
        raise CheckpointError(f"{where}: the scheduler is {kind}; svd-trt supports EulerDiscreteScheduler")
    defaults: dict[str, object] = {"final_sigmas_type": "zero"}
    for key, right in _SCHEDULER.items():
        value = config.get(key, defaults.get(key))
        if value != right:
            raise CheckpointError(f"{where}: the scheduler's {key} is {value!r}; svd-trt supports {right!r}")
    low, high = config.get("sigma_min"), config.get("sigma_max")
    if not (isinstance(low, int | float) and isinstance(high, int | float) and 0 < low < high):
        raise CheckpointError(f"{where}: the scheduler needs 0 < sigma_min < sigma_max, and has {low} and {high}")
    spacing = config.get("timestep_spacing", "linspace")
    return SamplerInfo(sigma_min=float(low), sigma_max=float(high), rho=7.0, timestep_spacing=str(spacing))
