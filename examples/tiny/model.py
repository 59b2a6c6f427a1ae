"""The miniature: classes of diffusers and transformers with the structure and settings of SVD, but small.

The latents are 8 x 8 x 4 for a 32 x 32 picture; a clip has 8 frames. The numbers of channels are multiples of 32
because every GroupNorm has 32 groups, and at least 64 because a norm over a single channel removes the mean of the
picture.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

SIZE = 32  # side of the pictures in training
NUM_FRAMES = 8
EMBED_DIM = 32
CLIP_SIZE = 224  # fixed by the pipeline


def make_vae() -> AutoencoderKLTemporalDecoder:
    return AutoencoderKLTemporalDecoder(
        block_out_channels=(64, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        sample_size=SIZE,
        scaling_factor=1.0,  # measured and set after training
        force_upcast=True,
    )


def make_unet() -> UNetSpatioTemporalConditionModel:
    return UNetSpatioTemporalConditionModel(
        sample_size=SIZE // 4,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",) * 2 + ("DownBlockSpatioTemporal",),
        up_block_types=("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 2,
        block_out_channels=(64, 64, 64),
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        layers_per_block=1,
        cross_attention_dim=EMBED_DIM,
        num_attention_heads=(2, 2, 2),
        num_frames=NUM_FRAMES,
    )


def make_image_encoder() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=256,
            projection_dim=EMBED_DIM,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=CLIP_SIZE,
            patch_size=32,
            hidden_act="gelu",
        )
    )


def make_scheduler() -> EulerDiscreteScheduler:
    """The scheduler with the values of stabilityai/stable-video-diffusion-img2vid."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        interpolation_type="linear",
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )


def make_image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": CLIP_SIZE}, crop_size={"height": CLIP_SIZE, "width": CLIP_SIZE})


def make_pipeline(seed: int | None = None) -> StableVideoDiffusionPipeline:
    """An untrained pipeline. A seed makes its weights reproducible, as the baseline "random weights" needs."""
    if seed is not None:
        torch.manual_seed(seed)
    return StableVideoDiffusionPipeline(
        vae=make_vae().eval(),
        image_encoder=make_image_encoder().eval(),
        unet=make_unet().eval(),
        scheduler=make_scheduler(),
        feature_extractor=make_image_processor(),
    )


def save_pipeline(pipeline: StableVideoDiffusionPipeline, directory: Path) -> None:
    """Writes fp16 safetensors next to `directory` and then renames, so that readers never see half a checkpoint.

    The folder beside it is this process's own: two runs do not remove each other's files.
    """
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as own:
        _save_pipeline(pipeline, directory, Path(own, "new"), Path(own, "old"))


def _save_pipeline(pipeline: StableVideoDiffusionPipeline, directory: Path, fresh: Path, old: Path) -> None:
    pipeline.to(torch.float16).save_pretrained(fresh, safe_serialization=True)
    pipeline.to(torch.float32)
    # A plain from_pretrained keeps the stored type in transformers and gives float32 in diffusers, so this is float32.
    pipeline.image_encoder.save_pretrained(fresh / "image_encoder", safe_serialization=True)
    # Without torchvision, transformers writes a class name that its older versions lack. All versions have the other.
    # `_name_or_path` has paths of the machine that trained the model.
    for config in fresh.rglob("*.json"):
        values = json.loads(config.read_text().replace("CLIPImageProcessorPil", "CLIPImageProcessor"))
        values.pop("_name_or_path", None)
        config.write_text(json.dumps(values, indent=2) + "\n")
    for weights in fresh.rglob("*.safetensors"):
        weights.chmod(0o644)
    if directory.exists():
        directory.rename(old)
    try:
        fresh.rename(directory)
    except BaseException:
        if old.exists():
            old.rename(directory)
        raise
