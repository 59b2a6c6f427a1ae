"""Replacing layers inside a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["after", "each_frame", "frozen", "linear", "replace_layers"]


def replace_layers(root: nn.Module, kind: type[nn.Module], make: Callable[..., nn.Module]) -> int:
    """Replace every layer of the class ``kind`` in ``root`` by ``make(layer)``; returns how many were replaced.

    Layers inside of a replaced one are not visited.
    """
    count = 0
    for name, child in list(root.named_children()):
        if isinstance(child, kind):
            setattr(root, name, make(child))
            count += 1
        else:
            count += replace_layers(child, kind, make)
    return count


def after(before: Tensor, value: Tensor) -> Tensor:
    """``value``, computed after ``before``: TensorRT's builder merges equal layers that do not depend on each other."""
    first = before.flatten()[:1].reshape((1,) * value.ndim)
    return torch.where(first > torch.inf, first, value)  # never true


def each_frame(video: Tensor, frames: int) -> Tensor:
    """Repeat the values of each video, ``[V, ...]``, for all its frames: ``[V*F, ...]``."""
    repeats = (1, frames) + (1,) * (video.ndim - 1)
    return video.unsqueeze(1).repeat(repeats).flatten(0, 1)


def frozen(values: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A weight of the rewritten network, rounded once from the fp32 in which it was computed."""
    return nn.Parameter(values.to(dtype).contiguous(), requires_grad=False)


def linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """A linear layer with these weights, ``[out, in]`` and ``[out]``."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = frozen(weight, dtype)
    if bias is not None:
        layer.bias = frozen(bias, dtype)
    return layer
