"""Configurations of Stable Video Diffusion at several sizes: the published ones, and small ones to try things with.

A preset is only numbers. `configurations` turns it into the configuration files of a checkpoint: one dictionary for
each component, with the keys of diffusers and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from svd_trt.errors import ArgumentError

__all__ = ["PRESETS", "SCHEDULER", "WEIGHTS_REVISION", "Preset", "configurations", "find_preset"]

WEIGHTS_REVISION = 1
"""Part of the seed: increase it when the same preset and seed would give other weights."""


@dataclass(frozen=True)
class Preset:
    """Sizes of a model; everything else is as published."""

    summary: str
    parameters: Mapping[str, int]
    """Number of weights of each component, known without creating one; what a build needs is estimated from it."""
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
    clip_activation: str
    addition_time_embed_dim: int
    num_frames: int
    sample_size: int


def _published(summary: str, num_frames: int) -> Preset:
    """The architecture that stabilityai published; SVD and SVD-XT differ only in the number of frames."""
    return Preset(
        summary=summary,
        parameters={"image_encoder": 632_076_800, "vae": 97_742_847, "unet": 1_524_623_082},
        unet_channels=(320, 640, 1280, 1280),
        unet_heads=(5, 10, 20, 20),
        layers_per_block=2,
        vae_channels=(128, 256, 512, 512),
        vae_layers_per_block=2,
        embed_dim=1024,
        clip_layers=32,
        clip_heads=16,
        clip_patch=14,
        clip_intermediate=5120,
        clip_hidden=1280,
        clip_activation="gelu",
        addition_time_embed_dim=256,
        num_frames=num_frames,
        sample_size=96,
    )


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        summary="3.1 M parameters, a minute to build",
        parameters={"image_encoder": 118_176, "vae": 405_946, "unet": 2_567_190},
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
        clip_activation="quick_gelu",
        addition_time_embed_dim=32,
        num_frames=14,
        sample_size=16,
    ),
    "mid": Preset(
        summary="a fifth of SVD's width, for timing on a CPU: 8 frames of 256x256 in seconds",
        parameters={"image_encoder": 5_021_696, "vae": 6_138_975, "unet": 61_818_858},
        unet_channels=(64, 128, 256, 256),
        unet_heads=(1, 2, 4, 4),
        layers_per_block=2,
        vae_channels=(32, 64, 128, 128),
        vae_layers_per_block=2,
        embed_dim=256,
        clip_layers=6,
        clip_heads=4,
        clip_patch=14,
        clip_intermediate=1024,
        clip_hidden=256,
        clip_activation="gelu",
        addition_time_embed_dim=256,
        num_frames=8,
        sample_size=32,
    ),
    "svd": _published("SVD in full size, 14 frames: 2.25 G parameters", num_frames=14),
    "svd-xt": _published("SVD-XT in full size, 25 frames: 2.25 G parameters", num_frames=25),
}

# The scheduler configuration of both published SVD checkpoints.
SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
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


def find_preset(name: str) -> Preset:
    """The preset called ``name``.

    Raises:
        ArgumentError: there is no such preset; the message lists all.
    """
    if name not in PRESETS:
        raise ArgumentError(f"no preset is called {name!r}; choose one of: {', '.join(PRESETS)}")
    return PRESETS[name]


def configurations(p: Preset) -> dict[str, dict[str, Any]]:
    """``unet``, ``vae``, ``image_encoder``, ``feature_extractor`` and ``scheduler``, as in a checkpoint."""
    cross = len(p.unet_channels) - 1
    return {
        "unet": {
            "in_channels": 8,
            "out_channels": 4,
            "sample_size": p.sample_size,
            "block_out_channels": p.unet_channels,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal",) * cross + ("DownBlockSpatioTemporal",),
            "up_block_types": ("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * cross,
            "layers_per_block": p.layers_per_block,
            "cross_attention_dim": p.embed_dim,
            "num_attention_heads": p.unet_heads,
            "addition_time_embed_dim": p.addition_time_embed_dim,
            "projection_class_embeddings_input_dim": 3 * p.addition_time_embed_dim,
            "num_frames": p.num_frames,
        },
        "vae": {
            "latent_channels": 4,
            "block_out_channels": p.vae_channels,
            "down_block_types": ("DownEncoderBlock2D",) * len(p.vae_channels),
            "layers_per_block": p.vae_layers_per_block,
            "sample_size": p.sample_size * 2 ** (len(p.vae_channels) - 1),
        },
        "image_encoder": {
            "hidden_size": p.clip_hidden,
            "intermediate_size": p.clip_intermediate,
            "projection_dim": p.embed_dim,
            "num_hidden_layers": p.clip_layers,
            "num_attention_heads": p.clip_heads,
            "image_size": 224,
            "patch_size": p.clip_patch,
            "hidden_act": p.clip_activation,
        },
        "feature_extractor": {
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
        "scheduler": SCHEDULER,
    }
