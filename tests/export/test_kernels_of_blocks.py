"""What TensorRT for RTX compiles the rewritten blocks to, at the widths and sizes of SVD's first level.

Bytes are counted in streams: one half-precision tensor of 320 channels, 50 frames and 72x128 pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from svd_trt.engine.kernel_kinds import KINDS, Kind
from svd_trt.engine.kernels import KernelCost, ProfileKernels, kernel_costs
from svd_trt.engine.spec import Range, Symbol
from svd_trt.export.rewrites import rewrite
from svd_trt.export.rewrites.upsample import replace_upsamplers
from tests.export.kernel_lists import compile_kernels, moved_bytes

pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx", reason="TensorRT for RTX is not installed (svd-trt[rtx])")

CHANNELS, FRAMES, BRANCHES, HEIGHT, WIDTH, EMBEDDING = 320, 25, 2, 72, 128, 1024
FUSED: tuple[Kind, ...] = ("convolution", "product", "norm fused")
STREAM = BRANCHES * FRAMES * CHANNELS * HEIGHT * WIDTH * 2


class Level(nn.Module):
    """A residual block, a transformer and another residual block of the UNet, between narrow convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, CHANNELS, 3, padding=1)
        self.resnets = nn.ModuleList(SpatioTemporalResBlock(CHANNELS, CHANNELS, temb_channels=64) for _ in range(2))
        self.transformer: Any = TransformerSpatioTemporalModel(
            5, 64, in_channels=CHANNELS, cross_attention_dim=EMBEDDING
        )
        self.last = nn.Conv2d(CHANNELS, 8, 3, padding=1)

    def forward(self, latents: Tensor, temb: Tensor, embeds: Tensor) -> Tensor:
        videos, frames = latents.shape[:2]
        indicator = torch.zeros(videos, frames)
        hidden = self.resnets[0](self.first(latents.flatten(0, 1)), temb, image_only_indicator=indicator)
        (hidden,) = self.transformer(hidden, embeds, indicator, return_dict=False)
        hidden = self.resnets[1](hidden, temb, image_only_indicator=indicator)
        return cast(Tensor, self.last(hidden).unflatten(0, (videos, frames)))


@pytest.fixture(scope="module")
def level(tmp_path_factory: pytest.TempPathFactory) -> tuple[ProfileKernels, ProfileKernels]:
    """Kernels of `Level`, in the exact profile and in the range."""
    module = Level().half()
    rewrite(module)
    return compile_kernels(
        module,
        [
            (Symbol("branches"), Symbol("frames"), 8, HEIGHT, WIDTH),
            (Symbol("branches"), 64),
            (Symbol("branches"), 1, EMBEDDING),
        ],
        {"branches": Range(1, 2, BRANCHES), "frames": Range(2, FRAMES, FRAMES)},
        tmp_path_factory.mktemp("level"),
    )


def costs_of(profile: ProfileKernels, *kinds: Kind) -> list[KernelCost]:
    """Costs of the kernels of ``kinds`` at the largest sizes."""
    costs = kernel_costs(profile, {symbol: r.max for symbol, r in profile.ranges.items()})
    return [cost for cost in costs if cost.kernel.kind in kinds]


def test_what_fuses_in_a_level(level: tuple[ProfileKernels, ProfileKernels]) -> None:
    exact, whole = level
    for profile in level:
        assert len(costs_of(profile, "attention")) == 2  # within frames, over frames
        assert not costs_of(profile, "softmax alone", "gelu alone")
        copies = [cost for cost in costs_of(profile, "copy or layout") if cost.read + cost.written > STREAM / 10]
        assert not copies, [cost.kernel.name for cost in copies]
    for kind in FUSED:
        assert len(costs_of(whole, kind)) == len(costs_of(exact, kind)), kind


def test_traffic_of_a_level(level: tuple[ProfileKernels, ProfileKernels], record_property: Any) -> None:
    """At most 23 streams for a residual block and 104 for a transformer, and 3 at the ends."""
    exact, _ = level
    streams = moved_bytes(exact) / STREAM
    record_property("streams", f"{streams:.1f}")
    assert streams < 2 * 23 + 104 + 3
    assert sum(cost.spilled for cost in costs_of(exact, *KINDS)) < STREAM / 50, "fp32 tensors between kernels"


class Decoder(nn.Module):
    """Upsampling and a residual block of the VAE's decoder, which has no time embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 128, 3, padding=1)
        self.upsample = Upsample2D(128, use_conv=True)
        self.resnet = SpatioTemporalResBlock(
            128, 128, temb_channels=None, eps=1e-6, merge_strategy="learned", merge_factor=0.0
        )
        self.last = nn.Conv2d(128, 8, 3, padding=1, stride=2)

    def forward(self, latents: Tensor) -> Tensor:
        hidden = self.upsample(self.first(latents))
        indicator = torch.zeros(1, latents.shape[0])
        return cast(Tensor, self.last(self.resnet(hidden, None, image_only_indicator=indicator)))


def test_what_fuses_in_the_decoder(tmp_path: Path, record_property: Any) -> None:
    module = replace_upsamplers(Decoder().half())
    rewrite(module)
    frames = 8
    profiles = compile_kernels(module, [(Symbol("chunk"), 8, 288, 512)], {"chunk": Range(1, 5, frames)}, tmp_path)
    stream = frames * 128 * 576 * 1024 * 2
    for profile in profiles:
        copies = [cost for cost in costs_of(profile, "copy or layout") if cost.read + cost.written > stream / 10]
        assert not copies, [cost.kernel.name for cost in copies]
    (enlarging,) = (cost for cost in costs_of(profiles[0], "convolution") if cost.kernel.type == "deconv")
    assert enlarging.flops == 4 * 2 * frames * 128 * 128 * 576 * 1024  # 4 products for each output value and channel
    streams = moved_bytes(profiles[0]) / stream
    record_property("streams", f"{streams:.1f}")
    assert streams < 21 + 3
    assert len(costs_of(profiles[0], "norm fused")) == 3


class PictureAttentionBlock(nn.Module):
    """The VAE's attention between narrow convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 512, 3, padding=1)
        self.attention = Attention(
            512, heads=1, dim_head=512, norm_num_groups=32, bias=True, residual_connection=True, eps=1e-6
        )
        self.last = nn.Conv2d(512, 8, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        return cast(Tensor, self.last(self.attention(self.first(latents))))


def test_scores_of_a_picture_are_stored_in_parts(tmp_path: Path) -> None:
    """For 14 frames all scores would be 1.2e9 numbers; a quarter of them exists at a time."""
    module = PictureAttentionBlock().half()
    rewrite(module)
    frames = 14
    for profile in compile_kernels(
        module, [(Symbol("chunk"), 8, HEIGHT, WIDTH)], {"chunk": Range(1, 5, frames)}, tmp_path
    ):
        assert costs_of(profile, "norm fused")
        elements = [t.elements({"chunk": frames}) or 0 for t in profile.tensors]
        assert max(elements) == frames * (HEIGHT * WIDTH) ** 2 // 4
