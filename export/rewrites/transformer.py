"""Spatio-temporal transformers."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import Tensor, nn

from svd_trt.engine.spec import LARGEST_COUNT
from svd_trt.export.rewrites.feed_forward import ResidualFeedForward
from svd_trt.export.rewrites.surgery import each_frame, frozen, linear, replace_layers

__all__ = ["VideoTransformer", "cross_attention_to_values", "tabulate_frame_positions"]


def cross_attention_to_values(model: nn.Module) -> int:
    """Replace every cross-attention by its value path.

    SVD attends to one token, the picture's embedding, and a softmax over one key is 1: for every query the result is
    ``to_out(to_v(token))``, a constant of the video. Queries, keys, their normalisation and the scores are removed, the
    two matrices become one, and the result is computed once for each video, not for each frame and pixel.
    """
    return replace_layers(model, TransformerSpatioTemporalModel, VideoTransformer)


def tabulate_frame_positions(model: nn.Module) -> int:
    """Replace the network that embeds a frame's position by the table of its outputs.

    Its input is the number of the frame, so every step computes the same. At full size a table of 1024 rows takes 26 MB
    in fp16, and the weights take 198 MB.
    """
    return replace_layers(model, FramePositions, PositionTable)


class SpatialBlock(nn.Module):
    """Attention within a frame, the picture's values, and a feed-forward."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        assert block.norm_type == "layer_norm"
        assert block.pos_embed is None
        self.norm1, self.attn1 = block.norm1, block.attn1
        self.values = _value_path(block.attn2)
        self.feed_forward = ResidualFeedForward(block.norm3, block.ff)

    def forward(self, hidden: Tensor, embeds: Tensor, frames: int) -> Tensor:
        """``[V*F, h*w, C]`` and ``[V, 1, D]`` to ``[V*F, h*w, C]``."""
        hidden = hidden + self.attn1(self.norm1(hidden)) + each_frame(self.values(embeds), frames)
        return cast(Tensor, self.feed_forward(hidden))


class TemporalBlock(nn.Module):
    """Attention over the frames of each pixel, the picture's values, and feed-forwards before and after them."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        assert block.is_res
        self.feed_in = ResidualFeedForward(block.norm_in, block.ff_in)
        self.norm1, self.attn1 = block.norm1, block.attn1
        self.values = _value_path(block.attn2)
        self.feed_forward = ResidualFeedForward(block.norm3, block.ff)

    def forward(self, hidden: Tensor, embeds: Tensor) -> Tensor:
        """``[V, h*w, F, C]`` and ``[V, 1, D]`` to ``[V, h*w, F, C]``."""
        videos, pixels = hidden.shape[:2]
        # Three axes for the feed-forwards: TensorRT fuses gelu into the product only then.
        tokens = _by_pixel(self.feed_in, hidden.flatten(0, 1), videos)  # [V*h*w, F, C]
        tokens = tokens + self.attn1(self.norm1(tokens))
        tokens = tokens.unflatten(0, (videos, pixels)) + self.values(embeds).unsqueeze(1)
        tokens = _by_pixel(self.feed_forward, tokens.flatten(0, 1), videos)
        return cast(Tensor, tokens.unflatten(0, (videos, pixels)))


def _by_pixel(layer: ResidualFeedForward, tokens: Tensor, videos: int) -> Tensor:
    """Run ``layer`` over ``[V*h*w, F, C]``. Its chunks, if it has some, are parts of the pixels, not of the frames."""
    if getattr(layer.ff, "chunks", 1) == 1:
        return cast(Tensor, layer(tokens))
    return cast(Tensor, layer(tokens.unflatten(0, (videos, -1))).flatten(0, 1))


class FramePositions(nn.Module):
    """The embedding of each frame's position, as diffusers computes it."""

    def __init__(self, time_proj: nn.Module, time_pos_embed: nn.Module) -> None:
        super().__init__()
        self.time_proj = time_proj
        self.time_pos_embed = time_pos_embed

    def forward(self, frames: int) -> Tensor:
        """``[F, C]``."""
        dtype = next(self.time_pos_embed.parameters()).dtype
        return cast(Tensor, self.time_pos_embed(self.time_proj(torch.arange(frames)).to(dtype)))


class PositionTable(nn.Module):
    """The outputs of `FramePositions` for all frames that a bundle can have."""

    def __init__(self, positions: FramePositions) -> None:
        super().__init__()
        dtype = next(positions.parameters()).dtype
        with torch.no_grad():
            self.table = frozen(positions.float()(LARGEST_COUNT), dtype)

    def forward(self, frames: int) -> Tensor:
        """``[F, C]``."""
        return self.table[:frames]


class VideoTransformer(nn.Module):
    """Alternating spatial and temporal blocks over the pixels of a video, with a residual connection."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm, self.proj_in = model.norm, model.proj_in
        self.spatial = nn.ModuleList(SpatialBlock(block) for block in model.transformer_blocks)
        self.temporal = nn.ModuleList(TemporalBlock(block) for block in model.temporal_transformer_blocks)
        self.positions: nn.Module = FramePositions(model.time_proj, model.time_pos_embed)
        self.time_mixer = model.time_mixer
        self.proj_out = model.proj_out

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        image_only_indicator: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """``[V*F, C, h, w]`` to the same shape, in a tuple as in diffusers.

        Args:
            hidden_states: frames of all videos.
            encoder_hidden_states: ``[V, 1, D]``, the pictures' embeddings.
            image_only_indicator: ``[V, F]``; only its shape is used.
            return_dict: diffusers passes False.
        """
        assert not return_dict
        videos, frames = image_only_indicator.shape
        embeds = encoder_hidden_states
        positions = self.positions(frames)  # [F, C]
        hidden = self.proj_in(self.norm(hidden_states).flatten(2).transpose(1, 2))  # [V*F, h*w, C]
        for spatial, temporal in zip(self.spatial, self.temporal, strict=True):
            hidden = spatial(hidden, embeds, frames)
            video = hidden.unflatten(0, (videos, frames)).transpose(1, 2)  # [V, h*w, F, C]
            video = temporal(video + positions, embeds)
            mixed = video.transpose(1, 2).flatten(0, 1)  # [V*F, h*w, C]
            hidden = self.time_mixer(hidden, mixed, image_only_indicator)
        out = self.proj_out(hidden).transpose(1, 2).reshape(hidden_states.shape)
        return (out + hidden_states,)


def _value_path(attention: Any) -> nn.Linear:
    """``to_out(to_v(token))`` as one layer: the product of both matrices, taken in fp32."""
    out = attention.to_out[0]
    assert attention.to_v.bias is None
    weight = out.weight.detach().float() @ attention.to_v.weight.detach().float()
    return linear(weight, out.bias.detach().float(), out.weight.dtype)
