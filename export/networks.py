"""The four networks as torch modules whose inputs and outputs are exactly those of `svd_trt.engine.spec`.

Each wraps a diffusers or transformers model of the checkpoint. Inputs and outputs are float32 (frames are uint8); they
are cast to and from the precision of the bundle.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from svd_trt.engine.manifest import Operators, Precision, precision_of
from svd_trt.engine.spec import NetworkName
from svd_trt.export.recipe import REWRITTEN
from svd_trt.export.rewrites import rewrite
from svd_trt.export.rewrites.onnxruntime import fuse_for_onnxruntime
from svd_trt.export.rewrites.resnet import VideoResnet
from svd_trt.export.rewrites.surgery import each_frame
from svd_trt.export.rewrites.transformer import VideoTransformer
from svd_trt.export.rewrites.upsample import replace_upsamplers

__all__ = ["Denoiser", "ImageEncoder", "VaeDecoder", "VaeEncoder", "dtype_of", "make_network"]


def dtype_of(name: NetworkName, precision: Precision) -> torch.dtype:
    """The type that network ``name`` computes in, in a bundle of ``precision``."""
    return torch.float16 if precision_of(name, precision) == "fp16" else torch.float32


def make_network(
    name: NetworkName,
    model: Any,
    *,
    rewrites: bool = True,
    ff_chunks: int = 1,
    doubling: bool = False,
    operators: Operators = "onnx",
) -> nn.Module:
    """Network ``name`` around the checkpoint's component that it is made of, in the precision it was loaded in.

    The model is changed in place and its weights are not copied: those of full size do not fit into memory twice.

    Args:
        name: one of the four.
        model: the component that `svd_trt.export.checkpoint.COMPONENT_OF` names.
        rewrites: apply `svd_trt.export.rewrites`; without them the network computes what diffusers computes.
        ff_chunks: parts into which the denoiser's widest feed-forwards are cut.
        operators: ``onnxruntime`` uses operators that only ONNX Runtime has; needs rewrites.
        doubling: each level of the denoiser is exactly half as large as the one above, at all sizes it will run at.
    """
    module: nn.Module
    if name == "image_encoder":
        module = ImageEncoder(model)
    elif name == "vae_encoder":
        module = VaeEncoder(model)
    elif name == "denoiser":
        module = Denoiser(replace_upsamplers(model))
    else:
        module = VaeDecoder(replace_upsamplers(model))
    if rewrites and name in REWRITTEN:
        own = operators == "onnxruntime"
        doubling = doubling or name == "vae_decoder"
        rewrite(module, ff_chunks=1 if own else ff_chunks, doubling=doubling, operators=operators)
        if own:
            fuse_for_onnxruntime(module, ff_chunks=ff_chunks)
    return module.eval().requires_grad_(requires_grad=False)


class ImageEncoder(nn.Module):
    """CLIP's vision tower with its projection."""

    def __init__(self, image_encoder: nn.Module) -> None:
        super().__init__()
        self.image_encoder = image_encoder

    def forward(self, pixels: Tensor) -> Tensor:
        """``[B, 3, 224, 224]`` to ``[B, 1, D]``."""
        dtype = next(self.image_encoder.parameters()).dtype
        embeds = self.image_encoder(pixels.to(dtype)).image_embeds
        return cast(Tensor, embeds.unsqueeze(1).float())


