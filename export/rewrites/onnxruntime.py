"""The same layers with operators of ONNX Runtime, for bundles that nothing else will run.

ONNX has no operator for attention that every runtime supports, so a portable graph writes it with basic operators, and
ONNX Runtime then stores every score. Its own operators (domain ``com.microsoft``) do not, but TensorRT and other
runtimes refuse a graph that has them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor, nn

from svd_trt.export.rewrites.attention import BoundedAttention
from svd_trt.export.rewrites.feed_forward import ResidualFeedForward, SplitFeedForward
from svd_trt.export.rewrites.surgery import frozen, replace_layers
from svd_trt.export.rewrites.upsample import SubpixelUpsample

__all__ = ["FusedAttention", "PhasedUpsample", "TokenFeedForward", "fuse_for_onnxruntime"]


def fuse_for_onnxruntime(model: nn.Module, *, ff_chunks: int = 1) -> int:
    """Replace layers by forms that ONNX Runtime runs fastest; returns how many were changed.

    In half precision too its attention keeps scores in fp32, so that queries and keys need no smaller scale.

    Args:
        model: rewritten by `svd_trt.export.rewrites.rewrite`.
        ff_chunks: parts into which the narrowest level's tokens are cut; wider levels, which have fewer tokens, get
            proportionally fewer. On a processor, both halves of the gated product of a part stay in its cache until
            they are used.
    """
    narrowest = min((_width(m) for m in model.modules() if isinstance(m, ResidualFeedForward)), default=1)

    def feed_forward(layer: ResidualFeedForward) -> nn.Module:
        return TokenFeedForward(layer, max(1, ff_chunks * narrowest // _width(layer)))

    attentions = replace_layers(model, BoundedAttention, FusedAttention)
    upsamplers = replace_layers(model, SubpixelUpsample, PhasedUpsample)
    return attentions + upsamplers + replace_layers(model, ResidualFeedForward, feed_forward)


def _width(layer: ResidualFeedForward) -> int:
    assert isinstance(layer.ff, SplitFeedForward)
    return layer.ff.out.out_features


class FusedAttention(nn.Module):
    """`BoundedAttention` as one MultiHeadAttention, around projections of a flat list of tokens.

    A product with two axes becomes a Gemm, which adds the bias itself; with three it is a MatMul and an Add.
    """

    def __init__(self, attention: BoundedAttention) -> None:
        super().__init__()
        assert not attention.bounded, "MultiHeadAttention takes queries and keys as the checkpoint scales them"
        self.heads, self.scale = attention.heads, attention.scale
        self.to_q, self.to_k, self.to_v = attention.to_q, attention.to_k, attention.to_v
        self.to_out = attention.to_out

    def forward(self, hidden: Tensor) -> Tensor:
        """``[N, T, C]`` to the same shape. For exports only: outside of an export it returns zeros."""
        shape = hidden.shape[:2]
        tokens = hidden.flatten(0, 1)
        inputs = [project(tokens).unflatten(0, shape) for project in (self.to_q, self.to_k, self.to_v)]
        mixed = torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            inputs,
            {"num_heads": self.heads, "scale": self.scale},
            dtype=hidden.dtype,
            shape=inputs[0].shape,
            version=1,
        )
        return cast(Tensor, self.to_out(mixed.flatten(0, 1)).unflatten(0, shape))


class TokenFeedForward(nn.Module):
    """`ResidualFeedForward` over a flat list of tokens, in parts one after another."""

    def __init__(self, layer: ResidualFeedForward, chunks: int) -> None:
        super().__init__()
        assert isinstance(layer.ff, SplitFeedForward)
        self.norm, self.ff, self.chunks = layer.norm, layer.ff, chunks

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., C]`` to the same shape."""
        tokens = hidden.flatten(0, -2)
        if self.chunks > 1:
            count = tokens.shape[0]
            bounds = [count * i // self.chunks for i in range(self.chunks + 1)]
            parts = [self._run(tokens[a:b]) for a, b in pairwise(bounds)]
            tokens = torch.cat(parts)
        else:
            tokens = self._run(tokens)
        return cast(Tensor, tokens.unflatten(0, hidden.shape[:-1]))

    def _run(self, tokens: Tensor) -> Tensor:
        assert isinstance(self.ff, SplitFeedForward)
        return tokens + self.ff.run(self.norm(tokens))


class PhasedUpsample(nn.Module):
    """`SubpixelUpsample` as a convolution for each kind of output pixel, interleaved by concatenation.

    Each convolution pads only the two sides that need it, so no computed pixel is cut off. ONNX Runtime concatenates in
    all threads, but its DepthToSpace runs in one.
    """

    def __init__(self, layer: SubpixelUpsample) -> None:
        super().__init__()
        assert layer.bias is not None
        self.weights = nn.ParameterList(_phase(layer.weight.detach(), *divmod(kind, 2)) for kind in range(4))
        self.bias = layer.bias

    def forward(self, hidden: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """``[N, C, s, t]`` to ``[N, C', 2s, 2t]``, which ``output_size`` is if it is given."""
        assert output_size in (None, (2 * hidden.shape[2], 2 * hidden.shape[3]))
        odd_odd, odd_even, even_odd, even_even = (self._kind(hidden, kind) for kind in range(4))  # row, then column
        even_columns = torch.stack([even_even, odd_even], dim=3).flatten(2, 3)  # [N, C', 2s, t]
        odd_columns = torch.stack([even_odd, odd_odd], dim=3).flatten(2, 3)
        return torch.stack([even_columns, odd_columns], dim=4).flatten(3)

    def _kind(self, hidden: Tensor, kind: int) -> Tensor:
        """Every other row and column: even ones use the pixel before theirs, odd ones the pixel after."""
        even_row, even_column = divmod(kind, 2)
        padding = (even_column, 1 - even_column, even_row, 1 - even_row)
        return F.conv2d(F.pad(hidden, padding), self.weights[kind], self.bias)


def _phase(weight: Tensor, even_row: int, even_column: int) -> nn.Parameter:
    """The 2x2 kernel of every other row and column, ``[C', C, 2, 2]``, of a transposed one, ``[C, C', 4, 4]``.

    Even outputs get the last tap of the pixel before theirs and the second of their own; odd ones get the third of
    their own and the first of the pixel after.
    """
    taps = ([2, 0], [3, 1])
    return frozen(weight[:, :, taps[even_row]][..., taps[even_column]].transpose(0, 1), weight.dtype)
