"""Group normalisation from the statistics of channels, for layers in which TensorRT does not fuse the plain one.

TensorRT's fused group normalisation reads its input once and writes its output. It takes no sum as its input, it needs
a copy if frames and channels were transposed before it, and it needs static extents, so that a range of frame counts
splits it into kernels that read the tensor five times. The form here costs one more read than the fused one in every
case: a kernel computes the mean of each channel and of its square, some tiny ones turn these into two numbers for each
channel, and a kernel applies them. Additions of one number for each channel, activations and transposes join these.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor, nn

from svd_trt.export.rewrites.resnet import VideoResnet
from svd_trt.export.rewrites.surgery import each_frame, replace_layers

__all__ = ["StatisticsNorm", "StatisticsResnet", "normalise_by_statistics"]


def normalise_by_statistics(model: nn.Module) -> int:
    """Normalise from statistics in residual blocks: after the time embeddings, and when frames become an axis.

    The time embedding adds one number to each channel, which changes the statistics by a formula. So it is never added
    to the tensor itself.
    """
    return replace_layers(model, VideoResnet, StatisticsResnet)


class StatisticsNorm(nn.Module):
    """Group normalisation and SiLU, in fp32 whatever the type of the input."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, hidden: Tensor, shift: Tensor) -> Tensor:
        """``silu(norm(hidden + shift))`` of ``[N, C, K, T]`` and ``[N, C]``."""
        return _apply(hidden, *self.coefficients(*_statistics(hidden, (3,)), shift))

    def coefficients(
        self, means: Tensor, squares: Tensor, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `_apply` needs for each channel, each ``[N, C]``.

        Args:
            means: ``[N, C, K]`` in fp32: of K parts of the channel, all of the same size.
            squares: means of the squares of the same values.
            shift: ``[N, C]``, added to every value first.
        """
        if shift is not None:
            added = shift.float().unsqueeze(2)
            squares = squares + added * (2 * means + added)
            means = means + added
        mean = means.unflatten(1, (self.groups, -1)).mean((2, 3)).unsqueeze(2)  # [N, groups, 1]
        square = squares.unflatten(1, (self.groups, -1)).mean((2, 3)).unsqueeze(2)
        factor = torch.rsqrt((square - mean * mean).clamp(min=0) + self.eps)
        weight, bias = (t.float().unflatten(0, (self.groups, -1)) for t in (self.weight, self.bias))
        scale = (weight * factor).flatten(1)
        centre = (mean + torch.zeros_like(weight)).flatten(1)
        if shift is not None:
            centre = centre - shift.float()
        halved = (centre * 0.5).to(self.weight.dtype)
        # The offset makes good what the rounding of the centre loses.
        return halved, 2 * scale, bias.flatten() + (2 * halved.float() - centre) * scale


def _statistics(hidden: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Means over ``axes`` of the values and of their squares, in fp32."""
    values = hidden.float()
    return values.mean(axes), (values * values).mean(axes)


def _apply(hidden: Tensor, halved: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """``silu((hidden / 2 - halved) * scale + offset)`` of ``[N, C, K, T]``; the coefficients are ``[N, C]``.

    The centre is subtracted before the cast to fp32: if this began with the cast that the statistics begin with,
    TensorRT would store the result of that cast. Halved, the difference of two half-precision numbers is finite.
    """
    halved, scale, offset = (t[:, :, None, None] for t in (halved, scale, offset))
    return F.silu((hidden * 0.5 - halved).float() * scale + offset).to(hidden.dtype)


class StatisticsResnet(VideoResnet):
    """`VideoResnet` with three of its four normalisations from statistics; with one of them if it has no embedding."""

    def __init__(self, layer: VideoResnet) -> None:
        nn.Module.__init__(self)
        self.spatial, self.time_emb_proj = layer.spatial, layer.time_emb_proj
        self.norm1, self.conv1 = StatisticsNorm(layer.norm1), layer.conv1
        self.norm2, self.conv2 = layer.norm2, layer.conv2
        if self.time_emb_proj is not None:
            self.norm2 = StatisticsNorm(layer.norm2)
            self.spatial_norm2 = StatisticsNorm(layer.spatial.norm2)

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None, *, image_only_indicator: Tensor) -> Tensor:
        """See `VideoResnet.forward`."""
        videos, frames = image_only_indicator.shape
        hidden = self._within_frames(hidden_states, temb, frames)
        change = self.conv1(self._over_frames(hidden, videos, frames))  # [V, C, F, h*w]
        norm2 = self.norm2
        change = F.silu(norm2(change)) if temb is None else norm2(change, self.time_emb_proj(F.silu(temb)))
        change = self.conv2(change).transpose(1, 2).flatten(0, 1)
        return cast(Tensor, hidden + change.unflatten(2, tuple(hidden.shape[2:])))

    def _within_frames(self, hidden: Tensor, temb: Tensor | None, frames: int) -> Tensor:
        spatial = self.spatial
        if temb is None:
            return cast(Tensor, spatial(hidden, temb, frames))
        change = spatial.conv1(F.silu(spatial.norm1(hidden)))
        shift = each_frame(spatial.time_emb_proj(F.silu(temb)), frames)
        means, squares = (t.unsqueeze(2) for t in _statistics(change, (2, 3)))
        change = spatial.conv2(_apply(change, *self.spatial_norm2.coefficients(means, squares, shift)))
        return cast(Tensor, (hidden if spatial.conv_shortcut is None else spatial.conv_shortcut(hidden)) + change)

    def _over_frames(self, hidden: Tensor, videos: int, frames: int) -> Tensor:
        """The first normalisation over all frames of a video: ``[V*F, C, h, w]`` to ``[V, C, F, h*w]``."""
        means, squares = (
            t.unflatten(0, (videos, frames)).transpose(1, 2) for t in _statistics(hidden, (2, 3))
        )  # [V, C, F]
        coefficients = (each_frame(t, frames) for t in self.norm1.coefficients(means, squares))
        normalised = _apply(hidden, *coefficients)
        # Pixels become one axis before the transpose: TensorRT does not fuse the other order.
        return cast(Tensor, normalised.flatten(2).unflatten(0, (videos, frames)).transpose(1, 2))
