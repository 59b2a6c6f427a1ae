"""A Stable Video Diffusion checkpoint in diffusers format: found, checked, hashed, and loaded one model at a time."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from svd_trt.engine.manifest import SamplerInfo, SourceInfo, sha256_of
from svd_trt.engine.spec import ModelInfo, NetworkName
from svd_trt.errors import CheckpointError, first_line

__all__ = ["COMPONENT_OF", "Checkpoint", "Component", "open_checkpoint"]

Component: TypeAlias = Literal["image_encoder", "unet", "vae"]

COMPONENT_OF: dict[NetworkName, Component] = {
    "image_encoder": "image_encoder",
    "vae_encoder": "vae",
    "denoiser": "unet",
    "vae_decoder": "vae",
}
"""The component of the checkpoint that each network is made of."""

_PIPELINE = "StableVideoDiffusionPipeline"
_WEIGHTS: dict[Component, str] = {
    "image_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
# The only noise schedule that SVD was published with, and what the runtime's tables reproduce.
_SCHEDULER: dict[str, object] = {
    "prediction_type": "v_prediction",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
    "final_sigmas_type": "zero",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint; nothing of it is in memory but its configuration."""

    path: Path
    model: ModelInfo
    sampler: SamplerInfo
    source: SourceInfo
    upsamplers: int
    """Times that the UNet halves its input; fixes the least size of a symbolic latent."""

    def load(self, component: Component, dtype: Any) -> Any:
        """Load one model in ``dtype`` (a torch dtype).

        Raises:
            CheckpointError: weights are damaged, or are not those of this architecture.
        """
        from svd_trt.export.quiet import quiet

        try:
            with quiet():
                model, info = _model_classes()[component].from_pretrained(
                    self.path,
                    subfolder=component,
                    variant=self.source.variant,
                    local_files_only=True,
                    output_loading_info=True,
                    **({"dtype": dtype} if component == "image_encoder" else {"torch_dtype": dtype}),
                )
        except Exception as error:  # the libraries raise a dozen kinds for a damaged file
            raise CheckpointError(f"{self.path / component} cannot be loaded: {first_line(error)}") from error
        if missing := sorted(info["missing_keys"]):
            raise CheckpointError(
                f"{self.path / component} lacks {len(missing)} weights that SVD has, {missing[0]} among them"
            )
        return model


def open_checkpoint(
    model: str, *, revision: str | None = None, variant: str | None = None, local_files_only: bool = False
) -> Checkpoint:
    """Find MODEL and check that it is a Stable Video Diffusion that svd-trt can build.

    Args:
        model: a directory in diffusers format, or a hub id such as
            ``stabilityai/stable-video-diffusion-img2vid-xt``, downloaded to (or found in) the hub's cache.
        revision: branch, tag or commit of a hub id.
        variant: weights to use, such as ``fp16``; by default the plain ones, or the only ones there are.
        local_files_only: never download (as HF_HUB_OFFLINE=1).

    Raises:
        CheckpointError: nothing there, not SVD, parts missing, or a scheduler that is not supported.
    """
    path, commit = _find(model, revision, variant, local_files_only)
    _check_pipeline(path)
    name = path.resolve().name if commit is None else model
    variant = variant or _only_variant(path)
    unet = _config(path, "unet/config.json")
    info = _model_info(path, unet)
    digests: dict[str, str] = {component: _digest(path, component, variant) for component in _WEIGHTS}
    return Checkpoint(
        path=path,
        model=info,
        sampler=_sampler_info(path),
        source=SourceInfo(model=name, commit=commit, variant=variant, digests=digests),
        upsamplers=len(unet["block_out_channels"]) - 1,
    )


def _model_classes() -> dict[Component, Any]:
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
    from transformers import CLIPVisionModelWithProjection

    return {
        "image_encoder": CLIPVisionModelWithProjection,
        "unet": UNetSpatioTemporalConditionModel,
        "vae": AutoencoderKLTemporalDecoder,
    }


