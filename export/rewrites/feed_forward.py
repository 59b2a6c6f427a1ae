"""Gated feed-forward layers (GEGLU, Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from svd_trt.export.rewrites.surgery import after, linear, replace_layers

__all__ = ["ResidualFeedForward", "SplitFeedForward", "split_feed_forwards"]

_HEADROOM = 16.0


def split_feed_forwards(model: nn.Module, *, chunks: int = 1) -> int:
    """Compute value and gate of each feed-forward separately, and ``chunks`` parts of the tokens one after another.

    One product for both halves makes a tensor eight times as wide as the stream, and their gated product one that is
    four times as wide; at full size they are the peak of the whole step. Once they are separate, the value can be made
    smaller so that it cannot overflow (see `SplitFeedForward`). In TensorRT it is the chunks that lower the peak.

    Each chunk depends on the one before, because otherwise the builder merges them into one. A level of the UNet with
    half the pixels on a side and twice the channels has half the tensor, so it gets half the chunks.
    """
    widths = [cast(nn.Linear, layer.net[2]).out_features for layer in model.modules() if isinstance(layer, FeedForward)]
    narrowest = min(widths, default=1)

    def make(layer: Any) -> nn.Module:
        width = cast(nn.Linear, layer.net[2]).out_features
        return SplitFeedForward(layer, chunks=max(1, chunks * narrowest // width))

    return replace_layers(model, FeedForward, make)


class ResidualFeedForward(nn.Module):
    """``x + ff(norm(x))``, of which a transformer's block has one or two."""

    def __init__(self, norm: nn.Module, ff: nn.Module) -> None:
        super().__init__()
        self.norm, self.ff = norm, ff

    def forward(self, hidden: Tensor) -> Tensor:
        """``[N, T, ..., C]`` to the same shape."""
        return cast(Tensor, hidden + self.ff(self.norm(hidden)))


class SplitFeedForward(nn.Module):
    """``W_out (value * gelu(gate)) + b``.

    In half precision the value is computed 16 times smaller and ``W_out`` is 16 times larger, so that the product of
    two large activations stays finite. A power of two costs accuracy only in the smallest weights (those under 0.001
    become subnormal).
    """

    def __init__(self, layer: Any, chunks: int = 1) -> None:
        super().__init__()
        project, _, out = layer.net
        assert isinstance(project, GEGLU)
        dtype = out.weight.dtype
        room = _HEADROOM if dtype == torch.float16 else 1.0
        value, gate = (t.detach().float() for t in project.proj.weight.chunk(2))
        value_bias, gate_bias = (t.detach().float() for t in project.proj.bias.chunk(2))
        self.value = linear(value / room, value_bias / room, dtype)
        self.gate = linear(gate, gate_bias, dtype)
        self.out = linear(out.weight.detach().float() * room, out.bias.detach().float(), dtype)
        self.chunks = chunks

    def forward(self, hidden: Tensor, axis: Literal[0, 1] = 1) -> Tensor:
        """``[N, T, ..., C]`` to the same shape; chunks are parts of ``axis``."""
        tokens = hidden.shape[axis]
        chunks = min(self.chunks, tokens) if isinstance(tokens, int) else self.chunks
        if chunks == 1:
            return self.run(hidden)
        parts: list[Tensor] = []
        for i in range(chunks):
            part = slice(tokens * i // chunks, tokens * (i + 1) // chunks)
            tensor = hidden[part] if axis == 0 else hidden[:, part]
            parts.append(self.run(after(parts[-1], tensor) if parts else tensor))
        return torch.cat(parts, dim=axis)

    def run(self, hidden: Tensor) -> Tensor:
        """``[..., C]`` to the same shape, without chunks."""
        return cast(Tensor, self.out(self.value(hidden) * F.gelu(self.gate(hidden))))
