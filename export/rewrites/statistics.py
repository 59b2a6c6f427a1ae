"""Group normalisation from the statistics of channels, for layers in which TensorRT does not fuse the plain one.

TensorRT's fused group normalisation reads its input once and writes its output. It takes no sum as its input, it needs
a copy if frames and channels were transposed before it, and it needs static extents: a range of frame counts splits it
into kernels that read the tensor three times. The form here reads it twice in every case. A kernel computes mean and
variance of each channel of a frame, some tiny ones turn these into a few numbers for each channel, and a kernel applies
those. It also does additions of a number for each channel, activations and transposes that follow.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from torch import Tensor, nn

from svd_trt.export.rewrites.resnet import VideoResnet
from svd_trt.export.rewrites.surgery import each_frame, frozen, replace_layers

__all__ = ["StatisticsNorm", "StatisticsResnet", "normalise_by_statistics"]


def normalise_by_statistics(model: nn.Module) -> int:
    """Normalise from statistics in residual blocks: after the time embeddings, and when frames become an axis.

    The time embedding adds one number to each channel, which changes the statistics by a formula. So it is never added
    to the tensor itself.

    In a UNet only the two levels with the largest tensors are changed. The deeper ones hold a sixth of the bytes, and
    more than half of the nodes that this adds, each of which takes time in every export and build.
    """
    widths = [_width(m) for m in model.modules() if isinstance(m, VideoResnet) and m.time_emb_proj is not None]
    widest = 2 * min(widths, default=0)

    def make(layer: VideoResnet) -> nn.Module:
        deep = layer.time_emb_proj is not None and _width(layer) > widest
        return layer if deep else StatisticsResnet(layer)

    total = replace_layers(model, VideoResnet, make)
    return total - sum(width > widest for width in widths)


def _width(layer: VideoResnet) -> int:
    return int(layer.conv1.weight.shape[0])


class StatisticsNorm(nn.Module):
    """Group normalisation and SiLU, in fp32 whatever the type of the input."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps, self.dtype = norm.num_groups, norm.eps, norm.weight.dtype
        doubled, bias = (t.detach().float().unflatten(0, (self.groups, -1)) for t in (2 * norm.weight, norm.bias))
        self.doubled, self.bias = frozen(doubled, torch.float32), frozen(bias, torch.float32)  # [groups, C / groups]

    def forward(self, hidden: Tensor, shift: Tensor | None) -> Tensor:
        """``silu(norm(hidden + shift))`` of ``[V, C, F, T]`` and ``[V, C]``."""
        videos, _, frames, _ = hidden.shape
        # TensorRT computes both statistics in one kernel if frames and videos are one axis.
        statistics = _by_video(_statistics_of(hidden.transpose(1, 2).flatten(0, 1)), videos, frames)
        shape = (videos, -1, 1, 1)
        return _scaled(hidden, *(t.reshape(shape) for t in self.coefficients(*statistics, shift)))

    def coefficients(
        self, means: Tensor, variances: Tensor, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `_scaled` needs for each channel, each ``[N, groups, C / groups]``.

        Args:
            means: ``[N, C, K]`` in fp32: of K parts of the channel, all of the same size.
            variances: of the same parts.
            shift: ``[N, C]``, added to every value first.
        """
        added = 0.0 if shift is None else shift.float().unsqueeze(2)
        shape = (means.shape[0], self.groups, -1)
        means, variances = (means + added).reshape(shape), variances.reshape(shape)
        first = means[:, :, :1]  # near the others, so that squares of differences from it are accurate
        differences = means - first
        mean = differences.mean(2, keepdim=True)
        variance = (variances + differences * differences).mean(2, keepdim=True) - mean * mean
        scale = self.doubled * torch.rsqrt(variance.clamp(min=0) + self.eps)
        shifts = torch.zeros_like(self.bias) if shift is None else shift.float().reshape(shape)
        centre = (first + mean - shifts) * 0.5
        rounded = centre.to(self.dtype)
        # The offset makes good what the rounding of the centre loses.
        return rounded, scale, (rounded.float() - centre) * scale + self.bias


def _statistics_of(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over pixels in fp32: ``[N, C, T]`` to twice ``[N, C, 1]``.

    The sums are those of differences from the first pixel. So a mean that is large beside the deviations loses nothing.
    """
    first = hidden[:, :, :1].float()
    differences = hidden.float() - first
    mean = differences.mean(2, keepdim=True)
    return mean + first, (differences * differences).mean(2, keepdim=True) - mean * mean


def _by_video(statistics: tuple[Tensor, Tensor], videos: int, frames: int) -> tuple[Tensor, Tensor]:
    """Statistics of all frames, ``[V*F, C, 1]``, as parts of channels of videos, ``[V, C, F]``."""
    mean, variance = (t.reshape(videos, frames, -1).transpose(1, 2) for t in statistics)
    return mean, variance


def _scaled(hidden: Tensor, centre: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """``silu((hidden / 2 - centre) * scale + offset)`` in the type of ``hidden``.

    The centre is subtracted before the cast to fp32: if this began with the cast that the statistics begin with,
    TensorRT would store the result of that cast. Halved, the difference of two half-precision numbers is finite.
    """
    return F.silu((hidden * 0.5 - centre).float() * scale + offset).to(hidden.dtype)


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
        shape = (change.shape[0], -1, 1, 1)
        coefficients = self.spatial_norm2.coefficients(*_statistics_of(change.flatten(2)), shift)
        change = spatial.conv2(_scaled(change, *(t.reshape(shape) for t in coefficients)))
        return cast(Tensor, (hidden if spatial.conv_shortcut is None else spatial.conv_shortcut(hidden)) + change)

    def _over_frames(self, hidden: Tensor, videos: int, frames: int) -> Tensor:
        """The first normalisation over all frames of a video: ``[V*F, C, h, w]`` to ``[V, C, F, h*w]``."""
        statistics = _by_video(_statistics_of(hidden.flatten(2)), videos, frames)
        coefficients = (t.reshape(videos, 1, -1, 1) for t in self.norm1.coefficients(*statistics))
        # Pixels become one axis before the transpose: TensorRT does not fuse the other order.
        return _scaled(hidden.flatten(2).unflatten(0, (videos, frames)), *coefficients).transpose(1, 2)
