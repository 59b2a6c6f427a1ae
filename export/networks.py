"""The networks as torch modules whose inputs and outputs are exactly those of `svd_trt.engine.spec`.

Each wraps a diffusers or transformers model of the checkpoint. Inputs and outputs are float32 (frames are uint8); they
are cast to and from the precision of the bundle.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from svd_trt.engine.manifest import Operators, Precision, precision_of
from svd_trt.engine.spec import SHALLOW, NetworkName
from svd_trt.export.denoiser import Denoiser
from svd_trt.export.recipe import REWRITTEN
from svd_trt.export.rewrites import rewrite
from svd_trt.export.rewrites.onnxruntime import fuse_for_onnxruntime
from svd_trt.export.rewrites.upsample import replace_upsamplers
from svd_trt.export.shallow import KeepingDenoiser, ShallowDenoiser

__all__ = ["ImageEncoder", "VaeDecoder", "VaeEncoder", "dtype_of", "make_network"]


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
    keeps_features: bool = False,
) -> nn.Module:
    """Network ``name`` around the checkpoint's component that it is made of, in the precision it was loaded in.

    The model is changed in place and its weights are not copied: those of full size do not fit into memory twice.

    Args:
        name: of the network.
        model: the component that `svd_trt.export.checkpoint.COMPONENT_OF` names.
        rewrites: apply `svd_trt.export.rewrites`; without them the network computes what diffusers computes.
        ff_chunks: parts into which the denoiser's widest feed-forwards are cut.
        operators: ``onnxruntime`` uses operators that only ONNX Runtime has; needs rewrites.
        doubling: each level of the denoiser is exactly half as large as the one above, at all sizes it will run at.
        keeps_features: the denoiser puts out what shallow steps take.
    """
    module: nn.Module
    if name == "image_encoder":
        module = ImageEncoder(model)
    elif name == "vae_encoder":
        module = VaeEncoder(model)
    elif name == "denoiser":
        module = (KeepingDenoiser if keeps_features else Denoiser)(replace_upsamplers(model))
    elif name == SHALLOW:
        module = ShallowDenoiser(replace_upsamplers(model))
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