class VaeEncoder(nn.Module):
    """The VAE's encoder; the mode of its posterior, as the pipeline takes it."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv

    def forward(self, image: Tensor) -> Tensor:
        """``[B, 3, H, W]`` in [-1, 1] to ``[B, 4, h, w]``."""
        moments = self.quant_conv(self.encoder(image))
        mean, _ = moments.chunk(2, dim=1)
        return cast(Tensor, mean)


class VaeDecoder(nn.Module):
    """The VAE's temporal decoder, with the pipeline's scaling before it and its conversion to pixels after it."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.decoder = vae.decoder
        self.scaling_factor = float(vae.config.scaling_factor)
        self.dtype = next(vae.decoder.parameters()).dtype

    def forward(self, latents: Tensor) -> Tensor:
        """``[N, 4, h, w]`` to uint8 ``[N, H, W, 3]``: one chunk of consecutive frames, decoded together."""
        chunk = latents.shape[0]
        scaled = (latents * (1.0 / self.scaling_factor)).to(self.dtype)
        indicator = torch.zeros(1, chunk, dtype=self.dtype)
        frames = self.decoder(scaled, image_only_indicator=indicator, num_frames=chunk).float()
        levels = ((frames / 2 + 0.5).clamp(0, 1) * 255).round()
        # The cast comes last: TensorRT takes uint8 at a network's border only.
        return cast(Tensor, levels.permute(0, 2, 3, 1).to(torch.uint8))


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
    ) -> tuple[Tensor, Tensor]:
        """Latents at the next sigma and the denoised latents, both ``[B, F, C, h, w]``."""
        c_in, c_noise, c_skip, c_out, w_latents, w_denoised, w_previous = coefficients.unbind(0)
        branches, batch = image_latents.shape[:2]
        frames = latents.shape[1]
        # repeat rather than expand: TensorRT bounds a Tile with a symbolic count and fails to bound the Expand.
        noisy = (latents * c_in).unsqueeze(0).repeat(branches, 1, 1, 1, 1, 1)
        condition = image_latents.unsqueeze(2).repeat(1, 1, frames, 1, 1, 1)
        sample = torch.cat([noisy, condition], dim=3).flatten(0, 1)  # [G*B, F, 2C, h, w]
        prediction = unet_forward(
            self.unet,
            sample.to(self.dtype),
            c_noise.reshape(1),
            image_embeds.flatten(0, 1).to(self.dtype),
            added_time_ids.repeat(branches, 1),
        )
        prediction = prediction.float().unflatten(0, (branches, batch))
        guided = (prediction * guidance[:, None, :, None, None, None]).sum(0)
        denoised = c_skip * latents + c_out * guided + partial_denoised
        next_latents = w_latents * latents + w_denoised * denoised + w_previous * previous_denoised
        return next_latents, denoised


def unet_forward(unet: Any, sample: Tensor, timestep: Tensor, embeds: Tensor, added_time_ids: Tensor) -> Tensor:
    """`UNetSpatioTemporalConditionModel.forward`, written so that frame count and size stay symbolic.

    It follows diffusers 0.42, with two differences. It repeats embeddings without ``repeat_interleave``, whose symbolic
    form exports to an invalid Expand. And it always passes the skip connection's size to the upsampler, which diffusers
    does for sizes that are not multiples of 64; for the others it makes no difference.

    Args:
        unet: the model, with its upsamplers replaced by `replace_upsamplers`.
        sample: ``[B, F, C, h, w]``.
        timestep: ``[1]``, continuous: ``0.25 ln(sigma)``.
        embeds: ``[B, 1, D]``.
        added_time_ids: ``[B, 3]``.
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

    hidden = unet.conv_in(sample.flatten(0, 1))
    skips: tuple[Tensor, ...] = (hidden,)
    for block in unet.down_blocks:
        hidden, made = run(block, hidden)
        skips += made
    hidden = run(unet.mid_block, hidden)
    for block in unet.up_blocks:
        taken, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
        size = skips[-1].shape[2:] if skips else None
        hidden = run(block, hidden, res_hidden_states_tuple=taken, upsample_size=size)
    hidden = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
    return cast(Tensor, hidden.unflatten(0, (batch, frames)))


def _has(unet: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(module, kind) for module in unet.modules())


def _time_embedding(unet: Any, timestep: Tensor, added_time_ids: Tensor, dtype: torch.dtype) -> Tensor:
    batch = added_time_ids.shape[0]
    emb = unet.time_embedding(unet.time_proj(timestep).to(dtype))  # [1, E]
    added = unet.add_time_proj(added_time_ids.flatten()).reshape(batch, -1).to(dtype)
    return cast(Tensor, emb + unet.add_embedding(added))
