"""The denoiser as a torch module: one whole step, around diffusers' UNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from svd_trt.export.rewrites.resnet import VideoResnet
from svd_trt.export.rewrites.surgery import each_frame
from svd_trt.export.rewrites.transformer import VideoTransformer

__all__ = ["Denoiser", "Runner", "block_runner", "run_down", "run_head", "run_up"]

Runner: TypeAlias = Callable[..., Any]
"""Runs a block of the UNet with what all blocks take: ``run(block, hidden, **more)``."""


class Denoiser(nn.Module):
    """One whole sampler step: input scaling, conditioning, all guidance branches, prediction, update.

    Guidance is a weighted sum over branches: weights ``1 - g`` and ``g`` are classifier-free guidance of scale ``g``
    (arXiv:2207.12598), and a single branch of weight 1 is none, so one engine serves both. The preconditioning is
    that of Karras et al. 2022 and the update is linear in the latents, the denoised latents and those of the step
    before, so Euler and linear multistep samplers differ only in the coefficients they are given. The sum over
    branches is linear too, so the branches can also run one after another: each pass adds to the result of the one
    before, and only the last has c_skip.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.dtype = next(unet.parameters()).dtype

    def forward(
        self,
        latents: Tensor,  # [B, F, C, h, w]
        previous_denoised: Tensor,  # [B, F, C, h, w]
        partial_denoised: Tensor,  # [B, F, C, h, w]
        image_latents: Tensor,  # [G, B, C, h, w]
        image_embeds: Tensor,  # [G, B, 1, D]
        added_time_ids: Tensor,  # [B, 3]
        guidance: Tensor,  # [G, F]
        coefficients: Tensor,  # [7], see svd_trt.engine.spec.COEFFICIENTS
        deep_features: Tensor | None = None,  # [G, B, F, C', h/2, w/2], of the shallow denoiser
    ) -> tuple[Tensor, ...]:
        """Latents at the next sigma and the denoised latents, both ``[B, F, C, h, w]``, and what `predict` keeps."""
        c_in, c_noise, c_skip, c_out, w_latents, w_denoised, w_previous = coefficients.unbind(0)
        branches, batch = image_latents.shape[:2]
        frames = latents.shape[1]
        # repeat rather than expand: TensorRT bounds a Tile with a symbolic count and fails to bound the Expand.
        noisy = (latents * c_in).unsqueeze(0).repeat(branches, 1, 1, 1, 1, 1)
        condition = image_latents.unsqueeze(2).repeat(1, 1, frames, 1, 1, 1)
        sample = torch.cat([noisy, condition], dim=3).flatten(0, 1)  # [G*B, F, 2C, h, w]
        prediction, *kept = self.predict(
            sample.to(self.dtype),
            c_noise.reshape(1),
            image_embeds.flatten(0, 1).to(self.dtype),
            added_time_ids.repeat(branches, 1),
            deep_features,
        )
        prediction = prediction.float().unflatten(0, (branches, batch))
        guided = (prediction * guidance[:, None, :, None, None, None]).sum(0)
        denoised = c_skip * latents + c_out * guided + partial_denoised
        next_latents = w_latents * latents + w_denoised * denoised + w_previous * previous_denoised
        return next_latents, denoised, *(features.unflatten(0, (branches, batch, frames)) for features in kept)

    def predict(
        self,
        sample: Tensor,
        timestep: Tensor,
        embeds: Tensor,
        added_time_ids: Tensor,
        deep_features: Tensor | None,  # noqa: ARG002  (of the shallow denoiser)
    ) -> tuple[Tensor, ...]:
        """The UNet's output, ``[G*B, F, C, h, w]``; a subclass may add features to keep, ``[G*B*F, C', h/2, w/2]``."""
        run = block_runner(self.unet, sample, timestep, embeds, added_time_ids)
        hidden, skips = run_down(self.unet, run, sample)
        hidden = run(self.unet.mid_block, hidden)
        for block in self.unet.up_blocks:
            hidden, skips = run_up(run, block, hidden, skips)
        return (run_head(self.unet, hidden, sample),)


def block_runner(unet: Any, sample: Tensor, timestep: Tensor, embeds: Tensor, added_time_ids: Tensor) -> Runner:
    """Make what all blocks of a UNet get in a step.

    With `run_down`, `run_up` and `run_head` it is `UNetSpatioTemporalConditionModel.forward`, written so that frame
    count and size stay symbolic. It follows diffusers 0.42, with two differences. It repeats embeddings without
    ``repeat_interleave``, whose symbolic form exports to an invalid Expand. And it always passes the skip connection's
    size to the upsampler, which diffusers does for sizes that are not multiples of 64; for the others it makes no
    difference.

    Args:
        unet: the model, with its upsamplers replaced by `replace_upsamplers`.
        sample: ``[B, F, C, h, w]``.
        timestep: ``[1]``, continuous: ``0.25 ln(sigma)``.
        embeds: ``[B, 1, D]``.
        added_time_ids: ``[B, 3]``.

    Returns:
        A function that runs a block, ``run(block, hidden, **more)``, with ``hidden`` ``[B*F, C, h, w]``.
    """
    batch, frames = sample.shape[:2]
    emb = _time_embedding(unet, timestep, added_time_ids, sample.dtype)
    # Rewritten layers take the embeddings of a video once, diffusers' own layers once for each frame.
    temb = emb if _has(unet, VideoResnet) else each_frame(emb, frames)
    context = embeds if _has(unet, VideoTransformer) else each_frame(embeds, frames)
    indicator = torch.zeros(batch, frames, dtype=sample.dtype)

    def run(block: Any, hidden: Tensor, **more: Any) -> Any:
        if getattr(block, "has_cross_attention", False):
            more["encoder_hidden_states"] = context
        return block(hidden_states=hidden, temb=temb, image_only_indicator=indicator, **more)

    return run


def run_down(unet: Any, run: Runner, sample: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output of the down path, and its skip connections."""
    hidden = unet.conv_in(sample.flatten(0, 1))
    skips: tuple[Tensor, ...] = (hidden,)
    for block in unet.down_blocks:
        hidden, made = run(block, hidden)
        skips += made
    return hidden, skips


def run_up(run: Runner, block: Any, hidden: Tensor, skips: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output of one block of the up path, and the skip connections that are left."""
    taken, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
    size = skips[-1].shape[2:] if skips else None
    return run(block, hidden, res_hidden_states_tuple=taken, upsample_size=size), skips


def run_head(unet: Any, hidden: Tensor, sample: Tensor) -> Tensor:
    """The last layers: ``[B*F, C', h, w]`` to ``[B, F, C, h, w]`` for a ``sample`` of these videos and frames."""
    hidden = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
    return cast(Tensor, hidden.unflatten(0, tuple(sample.shape[:2])))


def _has(unet: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(module, kind) for module in unet.modules())


def _time_embedding(unet: Any, timestep: Tensor, added_time_ids: Tensor, dtype: torch.dtype) -> Tensor:
    batch = added_time_ids.shape[0]
    emb = unet.time_embedding(unet.time_proj(timestep).to(dtype))  # [1, E]
    added = unet.add_time_proj(added_time_ids.flatten()).reshape(batch, -1).to(dtype)
    return cast(Tensor, emb + unet.add_embedding(added))
