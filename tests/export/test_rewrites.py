"""Each rewrite alone keeps a network's outputs in fp32, also at odd frame counts and sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  (torch's own convention)
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from svd_trt.export.denoiser import Denoiser
from svd_trt.export.networks import make_network
from svd_trt.export.presets import PRESETS
from svd_trt.export.random_checkpoint import random_model
from svd_trt.export.rewrites import REWRITES, rewrite
from svd_trt.export.rewrites.attention import bound_attention
from svd_trt.export.rewrites.feed_forward import SplitFeedForward, split_feed_forwards
from svd_trt.export.rewrites.resnet import temporal_convolutions_2d
from svd_trt.export.rewrites.statistics import StatisticsNorm, normalise_by_statistics
from svd_trt.export.rewrites.tokens_first import put_tokens_first
from svd_trt.export.rewrites.transformer import cross_attention_to_values, tabulate_frame_positions
from svd_trt.export.rewrites.upsample import replace_upsamplers, subpixel_upsampling

# Largest difference allowed, relative to the output's standard deviation.
BOUND = 5e-5

# The rewrites on whose layers others work.
NEEDED: dict[Callable[..., int], tuple[Callable[..., int], ...]] = {
    tabulate_frame_positions: (cross_attention_to_values,),
    bound_attention: (cross_attention_to_values,),
    put_tokens_first: (cross_attention_to_values, split_feed_forwards, bound_attention),
    normalise_by_statistics: (temporal_convolutions_2d,),
}

# Height and width of the latents, frames, videos, guidance branches.
EVEN = (8, 16, 3, 1, 2)
SIZES = [EVEN, (8, 8, 5, 2, 1), (9, 12, 3, 1, 2), (13, 10, 2, 1, 2)]


@pytest.fixture(scope="module")
def unet() -> Any:
    return random_model("unet", PRESETS["tiny"], 0, torch.float32)


@pytest.fixture(scope="module")
def vae() -> Any:
    return random_model("vae", PRESETS["tiny"], 0, torch.float32)


def denoiser_inputs(h: int, w: int, frames: int, videos: int, branches: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(h * w + frames)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    scale = torch.linspace(1, 3, frames)
    return (
        draw(videos, frames, 4, h, w) * 30,
        torch.zeros(videos, frames, 4, h, w),
        torch.zeros(videos, frames, 4, h, w),
        draw(branches, videos, 4, h, w),
        draw(branches, videos, 1, 32),
        torch.tensor([[6.0, 127.0, 0.02]]).repeat(videos, 1),
        torch.stack([1 - scale, scale])[2 - branches :],
        torch.tensor([1 / 30, 0.85, 0.001, -1.0, 0.1, 0.9, 0.0]),
    )


def decode(network: Any, latents: Tensor) -> Tensor:
    """The decoder without its conversion to levels, which would hide small differences."""
    indicator = torch.zeros(1, len(latents))
    result: Tensor = network.decoder(latents, image_only_indicator=indicator, num_frames=len(latents))
    return result


def relative(ours: Tensor, plain: Tensor) -> float:
    assert plain.std() > 0.01, "a flat reference would agree with anything"
    return float((ours - plain).abs().max() / plain.std())


@torch.no_grad()
def difference_of_denoiser(unet: Any, change: Callable[[nn.Module], object], size: tuple[int, ...]) -> float:
    inputs = denoiser_inputs(*size)
    plain = make_network("denoiser", copy.deepcopy(unet), rewrites=False)
    changed = Denoiser(replace_upsamplers(copy.deepcopy(unet))).eval()
    assert change(changed), "nothing was changed"
    return max(relative(a, b) for a, b in zip(changed(*inputs), plain(*inputs), strict=True))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("function", REWRITES, ids=lambda f: f.__name__)
def test_each_rewrite_of_the_denoiser(
    function: Callable[[Any], int], size: tuple[int, ...], unet: Any, record_property: Any
) -> None:
    if function is subpixel_upsampling and size not in SIZES[:2]:
        pytest.skip("is left out where upsampling is cropped")

    def change(model: nn.Module) -> object:
        for needed in NEEDED.get(function, ()):
            needed(model)
        return function(model)

    difference = difference_of_denoiser(unet, change, size)
    record_property("relative_difference", difference)
    assert difference <= BOUND


@pytest.mark.parametrize("ff_chunks", [1, 2, 7])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_all_rewrites_of_the_denoiser(size: tuple[int, ...], ff_chunks: int, unet: Any, record_property: Any) -> None:
    h, w, *_ = size
    difference = difference_of_denoiser(
        unet, lambda model: rewrite(model, ff_chunks=ff_chunks, doubling=h % 4 == w % 4 == 0), size
    )
    record_property("relative_difference", difference)
    assert difference <= BOUND


@pytest.mark.parametrize("size", [(3, 9, 12), (1, 8, 8), (4, 5, 7)], ids=str)
@torch.no_grad()
def test_all_rewrites_of_the_decoder(size: tuple[int, ...], vae: Any, record_property: Any) -> None:
    frames, h, w = size
    latents = torch.randn(frames, 4, h, w, generator=torch.Generator().manual_seed(frames))
    plain = make_network("vae_decoder", copy.deepcopy(vae), rewrites=False)
    changed = make_network("vae_decoder", copy.deepcopy(vae))
    difference = relative(decode(changed, latents), decode(plain, latents))
    record_property("relative_difference", difference)
    assert difference <= BOUND


@pytest.mark.parametrize(
    "name", ["temporal_convolutions_2d", "constant_blends", "bound_attention", "subpixel_upsampling"]
)
@pytest.mark.parametrize("size", [(3, 9, 12), (1, 8, 8)], ids=str)
@torch.no_grad()
def test_each_rewrite_of_the_decoder(size: tuple[int, ...], name: str, vae: Any, record_property: Any) -> None:
    frames, h, w = size
    latents = torch.randn(frames, 4, h, w, generator=torch.Generator().manual_seed(frames))
    plain, changed = (make_network("vae_decoder", copy.deepcopy(vae), rewrites=False) for _ in range(2))
    assert next(function for function in REWRITES if function.__name__ == name)(changed)
    difference = relative(decode(changed, latents), decode(plain, latents))
    record_property("relative_difference", difference)
    assert difference <= BOUND


@pytest.mark.parametrize("mean", [0.0, 10.0, 300.0])
def test_statistics_of_values_with_a_large_mean(mean: float, record_property: Any) -> None:
    """The plain layer rounds the sum with the time embedding to half precision before it normalises; ours does not."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(8, 32).requires_grad_(requires_grad=False)
    norm.weight.normal_()
    hidden, shift = torch.randn(2, 32, 3, 200) + mean, torch.randn(2, 32)
    halves = hidden.half(), shift.half()
    exact = F.silu(norm(halves[0].float() + halves[1].float()[:, :, None, None]))
    difference = relative(StatisticsNorm(norm)(hidden, shift), F.silu(norm(hidden + shift[:, :, None, None])))
    norm.half()
    half = relative(StatisticsNorm(norm)(*halves).float(), exact)
    plain = relative(F.silu(norm(halves[0] + halves[1][:, :, None, None])).float(), exact)
    record_property("fp32_half_and_plain_half", f"{difference:.1e} {half:.1e} {plain:.1e}")
    assert difference <= max(BOUND, mean * 1e-6)
    assert half <= min(1e-2, 2 * plain)


