"""What diffusers' own networks give for the inputs of ours: the reference that is verified against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from svd_trt.engine.spec import COEFFICIENTS, NetworkName, NetworkSpec
from svd_trt.runtime.samplers import euler

__all__ = ["SIGMAS", "diffusers_output", "draw_inputs"]

SIGMAS = np.array([700.0, 30.0, 1.0, 0.05, 0.0], np.float32)
"""The step that is compared is the one from the second to the third."""


def draw_inputs(spec: NetworkSpec, sizes: Mapping[str, int]) -> dict[str, npt.NDArray[Any]]:
    """Inputs of ``spec`` at ``sizes`` of its symbols, the same every time: noise at the level where it would be."""
    rng = np.random.default_rng(sum(sizes.values()))
    inputs = {t.name: rng.standard_normal(t.resolve(sizes)).astype(np.float32) for t in spec.inputs}
    if spec.name == "denoiser":
        sigma = SIGMAS[1]
        inputs["latents"] *= sigma
        inputs["previous_denoised"][:] = 0
        inputs["added_time_ids"] = np.tile(np.array([6, 127, 0.02], np.float32), (sizes.get("batch", 1), 1))
        inputs["coefficients"] = euler(SIGMAS)[1]
        scale = np.linspace(1, 3, inputs["guidance"].shape[1], dtype=np.float32)
        inputs["guidance"] = np.stack([1 - scale, scale]) if len(inputs["guidance"]) == 2 else np.ones_like(scale)[None]
    return inputs


@torch.no_grad()
def diffusers_output(pipe: Any, name: NetworkName, x: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of network ``name`` for inputs ``x``, by the models of ``pipe``, which has those that it takes."""
    if name == "image_encoder":
        return [pipe.image_encoder(x["pixels"]).image_embeds[:, None]]
    if name == "vae_encoder":
        return [pipe.vae.encode(x["image"]).latent_dist.mode()]
    if name == "vae_decoder":
        decoded = pipe.vae.decode(x["latents"] / pipe.vae.config.scaling_factor, num_frames=len(x["latents"])).sample
        return [((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)]
    return _diffusers_step(pipe, x)


def _diffusers_step(pipe: Any, x: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The body of diffusers' loop, with its scheduler, on step 1 of SIGMAS."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(sigmas=SIGMAS.tolist())
    timestep = scheduler.timesteps[1]
    predictions = []
    for latents_of, embeds in zip(x["image_latents"], x["image_embeds"], strict=True):
        noisy = scheduler.scale_model_input(x["latents"], timestep)
        condition = latents_of[:, None].repeat(1, noisy.shape[1], 1, 1, 1)
        sample = torch.cat([noisy, condition], dim=2)
        predictions.append(pipe.unet(sample, timestep, embeds, x["added_time_ids"], return_dict=False)[0])
    guided = predictions[0]
    if len(predictions) == 2:
        scale = x["guidance"][1][None, :, None, None, None]
        guided = predictions[0] + scale * (predictions[1] - predictions[0])
    step = scheduler.step(guided, timestep, x["latents"])
    # What another pass gave is part of the denoised latents, and with their weight of the next ones.
    partial, weight = x["partial_denoised"], x["coefficients"][COEFFICIENTS.index("denoised_weight")]
    return [step.prev_sample + weight * partial, step.pred_original_sample + partial]
