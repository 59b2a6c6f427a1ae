"""diffusers' own networks and pipeline on a checkpoint: the reference that a bundle is compared with."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from svd_trt.engine.spec import COEFFICIENTS, DEEP_FEATURES, SHALLOW, NetworkName, NetworkSpec
from svd_trt.errors import CheckpointError
from svd_trt.export.checkpoint import COMPONENT_OF, Checkpoint
from svd_trt.export.presets import SCHEDULER
from svd_trt.export.scheduler import make_scheduler
from svd_trt.export.silence import silence_libraries
from svd_trt.runtime.samplers import euler

__all__ = ["SIGMAS", "diffusers_output", "draw_inputs", "load_models", "load_pipeline"]

SIGMAS = np.array([700.0, 30.0, 1.0, 0.05, 0.0], np.float32)
"""The denoiser is compared on the step from the second sigma to the third."""


def load_pipeline(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Load diffusers' ``StableVideoDiffusionPipeline`` on the CPU from any checkpoint that ``svd-trt build`` takes.

    Raises:
        CheckpointError: its weights are damaged, or are not those of its configurations.
    """
    configurations = checkpoint.configurations
    with silence_libraries():
        from diffusers import StableVideoDiffusionPipeline
        from transformers import CLIPImageProcessor

        normalisation = {name: configurations["feature_extractor"][name] for name in ("image_mean", "image_std")}
        return StableVideoDiffusionPipeline(
            vae=checkpoint.load("vae", dtype),
            image_encoder=checkpoint.load("image_encoder", dtype),
            unet=checkpoint.load("unet", dtype),
            scheduler=make_scheduler(configurations["scheduler"]),
            feature_extractor=CLIPImageProcessor(**normalisation),
        )


@contextmanager
def load_models(checkpoint: Checkpoint, name: NetworkName) -> Iterator[Any]:
    """What `diffusers_output` needs for network ``name``, in fp32 on the CPU; the weights are freed after the block."""
    from diffusers import EulerDiscreteScheduler

    model = checkpoint.load(COMPONENT_OF[name], torch.float32).eval()
    scheduler = EulerDiscreteScheduler.from_config(SCHEDULER)
    models = SimpleNamespace(image_encoder=model, vae=model, unet=model, scheduler=scheduler)
    del model
    try:
        yield models
    finally:
        models.__dict__.clear()
        gc.collect()


def draw_inputs(spec: NetworkSpec, sizes: Mapping[str, int]) -> dict[str, npt.NDArray[Any]]:
    """Inputs of ``spec`` for ``sizes`` of its symbols: noise of the strength at that step, the same at every call."""
    rng = np.random.default_rng(sum(sizes.values()))
    inputs = {t.name: rng.standard_normal(t.resolve(sizes)).astype(t.dtype) for t in spec.inputs}
    if spec.name in ("denoiser", SHALLOW):
        sigma = SIGMAS[1]
        inputs["latents"] *= sigma
        inputs["previous_denoised"][:] = 0
        inputs["added_time_ids"] = np.tile(np.array([6, 127, 0.02], np.float32), (sizes.get("batch", 1), 1))
        inputs["coefficients"] = euler(SIGMAS)[1]
        scale = np.linspace(1, 3, inputs["guidance"].shape[1], dtype=np.float32)
        inputs["guidance"] = np.stack([1 - scale, scale]) if len(inputs["guidance"]) == 2 else np.ones_like(scale)[None]
    return inputs


def diffusers_output(
    models: Any, name: NetworkName, inputs: Mapping[str, npt.NDArray[Any]], *, keeps_features: bool = False
) -> list[npt.NDArray[Any]]:
    """The outputs of network ``name`` by ``models``: diffusers' pipeline, or what `load_models` yields.

    With ``keeps_features`` the last output of the denoiser is what its upsampler to the top level gets. The reference
    of the shallow denoiser is the whole UNet, in which that upsampler gets the given features instead.

    Raises:
        CheckpointError: the models do not take these inputs.
    """
    tensors = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in inputs.items()}
    try:
        with torch.no_grad():
            outputs = [output.numpy() for output in _outputs(models, name, tensors)]
            return outputs if keeps_features or name != "denoiser" else outputs[:2]
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint's {name} has other inputs than the bundle's; "
            "pass the checkpoint that the bundle was built from"
        ) from error


def _outputs(models: Any, name: NetworkName, x: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    if name == "image_encoder":
        return [models.image_encoder(x["pixels"]).image_embeds[:, None]]
    if name == "vae_encoder":
        return [models.vae.encode(x["image"]).latent_dist.mode()]
    if name == "vae_decoder":
        latents = x["latents"] / models.vae.config.scaling_factor
        decoded = models.vae.decode(latents, num_frames=len(latents)).sample
        return [((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)]
    return _denoising_step(models, x)


def _denoising_step(models: Any, x: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The body of diffusers' denoising loop, with its scheduler, for step 1 of `SIGMAS`."""
    scheduler = models.scheduler
    scheduler.set_timesteps(sigmas=SIGMAS.tolist())
    timestep = scheduler.timesteps[1]
    predictions = []
    kept: list[torch.Tensor] = []
    given = x.get(DEEP_FEATURES)
    with _hook_at_cut(models.unet, kept, None if given is None else given.float()):
        for latents_of, embeds in zip(x["image_latents"], x["image_embeds"], strict=True):
            noisy = scheduler.scale_model_input(x["latents"], timestep)
            condition = latents_of[:, None].repeat(1, noisy.shape[1], 1, 1, 1)
            sample = torch.cat([noisy, condition], dim=2)
            predictions.append(models.unet(sample, timestep, embeds, x["added_time_ids"], return_dict=False)[0])
    guided = predictions[0]
    if len(predictions) == 2:
        scale = x["guidance"][1][None, :, None, None, None]
        guided = predictions[0] + scale * (predictions[1] - predictions[0])
    step = scheduler.step(guided, timestep, x["latents"])
    # With split guidance the other pass's part is added to the denoised latents, and to the next ones by its weight.
    partial, weight = x["partial_denoised"], x["coefficients"][COEFFICIENTS.index("denoised_weight")]
    outputs = [step.prev_sample + weight * partial, step.pred_original_sample + partial]
    if kept and given is None:
        outputs.append(torch.stack(kept).unflatten(1, x["latents"].shape[:2]))
    return outputs


@contextmanager
def _hook_at_cut(unet: Any, kept: list[torch.Tensor], given: torch.Tensor | None) -> Iterator[None]:
    """Add what the upsampler to the top level gets to ``kept``, and let it get ``given``, ``[G, B, F, ...]``, instead.

    One call of ``unet`` is one branch. A UNet of one level has no such upsampler.
    """

    def before(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kept.append(args[0])
        return args if given is None else (given[len(kept) - 1].flatten(0, 1), *args[1:])

    if len(unet.up_blocks) < 2:
        yield
        return
    handle = unet.up_blocks[-2].upsamplers[0].register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