def test_statistics_of_the_largest_numbers() -> None:
    """Differences and squares of half-precision numbers at both ends of their range stay finite."""
    hidden = torch.tensor([-60000.0, 60000.0]).repeat(1, 8, 2, 50).half()
    out = StatisticsNorm(nn.GroupNorm(2, 8).half())(hidden, torch.zeros(1, 8).half())
    assert torch.allclose(out.float(), F.silu(hidden.float() / 60000), atol=2e-3)


def test_more_chunks_than_tokens() -> None:
    layer = FeedForward(32, activation_fn="geglu")
    hidden = torch.randn(2, 3, 32)
    assert torch.allclose(SplitFeedForward(layer, 16)(hidden), layer(hidden), atol=1e-5)


def test_what_is_changed(unet: Any, vae: Any) -> None:
    """The tiny UNet has 6 transformers of 3 feed-forwards and 2 attentions; its decoder 13 resnets and 3 upsamplers."""
    changed = rewrite(Denoiser(replace_upsamplers(copy.deepcopy(unet))))
    transformers = changed["cross_attention_to_values"]
    assert transformers == changed["tabulate_frame_positions"] == changed["constant_blends"] > 0
    assert changed["split_feed_forwards"] == 3 * transformers
    assert changed["bound_attention"] == 2 * transformers
    assert changed["subpixel_upsampling"] == 2
    assert changed["put_tokens_first"] == transformers
    assert changed["normalise_by_statistics"] == changed["temporal_convolutions_2d"]
    decoder = make_network("vae_decoder", copy.deepcopy(vae), rewrites=False)
    changed = rewrite(decoder)
    assert changed["bound_attention"] == 1
    assert changed["subpixel_upsampling"] == 3
    assert not [m for m in decoder.modules() if isinstance(m, nn.Conv3d)]


def test_chunks_follow_the_width(unet: Any) -> None:
    """The widest tensors get the most chunks: a level with twice the channels and a quarter of the pixels gets half."""
    model = Denoiser(replace_upsamplers(copy.deepcopy(unet)))
    split_feed_forwards(model, chunks=4)
    widths = {m.out.out_features: m.chunks for m in model.modules() if type(m).__name__ == "SplitFeedForward"}
    assert widths == {32: 4, 64: 2}


def test_nothing_is_left_to_blend_at_run_time(unet: Any) -> None:
    model = Denoiser(replace_upsamplers(copy.deepcopy(unet)))
    rewrite(model)
    names = {type(m).__name__ for m in model.modules()}
    assert not names & {"AlphaBlender", "TimestepEmbedding3D", "Attention", "GEGLU", "SpatioTemporalResBlock"}