def _find(model: str, revision: str | None, variant: str | None, local_files_only: bool) -> tuple[Path, str | None]:
    """The checkpoint's directory, and its commit where it came from the hub."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path, None
    if path.is_file():
        raise CheckpointError(
            f"{model} is a single file; svd-trt takes a folder in diffusers format "
            "(StableVideoDiffusionPipeline.from_single_file(...).save_pretrained(FOLDER) makes one)"
        )
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"there is no checkpoint at {model}, and that is not a hub id such as owner/name either")
    return _download(model, revision, variant, local_files_only)


def _download(model: str, revision: str | None, variant: str | None, local_files_only: bool) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    infix = f".{variant}" if variant else ""
    # Without a variant both plain and variant weights match "*.safetensors"; the hub's fp16 ones are left out.
    skip = None if variant else ["*.fp16.safetensors"]
    wanted = ["model_index.json", "*/*.json"] + [f"{c}/{w}*{infix}*.safetensors" for c, w in _WEIGHTS.items()]
    try:
        found = snapshot_download(
            model, revision=revision, allow_patterns=wanted, ignore_patterns=skip, local_files_only=local_files_only
        )
    except GatedRepoError as error:
        raise CheckpointError(f"{model} is gated: accept its licence on the hub, then run `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{model} has no revision {revision!r}") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{model} is not a folder here, is not in the hub's cache, and could not be downloaded "
            "(offline, or the hub cannot be reached); give a folder, or connect and try again"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"there is no folder {model} here and no model of that name on the hub") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{model} could not be downloaded: {first_line(error)}") from error
    return Path(found), Path(found).name


def _config(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((path / name).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} lacks {name}, which a diffusers checkpoint of SVD has") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path / name} is not a configuration: it holds no JSON object")
    return content


def _check_pipeline(path: Path) -> None:
    if not (path / "model_index.json").exists():
        raise CheckpointError(f"{path} has no model_index.json, so it is not a checkpoint in diffusers format")
    kind = _config(path, "model_index.json").get("_class_name")
    if kind != _PIPELINE:
        raise CheckpointError(f"{path} holds a {kind}; svd-trt builds {_PIPELINE} only")


def _model_info(path: Path, unet: dict[str, Any]) -> ModelInfo:
    vae = _config(path, "vae/config.json")
    clip = _config(path, "image_encoder/config.json")
    pictures = _config(path, "feature_extractor/preprocessor_config.json")
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
    except KeyError as error:
        raise CheckpointError(f"{path}: a configuration lacks {error}, so this is not SVD as published") from error
    for what, (value, right) in expected.items():
        if value not in (right, [right] * len(unet["block_out_channels"])):
            raise CheckpointError(f"{path}: {what} is {value} where SVD's layout has {right}")
    return info


def _sampler_info(path: Path) -> SamplerInfo:
    config = _config(path, "scheduler/scheduler_config.json")
    kind = config.get("_class_name")
    if kind != "EulerDiscreteScheduler":
        raise CheckpointError(f"{path}: the scheduler is {kind}; svd-trt supports EulerDiscreteScheduler")
    defaults: dict[str, object] = {"final_sigmas_type": "zero"}
    for key, right in _SCHEDULER.items():
        value = config.get(key, defaults.get(key))
        if value != right:
            raise CheckpointError(f"{path}: the scheduler's {key} is {value!r}; svd-trt supports {right!r}")
    low, high = config.get("sigma_min"), config.get("sigma_max")
    if not (isinstance(low, int | float) and isinstance(high, int | float) and 0 < low < high):
        raise CheckpointError(f"{path}: the scheduler needs 0 < sigma_min < sigma_max, and has {low} and {high}")
    spacing = config.get("timestep_spacing", "linspace")
    return SamplerInfo(sigma_min=float(low), sigma_max=float(high), rho=7.0, timestep_spacing=str(spacing))


def _weight_files(path: Path, component: Component, variant: str | None) -> list[Path]:
    """Weight files of one component and variant, whole or in shards with their index."""
    stem = _WEIGHTS[component]
    tag = f".{variant}" if variant else ""
    shard = re.compile(rf"{stem}({re.escape(tag)})?-\d+-of-\d+({re.escape(tag)})?\.safetensors")
    whole = path / component / f"{stem}{tag}.safetensors"
    if whole.exists():
        return [whole]
    index = sorted((path / component).glob(f"{stem}.safetensors.index{tag}.json"))
    return index + sorted(p for p in (path / component).glob(f"{stem}*.safetensors") if shard.fullmatch(p.name))


def _only_variant(path: Path) -> str | None:
    """None where plain weights are there; else the variant, such as fp16, that all the components have."""
    if _weight_files(path, "unet", None):
        return None
    stem = _WEIGHTS["unet"]
    names = (p.name for p in (path / "unet").glob(f"{stem}.*.safetensors"))
    variants = {name.removeprefix(f"{stem}.").removesuffix(".safetensors") for name in names}
    return variants.pop() if len(variants) == 1 else None


def _digest(path: Path, component: Component, variant: str | None) -> str:
    files = _weight_files(path, component, variant)
    if not files:
        what = f"{variant} weights" if variant else "weights (safetensors)"
        others = sorted(p.name for p in (path / component).glob("*.*") if p.suffix in {".safetensors", ".bin"})
        hint = f"; there are {', '.join(others)} (see --variant)" if others else " (see --variant)"
        raise CheckpointError(f"{path / component} has no {what}{hint}")
    total = hashlib.sha256()
    for file in [path / component / "config.json", *files]:
        total.update(f"{file.name}\0{sha256_of(file)}\n".encode())
    return total.hexdigest()
