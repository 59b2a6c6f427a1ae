"""Blending of spatial and temporal features.

A video has no image-only frames (``image_only_indicator`` is all zeros), so the weight that diffusers chooses for each
frame with a Where is one learned number.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import AlphaBlender
from torch import Tensor, nn

from svd_trt.export.rewrites.surgery import replace_layers

__all__ = ["ConstantBlend", "constant_blends", "spatial_weight"]


def constant_blends(model: nn.Module) -> int:
    """Replace every AlphaBlender by a weighted sum with constants, without Where, Sigmoid and broadcasts."""
    return replace_layers(model, AlphaBlender, ConstantBlend)


def spatial_weight(blender: Any) -> float:
    """Weight of the spatial features in a video's blend; the temporal features have one minus it."""
    if isinstance(blender, ConstantBlend):
        return blender.spatial
    factor = blender.mix_factor.detach().float()
    alpha = float(factor if blender.merge_strategy == "fixed" else torch.sigmoid(factor))
    return 1.0 - alpha if blender.switch_spatial_to_temporal_mix else alpha


class ConstantBlend(nn.Module):
    """``a x_spatial + (1 - a) x_temporal``."""

    def __init__(self, blender: Any) -> None:
        super().__init__()
        self.spatial = spatial_weight(blender)

    def forward(self, x_spatial: Tensor, x_temporal: Tensor, image_only_indicator: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Both inputs and the output have the same shape."""
        return x_spatial * self.spatial + x_temporal * (1.0 - self.spatial)
