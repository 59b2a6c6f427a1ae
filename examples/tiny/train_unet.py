"""Stages 3 and 4: encode many clips once, then train the denoiser on their latents.

The loss is that of SVD: EDM preconditioning (Karras et al. 2022, arXiv:2206.00364) with v-prediction, on log-normal
noise levels. A tenth of the clips are trained without the picture, for classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import world
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from loop import (
    Average,
    Log,
    autocast,
    flatten_temporal_convolutions,
    learning_rate,
    load_state,
    save_state,
    share_cores,
    speed_up_attention,
)
from model import NUM_FRAMES, SIZE, make_unet
from train_clip import preprocess
from transformers import CLIPVisionModelWithProjection

CLIPS = 12000
SHARD = 500
STEPS = 3900
BATCH = 16
PEAK_RATE = 1e-3
SIGMA_MEAN, SIGMA_STD = 1.0, 1.6  # of ln sigma, as in the last stage of SVD
DEFAULT_AUGMENTATION = 0.02
DROP = 0.1
DECAY = 0.999


@dataclass(frozen=True)
class Clips:
    """N encoded clips, each with F frames and K noised copies of the first picture."""

    latents: torch.Tensor  # [N,F,4,h,w], unit variance
    image_latents: torch.Tensor  # [N,K,4,h,w], unscaled, of the noised pictures
    augmentations: torch.Tensor  # [N,K], the strength of their noise
    embeds: torch.Tensor  # [N,1,D]
    conditions: torch.Tensor  # [N,2], fps - 1 and motion bucket


@torch.no_grad()
def encode_shard(vae: AutoencoderKLTemporalDecoder, encoder: CLIPVisionModelWithProjection, shard: int) -> Clips:
    """Encodes the `SHARD` clips from number `shard * SHARD`. A clip's number is its seed, below the held-out seeds."""
    torch.manual_seed(1000 + shard)
    parts: list[list[torch.Tensor]] = []
    for seed in range(shard * SHARD, (shard + 1) * SHARD, 4):
        share_cores()
        scenes = [world.make_scene(s, NUM_FRAMES) for s in range(seed, seed + 4)]
        clips = np.stack([world.draw_clip(s, NUM_FRAMES, SIZE, SIZE) for s in scenes])
        frames = torch.from_numpy(clips).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        first = frames[:, :1]
        strengths = torch.exp(torch.randn(len(scenes), 3) * 0.6 - 3.0).clamp(max=0.5)
        strengths[:, 0] = DEFAULT_AUGMENTATION
        noised = first + strengths[..., None, None, None] * torch.randn(len(scenes), 3, *first.shape[2:])
        with autocast():
            encoded = vae.encode(torch.cat([frames, noised], 1).flatten(0, 1)).latent_dist.mode().float()
            embeds = encoder(preprocess(first[:, 0])).image_embeds.float()[:, None]
        encoded = encoded.unflatten(0, (len(scenes), -1))
        conditions = torch.tensor([[s.fps - 1.0, s.motion_bucket_id] for s in scenes])
        latents = encoded[:, :NUM_FRAMES] * vae.config.scaling_factor
        parts.append([latents, encoded[:, NUM_FRAMES:], strengths, embeds, conditions])
    return Clips(*(torch.cat(column) for column in zip(*parts, strict=True)))


def encode_clips(
    vae: AutoencoderKLTemporalDecoder, encoder: CLIPVisionModelWithProjection, runs: Path, clips: int = CLIPS
) -> Clips:
    """At least `clips` clips in whole shards. Reads the shards that are in `runs` and encodes the others."""
    shards = []
    count = -(-clips // SHARD)
    log = Log(runs / "cache.csv", count, "clips encoded, shard", every=1)
    for shard in range(count):
        path = runs / f"clips{shard:03}.pt"
        if not path.exists():
            torch.save(vars(encode_shard(vae, encoder, shard)), path)
            log(shard, {"clips": (shard + 1) * SHARD})
        shards.append(torch.load(path, weights_only=True))
    return Clips(**{name: torch.cat([shard[name] for shard in shards]) for name in shards[0]})


def draw_sigmas(count: int) -> torch.Tensor:
    """Log-normal noise levels; an eighth is log-uniform over the range of the sampler, which starts at 700."""
    logs = SIGMA_MEAN + SIGMA_STD * torch.randn(count)
    spread = np.log(0.002) + (np.log(700) - np.log(0.002)) * torch.rand(count)
    return torch.where(torch.rand(count) < 0.125, spread, logs).exp().clamp(0.002, 700)


def loss_of(unet: UNetSpatioTemporalConditionModel, clips: Clips, rows: torch.Tensor) -> torch.Tensor:
    """Per-clip losses `[B]` on the clips with the given row numbers."""
    pick = torch.randint(clips.augmentations.shape[1], (len(rows),))
    num_frames = NUM_FRAMES if torch.rand(()) < 0.9 else int(torch.randint(2, NUM_FRAMES, ()))
    clean = clips.latents[rows, :num_frames]  # [B,F,4,h,w]
    keep = (torch.rand(len(rows)) >= DROP).float()
    image_latents = clips.image_latents[rows, pick] * keep[:, None, None, None]
    embeds = clips.embeds[rows] * keep[:, None, None]
    time_ids = torch.cat([clips.conditions[rows], clips.augmentations[rows, pick][:, None]], 1)

    sigma = draw_sigmas(len(rows))
    s = sigma[:, None, None, None, None]
    c_skip, c_out, c_in = 1 / (s**2 + 1), -s / (s**2 + 1).sqrt(), 1 / (s**2 + 1).sqrt()
    noised = clean + s * torch.randn_like(clean)
    image = image_latents[:, None].expand(-1, num_frames, -1, -1, -1)
    with autocast():
        inputs = torch.cat([noised * c_in, image], 2)
        v = unet(inputs, 0.25 * sigma.log(), embeds, time_ids, return_dict=False)[0]
    # The weight of EDM times c_out^2 is 1 here, so the loss on v equals the weighted loss on the denoised clip.
    target = (clean - c_skip * noised) / c_out
    loss: torch.Tensor = (v.float() - target).square().mean((1, 2, 3, 4))
    return loss


def train(
    clips: Clips,
    runs: Path,
    publish: Callable[[UNetSpatioTemporalConditionModel], None],
    steps: int = STEPS,
    publish_every: int = 500,
) -> UNetSpatioTemporalConditionModel:
    """Trains the denoiser, or resumes, and returns its average, which `publish` gets every `publish_every` steps."""
    torch.manual_seed(4)
    unet, averaged = make_unet(), make_unet().eval()
    flatten_temporal_convolutions(unet)
    speed_up_attention(unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    average = Average(unet, DECAY)
    first = load_state(runs / "unet.pt", unet=unet, optimizer=optimizer, average=average)
    log = Log(runs / "unet.csv", steps, "denoiser")
    for step in range(first, steps):
        torch.manual_seed(1_000_000 + step)
        share_cores()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, PEAK_RATE, warm_up=200)
        loss = loss_of(unet, clips, torch.randint(len(clips.latents), (BATCH,))).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        average.update(unet, step)
        log(step, {"loss": loss.item(), "gradient": norm.item()})
        if (step + 1) % publish_every == 0 or step + 1 == steps:
            save_state(runs / "unet.pt", step + 1, unet=unet, optimizer=optimizer, average=average)
            averaged.load_state_dict(average.state_dict())
            publish(averaged)
    averaged.load_state_dict(average.state_dict())
    return averaged
