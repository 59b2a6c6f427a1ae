"""Stage 2: the image encoder. It learns the position, heading and colour of the rocket.

CLIP learned from captions. Here, a linear layer on the embedding (the probe) predicts the parameters of the scene.
After training, the encoder is frozen and the probe is discarded.
"""

from __future__ import annotations

import colorsys
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import world
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
    _resize_with_antialiasing,
)
from loop import Log, autocast, learning_rate, load_state, save_state, share_cores
from model import CLIP_SIZE, EMBED_DIM, SIZE, make_image_encoder, make_image_processor
from transformers import CLIPVisionModelWithProjection

STEPS = 900
PICTURES = 64
PEAK_RATE = 1e-3


def preprocess(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures `[B,3,H,W]` in [-1,1] as input of CLIP, like StableVideoDiffusionPipeline does it but faster."""
    processor = make_image_processor()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (processor.image_mean, processor.image_std))
    resized = resize_matrix(pictures.shape[-2]) @ pictures @ resize_matrix(pictures.shape[-1]).T
    return ((resized + 1) / 2 - mean) / std


@lru_cache
def resize_matrix(length: int) -> torch.Tensor:
    """The pipeline's blur and bicubic resize of one axis as a matrix `[224,length]`, from resizing the identity."""
    identity = torch.eye(length)[None, None]  # the resize is linear, so each column gives one column of the matrix
    matrix: torch.Tensor = _resize_with_antialiasing(identity, (CLIP_SIZE, length))[0, 0]
    return matrix


def describe(scene: world.Scene) -> list[float]:
    """The values that the probe predicts from the embedding, each about in [-1,1]."""
    hue = 2 * np.pi * colorsys.rgb_to_hsv(*scene.trim)[0]
    place = [2 * x - 1 for x in scene.start]
    # The heading counts twice because the flight depends on it.
    return [*scene.direction, *scene.direction, *place, float(np.cos(hue)), float(np.sin(hue))]


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng([2, step])
    scenes = [world.make_scene(int(seed)) for seed in rng.integers(world.HELD_OUT_START, size=PICTURES)]
    frames = rng.integers(0, 8, size=PICTURES)
    pictures = np.concatenate([world.draw_frames(s, [f], SIZE, SIZE) for s, f in zip(scenes, frames, strict=True)])
    truths = np.array([describe(s) for s in scenes], np.float32)
    moved = np.array([np.multiply(s.direction, s.displacement * f) for s, f in zip(scenes, frames, strict=True)])
    truths[:, 4:6] += 2 * moved
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1, torch.from_numpy(truths)


def train(runs: Path, steps: int = STEPS) -> CLIPVisionModelWithProjection:
    """Trains the image encoder, or resumes its training, and returns it."""
    torch.manual_seed(2)
    encoder = make_image_encoder()
    probe = torch.nn.Linear(EMBED_DIM, len(describe(world.make_scene(0))))
    weights = [*encoder.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=1e-3)
    first = load_state(runs / "clip.pt", encoder=encoder, probe=probe, optimizer=optimizer)
    log = Log(runs / "clip.csv", steps, "image encoder")
    for step in range(first, steps):
        share_cores()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, PEAK_RATE)
        pictures, truths = batch(step)
        with autocast():
            embeds = encoder(preprocess(pictures)).image_embeds
        predicted = probe(embeds.float())
        # A small penalty on large values keeps the embedding in a range that suits the denoiser and float16.
        loss = (predicted - truths).square().mean() + 1e-3 * embeds.float().square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        angle = torch.atan2(predicted[:, 1], predicted[:, 0]) - torch.atan2(truths[:, 1], truths[:, 0])
        error = torch.rad2deg(torch.atan2(angle.sin(), angle.cos()).abs()).median().item()
        size = embeds.float().std().item()
        log(step, {"loss": loss.item(), "heading_error": error, "embed_std": size})
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save_state(runs / "clip.pt", step + 1, encoder=encoder, probe=probe, optimizer=optimizer)
    return encoder.eval()
