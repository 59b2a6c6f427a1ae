"""Self-attention whose scores fit into half precision."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from svd_trt.export.rewrites.surgery import after, linear, replace_layers

__all__ = ["BoundedAttention", "PictureAttention", "bound_attention"]

# Product of the factors on queries and keys, over the scale of attention itself.
_SHRINK = 2.0**-13
# Of the queries of a picture's attention. The smallest picture has 2x2 pixels, and a part must have one.
_PARTS = 4


def bound_attention(model: nn.Module, *, stored_scores: bool = True) -> int:
    """Replace self-attention, the only kind that `cross_attention_to_values` leaves, by one that cannot overflow.

    SVD's keys are large, and in half precision their products with the queries become infinite, which makes every
    output NaN. Here the weights that produce queries and keys are multiplied by powers of two, so that both are smaller
    and have the same size, and the softmax, in fp32, undoes it: scores of up to 65504 * 1024 (for heads of 64) stay
    finite, and larger ones are clamped. As in any half-precision attention, queries and keys are rounded, which matters
    the more the larger the scores are.

    TensorRT recognises this form as fused attention, in which scores are never stored: products of half-precision
    tensors with a cast, a scale and a softmax between. (It does not fuse products of tensors that were cast to fp32
    first, and these take gigabytes.)

    Args:
        model: changed in place.
        stored_scores: the runtime may hold scores in half precision; if not, weights stay as they are.
    """
    return replace_layers(model, Attention, lambda attention: _make(attention, stored_scores=stored_scores))


def _make(attention: Any, *, stored_scores: bool) -> nn.Module:
    assert attention.norm_q is None
    assert attention.norm_k is None
    assert attention.rescale_output_factor == 1.0
    bounded = BoundedAttention(attention, stored_scores=stored_scores)
    return PictureAttention(attention.group_norm, bounded) if attention.residual_connection else bounded


class BoundedAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, attention: Any, *, stored_scores: bool = True) -> None:
        super().__init__()
        self.heads = attention.heads
        self.dtype = attention.to_q.weight.dtype
        self.bounded = stored_scores and self.dtype == torch.float16
        self.parts = 1
        query_scale, key_scale = _balance(attention.to_q, attention.to_k) if self.bounded else (1.0, 1.0)
        self.to_q = _scaled(attention.to_q, query_scale)
        self.to_k = _scaled(attention.to_k, key_scale)
        self.to_v = attention.to_v
        self.to_out = attention.to_out[0]
        head_size = attention.to_q.out_features // attention.heads
        self.scale = 1.0 / (math.sqrt(head_size) * query_scale * key_scale)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[N, T, C]`` to the same shape."""
        query, key, value = self.project(hidden)  # [N, T, heads, D]
        mixed = self.attend(query.transpose(1, 2), key.permute(0, 2, 3, 1), value.transpose(1, 2))
        return cast(Tensor, self.to_out(mixed.transpose(1, 2).flatten(2)))

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of ``[..., C]``: each ``[..., heads, D]``."""
        query, key, value = (
            project(hidden).unflatten(-1, (self.heads, -1)) for project in (self.to_q, self.to_k, self.to_v)
        )
        return query, key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Values mixed for each query.

        Args:
            query: ``[N, heads, T, D]``; with `parts`, its tokens are cut into that many, one after another.
            key: ``[N, heads, D, T]``.
            value: ``[N, heads, T, D]``.
        """
        if self.parts == 1:
            return self._attend(query, key, value)
        queries = query.shape[2]
        mixed: list[Tensor] = []
        for i in range(self.parts):
            part = query[:, :, queries * i // self.parts : queries * (i + 1) // self.parts]
            mixed.append(self._attend(after(mixed[-1], part) if mixed else part, key, value))
        return torch.cat(mixed, dim=2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key  # [N, heads, T, T]
        if self.bounded:
            scores = scores.clamp(-65504.0, 65504.0)
        weights = torch.softmax(scores.float() * self.scale, dim=-1).to(self.dtype)
        return weights @ value


class PictureAttention(nn.Module):
    """Attention among the pixels of a picture with a residual connection, as in the VAE.

    TensorRT fuses heads of at most 256 values, and this has one of 512. So its scores are stored, and the queries are
    cut into parts: at 576x1024 the scores of 25 frames at once would be 2.1e9 numbers.
    """

    def __init__(self, norm: nn.Module, attention: BoundedAttention) -> None:
        super().__init__()
        self.norm = norm
        attention.parts = _PARTS
        self.attention = attention

    def forward(self, hidden: Tensor) -> Tensor:
        """``[N, C, h, w]`` to the same shape."""
        # TensorRT does not fuse the normalisation if pixels become one axis before it.
        pixels = self.norm(hidden).flatten(2).transpose(1, 2)  # [N, h*w, C]
        return cast(Tensor, hidden + self.attention(pixels).transpose(1, 2).reshape(hidden.shape))


def _balance(to_q: nn.Linear, to_k: nn.Linear) -> tuple[float, float]:
    """Powers of two for queries and keys: their product is `_SHRINK`, and they make both weights equally large."""
    queries, keys = (float(layer.weight.detach().float().norm()) for layer in (to_q, to_k))
    ratio = keys / queries if keys and queries else 1.0
    whole = round(math.log2(_SHRINK))
    key = math.floor((whole - math.log2(ratio)) / 2)
    return 2.0 ** (whole - key), 2.0**key


def _scaled(layer: nn.Linear, factor: float) -> nn.Linear:
    if factor == 1.0:
        return layer
    bias = None if layer.bias is None else layer.bias.detach().float() * factor
    return linear(layer.weight.detach().float() * factor, bias, layer.weight.dtype)
