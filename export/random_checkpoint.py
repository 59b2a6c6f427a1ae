"""Checkpoints with random weights, in the real format, for trying the tool and for tests.

The licensed weights cannot be shipped. These have the same classes, files and configuration keys, only smaller,
so everything downstream of ``from_pretrained`` is exercised for real; the video they make is noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from svd_trt.errors import ArgumentError, OutputError
from svd_trt.export.quiet import quiet

__all__ = ["PRESETS", "RandomPreset", "random_pipeline", "write_random_checkpoint"]

# The scheduler configuration that both published SVD checkpoints carry.
_SCHEDULER: dict[str, Any] = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "sigma_max": 700.0,
    "sigma_min": 0.002,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "timestep_type": "continuous",
    "use_karras_sigmas": True,
}


@dataclass(frozen=True)
class RandomPreset:
    """Sizes of a random checkpoint: everything else is as published."""

    unet_channels: tuple[int, ...]
    unet_heads: tuple[int, ...]
    layers_per_block: int
    vae_channels: tuple[int, ...]
    vae_layers_per_block: int
    embed_dim: int
    clip_layers: int
    clip_heads: int
    clip_patch: int
    clip_intermediate: int
    clip_hidden: int
    addition_time_embed_dim: int
    num_frames: int
    sample_size: int


PRESETS: dict[str, RandomPreset] = {
    "tiny": RandomPreset(
        unet_channels=(32, 64, 64),
        unet_heads=(2, 4, 4),
        layers_per_block=1,
        vae_channels=(32, 32, 32, 32),
        vae_layers_per_block=1,
        embed_dim=32,
        clip_layers=2,
        clip_heads=2,
        clip_patch=32,
        clip_intermediate=64,
        clip_hidden=32,
        addition_time_embed_dim=32,
        num_frames=14,
        sample_size=16,
    ),
}


def random_pipeline(preset: str = "tiny", seed: int = 0) -> StableVideoDiffusionPipeline:
    """A diffusers pipeline whose weights are drawn from ``seed`` (fp32, on the CPU).

    Raises:
        ArgumentError: ``preset`` is not one of `PRESETS`.
    """
    if preset not in PRESETS:
        raise ArgumentError(f"no random preset is called {preset!r}; choose one of: {', '.join(PRESETS)}")
    p = PRESETS[preset]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StableVideoDiffusionPipeline(
            vae=_vae(p),
            image_encoder=_image_encoder(p),
            unet=_unet(p),
            scheduler=EulerDiscreteScheduler(**_SCHEDULER),
            feature_extractor=CLIPImageProcessor(),
        )


def write_random_checkpoint(
    directory: Path, preset: str = "tiny", seed: int = 0, *, variant: str | None = None
) -> None:
    """Write a random checkpoint in diffusers format; ``variant="fp16"`` stores half precision as the hub does.

    Raises:
        ArgumentError: ``preset`` is unknown.
        OutputError: ``directory`` exists and is not empty, or cannot be written.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise OutputError(f"{directory} exists and is not an empty folder; choose another place")
    try:
        with quiet():
            pipeline = random_pipeline(preset, seed)
            if variant == "fp16":
                pipeline = pipeline.to(dtype=torch.float16)
            pipeline.save_pretrained(directory, variant=variant)
    except OSError as error:
        raise OutputError(f"cannot write the checkpoint to {directory}: {error}") from error


def _unet(p: RandomPreset) -> UNetSpatioTemporalConditionModel:
    levels = len(p.unet_channels)
    unet = UNetSpatioTemporalConditionModel(
        sample_size=p.sample_size,
        block_out_channels=p.unet_channels,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",) * (levels - 1) + ("DownBlockSpatioTemporal",),
        up_block_types=("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * (levels - 1),
        layers_per_block=p.layers_per_block,
        cross_attention_dim=p.embed_dim,
        num_attention_heads=p.unet_heads,
        addition_time_embed_dim=p.addition_time_embed_dim,
        projection_class_embeddings_input_dim=3 * p.addition_time_embed_dim,
        num_frames=p.num_frames,
    )
    # Blend factors differ in a trained network; equal ones would hide a mix-up between them.
    for name, parameter in unet.named_parameters():
        if name.endswith("mix_factor"):
            torch.nn.init.normal_(parameter, std=1.0)
    return unet.eval()


def _vae(p: RandomPreset) -> AutoencoderKLTemporalDecoder:
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=p.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * len(p.vae_channels),
        layers_per_block=p.vae_layers_per_block,
        sample_size=p.sample_size * 2 ** (len(p.vae_channels) - 1),
    )
    return vae.eval()


def _image_encoder(p: RandomPreset) -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=p.clip_hidden,
        intermediate_size=p.clip_intermediate,
        projection_dim=p.embed_dim,
        num_hidden_layers=p.clip_layers,
        num_attention_heads=p.clip_heads,
        image_size=224,
        patch_size=p.clip_patch,
    )
    return CLIPVisionModelWithProjection(config).eval()
