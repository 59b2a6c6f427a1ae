"""Spatio-temporal residual blocks."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from diffusers.models.resnet import SpatioTemporalResBlock
from torch import Tensor, nn

from svd_trt.export.rewrites.blend import spatial_weight
from svd_trt.export.rewrites.surgery import each_frame, frozen, replace_layers

__all__ = ["VideoResnet", "temporal_convolutions_2d"]


def temporal_convolutions_2d(model: nn.Module) -> int:
    """Run convolutions over frames as 2-D ones over (frames, pixels), and fold the blend after them into their weights.

    A kernel of (3, 1, 1) uses no neighbouring pixels, so height and width can be one axis and the kernel is (3, 1).
    There are fast kernels for 2-D convolutions. The temporal block is ``x + f(x)`` and the blend ``a x + (1 - a)(x +
    f(x))``, which is ``x + (1 - a) f(x)``: the factor is multiplied into the last convolution, which saves three passes
    over the largest tensors of the network.
    """
    return replace_layers(model, SpatioTemporalResBlock, VideoResnet) + _convolve_2d(model)


def _convolve_2d(model: nn.Module) -> int:
    """Replace the VAE decoder's last layer, which is outside the residual blocks; returns how many were replaced."""
    if isinstance(getattr(model, "time_conv_out", None), nn.Conv3d):
        model.time_conv_out = FrameConvolution(cast(nn.Conv3d, model.time_conv_out))
        return 1
    return sum(_convolve_2d(child) for child in model.children())


class FrameConvolution(nn.Module):
    """A convolution over frames; ``[V, C, F, ...]`` to ``[V, C', F, ...]``, with any axes after the frames."""

    def __init__(self, conv: nn.Conv3d, factor: float = 1.0) -> None:
        super().__init__()
        assert (conv.kernel_size, conv.padding) == ((3, 1, 1), (1, 0, 0))
        assert conv.bias is not None
        weight = conv.weight.detach().float().squeeze(-1)  # [C', C, 3, 1]
        self.weight = frozen(weight * factor, conv.weight.dtype)
        self.bias = frozen(conv.bias.detach().float() * factor, conv.bias.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        if hidden.ndim == 5:
            size = hidden.shape[3:]
            return cast(Tensor, self.forward(hidden.flatten(3)).unflatten(3, tuple(size)))
        return F.conv2d(hidden, self.weight, self.bias, padding=(1, 0))


class SpatialResnet(nn.Module):
    """A residual block within frames; the embedding is projected once for each video, not for each frame."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        assert (block.time_embedding_norm, block.output_scale_factor) == ("default", 1.0)
        assert block.upsample is None
        assert block.downsample is None
        self.norm1, self.conv1, self.time_emb_proj = block.norm1, block.conv1, block.time_emb_proj
        self.norm2, self.conv2, self.conv_shortcut = block.norm2, block.conv2, block.conv_shortcut

    def forward(self, hidden: Tensor, temb: Tensor | None, frames: int) -> Tensor:
        """``[V*F, C, h, w]`` to ``[V*F, C', h, w]``; ``temb`` is ``[V, E]``."""
        change = self.conv1(F.silu(self.norm1(hidden)))
        if temb is not None:
            change = change + each_frame(self.time_emb_proj(F.silu(temb)), frames)[:, :, None, None]
        change = self.conv2(F.silu(self.norm2(change)))
        return cast(Tensor, (hidden if self.conv_shortcut is None else self.conv_shortcut(hidden)) + change)


class VideoResnet(nn.Module):
    """A spatial and a temporal residual block, both conditioned on the step."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.spatial = SpatialResnet(block.spatial_res_block)
        temporal = block.temporal_res_block
        assert temporal.conv_shortcut is None
        self.norm1 = temporal.norm1
        self.conv1 = FrameConvolution(temporal.conv1)
        self.time_emb_proj = temporal.time_emb_proj
        self.norm2 = temporal.norm2
        self.conv2 = FrameConvolution(temporal.conv2, 1.0 - spatial_weight(block.time_mixer))

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None, *, image_only_indicator: Tensor) -> Tensor:
        """``[V*F, C, h, w]`` to ``[V*F, C', h, w]``.

        Args:
            hidden_states: frames of all videos.
            temb: ``[V, E]``, the step and the conditions; the VAE has none.
            image_only_indicator: ``[V, F]``; only its shape is used.
        """
        videos, frames = image_only_indicator.shape
        hidden = self.spatial(hidden_states, temb, frames)
        size = tuple(hidden.shape[2:])
        # Pixels become one axis before the transpose: TensorRT does not find the normalisation after the other order.
        video = hidden.flatten(2).unflatten(0, (videos, frames)).transpose(1, 2)  # [V, C, F, h*w]
        change = self.conv1(F.silu(self.norm1(video)))
        if temb is not None:
            change = change + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        video = video + self.conv2(F.silu(self.norm2(change)))
        return cast(Tensor, video.transpose(1, 2).flatten(0, 1).unflatten(2, size))
