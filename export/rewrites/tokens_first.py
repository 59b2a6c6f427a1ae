"""Spatio-temporal transformers with tokens as the first axis, which is the order that TensorRT's attention wants.

TensorRT's fused attention works on one batch of heads: on ``[T, N, heads, D]`` that is a view, on ``[N, T, heads, D]``
a transpose. If the layers around it have the other order, that transpose splits the normalisation before attention into
two kernels with an fp32 tensor between them, and costs a copy after it. In this order each transpose is part of a
kernel that reads its input anyway: on the way in, between spatial and temporal attention, and in the final sum.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor, nn

from svd_trt.export.rewrites.attention import BoundedAttention
from svd_trt.export.rewrites.blend import spatial_weight
from svd_trt.export.rewrites.surgery import each_frame, replace_layers
from svd_trt.export.rewrites.transformer import SpatialBlock, TemporalBlock, VideoTransformer

__all__ = ["TokensFirstAttention", "TokensFirstTransformer", "put_tokens_first"]


def put_tokens_first(model: nn.Module) -> int:
    """Run transformers with tokens as the first axis, and project their outputs by convolutions of 1x1.

    The values of the picture (see `cross_attention_to_values`) are one vector for each video. A normalisation reads
    their sum with the stream; the stream itself gets them with the next addition that is made anyway. So normalisations
    before feed-forwards write one tensor and not two. A convolution adds the residual connection as it writes, which
    the transposed product does not.
    """
    return replace_layers(model, VideoTransformer, TokensFirstTransformer)


class TokensFirstAttention(nn.Module):
    """`BoundedAttention` over the first axis."""

    def __init__(self, attention: BoundedAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden: Tensor) -> Tensor:
        """``[T, N, C]`` to the same shape."""
        query, key, value = self.attention.project(hidden)  # [T, N, heads, D]
        mixed = self.attention.attend(query.permute(1, 2, 0, 3), key.permute(1, 2, 3, 0), value.permute(1, 2, 0, 3))
        return cast(Tensor, self.attention.to_out(mixed.permute(2, 0, 1, 3).flatten(2)))


class TokensFirstTransformer(VideoTransformer):
    """`VideoTransformer` in that order. T is a picture's pixels; N is the frames of all videos, V*F."""

    def __init__(self, layer: VideoTransformer) -> None:
        nn.Module.__init__(self)
        self.norm, self.proj_in, self.proj_out = layer.norm, layer.proj_in, layer.proj_out
        self.spatial, self.temporal = layer.spatial, layer.temporal
        self.positions = layer.positions
        self.spatial_weight = spatial_weight(layer.time_mixer)
        blocks: list[Any] = [*self.spatial, *self.temporal]
        for block in blocks:
            block.attn1 = TokensFirstAttention(block.attn1)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        image_only_indicator: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """See `VideoTransformer.forward`."""
        assert not return_dict
        videos, frames = image_only_indicator.shape
        embeds, weight = encoder_hidden_states, self.spatial_weight
        positions = self.positions(frames)[:, None, None]  # [F, 1, 1, C]
        hidden = self.proj_in(self.norm(hidden_states).flatten(2).transpose(1, 2))  # [N, T, C]
        blocks: Any = zip(self.spatial, self.temporal, strict=True)
        for spatial, temporal in blocks:
            values = spatial.values(embeds), temporal.values(embeds)  # [V, 1, C]
            stream = _within_frames(spatial, hidden.transpose(0, 1), each_frame(values[0], frames).transpose(0, 1))
            video = stream.unflatten(1, (videos, frames)).permute(2, 0, 1, 3)  # [F, T, V, C]
            video = video + (positions + values[0].squeeze(1))
            video = _over_frames(temporal, video.flatten(1, 2), values[1].squeeze(1))  # [F, T*V, C]
            mixed = video.unflatten(1, (-1, videos)).permute(2, 0, 1, 3).flatten(0, 1)  # [N, T, C]
            missing = each_frame(values[0] * weight + values[1] * (1.0 - weight), frames)
            hidden = stream.transpose(0, 1) * weight + mixed * (1.0 - weight) + missing
        picture = hidden.transpose(1, 2).reshape(hidden_states.shape)
        out = F.conv2d(picture, self.proj_out.weight[:, :, None, None], self.proj_out.bias)
        return (out + hidden_states,)


def _within_frames(block: SpatialBlock, stream: Tensor, values: Tensor) -> Tensor:
    """``[T, N, C]`` and ``[1, N, C]`` to the block's output without the values, which the caller adds."""
    stream = stream + block.attn1(block.norm1(stream))
    layer = block.feed_forward
    return cast(Tensor, stream + layer.ff(layer.norm(stream + values), axis=0))


def _over_frames(block: TemporalBlock, stream: Tensor, values: Tensor) -> Tensor:
    """``[F, T*V, C]`` and ``[V, C]`` to the block's output without the values, which the caller adds.

    Only the stream is a plain list of tokens: then TensorRT adds to it in the products, and not in the normalisations.
    """
    frames, tokens, _ = stream.shape
    shape = (frames, tokens)
    layer = block.feed_in
    flat = stream.flatten(0, 1) + layer.ff(layer.norm(stream)).flatten(0, 1)
    flat = flat + block.attn1(block.norm1(flat.unflatten(0, shape))).flatten(0, 1)
    layer = block.feed_forward
    read = (flat.unflatten(0, (frames, -1, values.shape[0])) + values).flatten(1, 2)
    return cast(Tensor, (flat + layer.ff(layer.norm(read)).flatten(0, 1)).unflatten(0, shape))
