"""Stage 1: the VAE, which encodes pictures of the world to 8 x 8 x 4 latents and decodes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import world
from diffusers import AutoencoderKLTemporalDecoder
from loop import (
    Log,
    autocast,
    flatten_temporal_convolutions,
    learning_rate,
    load_state,
    save_state,
    share_cores,
)
from model import SIZE, make_vae

STEPS = 2400
FRAMES = 16  # pictures per step: 16 clips of 1 frame, 8 of 2, 4 of 4, or 2 of 8
PEAK_RATE = 1.2e-3
KL_WEIGHT = 1e-4


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Pictures `[16,3,32,32]` in [-1,1], loss weights `[16,1,32,32]`, and the clip length. The step is the seed."""
    rng = np.random.default_rng([1, step])
    num_frames = int(rng.choice([1, 2, 4, 8]))  # every size of decode chunk must work
    pictures, weights = [], []
    for _ in range(FRAMES // num_frames):
        scene = world.make_scene(int(rng.integers(world.HELD_OUT_START)))
        first = int(rng.integers(0, 8 - num_frames + 1))
        clip = world.draw_frames(scene, np.arange(first, first + num_frames), SIZE, SIZE)
        # The rocket covers a tenth of the picture. Without more weight, the sky would dominate the loss.
        rocket = np.abs(clip - world.draw_sky(scene, SIZE, SIZE)).max(-1, keepdims=True) > 0.02
        pictures.append(clip)
        weights.append(1.0 + 2.0 * rocket)
    to_torch = [torch.from_numpy(np.concatenate(x).astype(np.float32)).permute(0, 3, 1, 2) for x in (pictures, weights)]
    return to_torch[0] * 2 - 1, to_torch[1], num_frames


def gradient_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    d = x - y
    return (d[..., 1:, :] - d[..., :-1, :]).abs().mean() + (d[..., 1:] - d[..., :-1]).abs().mean()


def loss_of(vae: AutoencoderKLTemporalDecoder, step: int) -> tuple[torch.Tensor, dict[str, float]]:
    pictures, weights, num_frames = batch(step)
    noisy = pictures.clone()
    # The pipeline adds noise to the picture before it encodes it, so half of the batch has noise.
    half = noisy[::2]
    half += torch.randn_like(half) * 0.1 * torch.rand(len(half), 1, 1, 1)
    with autocast():
        posterior = vae.encode(noisy).latent_dist
        decoded = vae.decode(posterior.sample(), num_frames=num_frames).sample
    decoded = decoded.float()
    error = decoded - pictures
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    reconstruction = (weights * (error.abs() + 2 * error**2)).mean()
    loss = reconstruction + 0.5 * gradient_loss(decoded, pictures) + KL_WEIGHT * kl
    psnr = -10 * torch.log10((error / 2).detach().clamp(-1, 1).square().mean()).item()
    return loss, {
        "loss": loss.item(),
        "psnr": psnr,
        "kl": kl.item(),
        "std": posterior.mean.float().std().item(),
    }


def train(runs: Path, steps: int = STEPS) -> AutoencoderKLTemporalDecoder:
    """Trains the VAE, or resumes its training, sets its scaling factor, and returns it."""
    torch.manual_seed(1)
    vae = make_vae()
    # Posteriors start narrow (sigma 0.05). At the default of 1, the noise hides the colours for a thousand steps.
    with torch.no_grad():
        vae.quant_conv.weight[4:].zero_()
        vae.quant_conv.bias[4:].fill_(-6.0)
    flatten_temporal_convolutions(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    first = load_state(runs / "vae.pt", vae=vae, optimizer=optimizer)
    log = Log(runs / "vae.csv", steps, "VAE")
    for step in range(first, steps):
        torch.manual_seed(step)
        share_cores()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, PEAK_RATE)
        loss, values = loss_of(vae, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        log(step, values)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save_state(runs / "vae.pt", step + 1, vae=vae, optimizer=optimizer)
    set_scaling_factor(vae)
    return vae.eval()


@torch.no_grad()
def set_scaling_factor(vae: AutoencoderKLTemporalDecoder) -> None:
    """Sets the factor that gives the latents unit variance, which the noise levels of the denoiser assume."""
    latents = torch.cat([vae.encode(batch(10_000_000 + i)[0]).latent_dist.mode() for i in range(8)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))


def psnr(x: torch.Tensor, y: torch.Tensor) -> float:
    return -10 * torch.log10(F.mse_loss(x, y)).item()
