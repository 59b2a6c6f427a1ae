"""Upsampling by two."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from svd_trt.export.rewrites.surgery import frozen, replace_layers

__all__ = ["CroppedUpsample", "SubpixelUpsample", "replace_upsamplers", "subpixel_upsampling"]


class CroppedUpsample(nn.Module):
    """Nearest upsampling by two, cropped to the size of the skip connection, then the convolution.

    Equal to interpolating to that size: a strided convolution halves ``s`` to ``ceil(s / 2)``, and the nearest
    source of pixel ``i`` is ``i // 2`` both for ``2 ceil(s / 2)`` and for one less. Unlike interpolation to a
    symbolic size it exports to a Resize by a constant factor and does not compute with symbolic sizes in Python.
    """

    def __init__(self, upsample: Any) -> None:
        super().__init__()
        self.conv = upsample.conv

    def forward(self, hidden: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """``[N, C, s, t]`` to ``[N, C', 2s, 2t]``, or to ``output_size``."""
        hidden = F.interpolate(hidden, scale_factor=2.0, mode="nearest")
        if output_size is not None:
            hidden = hidden[:, :, : output_size[0], : output_size[1]]
        return cast(Tensor, self.conv(hidden))


def replace_upsamplers(module: nn.Module) -> nn.Module:
    """Replace diffusers' `Upsample2D` by `CroppedUpsample`, in place; returns ``module``."""
    replace_layers(module, Upsample2D, CroppedUpsample)
    return module


def subpixel_upsampling(model: nn.Module) -> int:
    """Convolve at the small size and interleave, instead of convolving the enlarged picture.

    After nearest upsampling the nine taps of a 3x3 kernel cover only 2x2 different pixels; which ones depends on
    whether row and column are even. So each of the four kinds of output pixel is a 2x2 convolution of the small picture
    with sums of the kernel's taps (the sub-pixel convolution of Shi et al. 2016, arXiv:1609.05158, in reverse): 4
    products instead of 9. The layer's weights grow to 16/9. Together they are one transposed convolution with a 4x4
    kernel and a stride of two, which writes every pixel to its place, without a shuffle and a crop after it.

    It does not apply to pictures that are cropped before the convolution, as the UNet's are at sizes that are not
    multiples of 64: there the last row is next to padding, and here it would be next to the row that was cut off.
    """
    return replace_layers(model, CroppedUpsample, SubpixelUpsample)


class SubpixelUpsample(nn.Module):
    """Nearest upsampling by two and a 3x3 convolution, as one transposed convolution."""

    def __init__(self, upsample: CroppedUpsample) -> None:
        super().__init__()
        conv = cast(nn.Conv2d, upsample.conv)
        assert (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((3, 3), (1, 1), (1, 1), 1)
        kernel = conv.weight.detach().float()  # [C', C, 3, 3]
        self.weight = frozen(_spread(_spread(kernel, 2), 3).transpose(0, 1), conv.weight.dtype)  # [C, C', 4, 4]
        self.bias = conv.bias

    def forward(self, hidden: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """``[N, C, s, t]`` to ``[N, C', 2s, 2t]``, which ``output_size`` is if it is given."""
        assert output_size in (None, (2 * hidden.shape[2], 2 * hidden.shape[3]))
        return F.conv_transpose2d(hidden, self.weight, self.bias, stride=2, padding=1)


def _spread(kernel: Tensor, axis: int) -> Tensor:
    """Turn a kernel axis of 3 over the enlarged picture into one of 4: what each pixel adds to outputs around it.

    Pixel ``i`` fills ``2i`` and ``2i + 1`` of the enlarged picture. Output ``2i - 1`` reads the first of them with the
    last tap, ``2i`` both with the last two, ``2i + 1`` both with the first two, ``2i + 2`` the second with the first.
    """
    first, second, third = kernel.unbind(axis)
    return torch.stack([third, second + third, first + second, first], axis)
