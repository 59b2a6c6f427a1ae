"""Bundles for ONNX Runtime alone: its own operators, and layers in the form that suits it, give equal numbers."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn

from svd_trt import BuildOptions, Bundle, build_bundle
from svd_trt.engine.spec import NetworkName, Range, network_specs
from svd_trt.errors import ArgumentError
from svd_trt.export.checkpoint_kinds import open_checkpoint
from svd_trt.export.networks import make_network
from svd_trt.export.onnx_export import export_network
from svd_trt.export.options import ranges_of
from svd_trt.export.reference import diffusers_output, draw_inputs, load_models
from svd_trt.export.rewrites.feed_forward import ResidualFeedForward, SplitFeedForward
from svd_trt.export.rewrites.onnxruntime import FusedAttention, PhasedUpsample, TokenFeedForward
from svd_trt.export.rewrites.upsample import CroppedUpsample, SubpixelUpsample
from tests.export.test_networks import END, TOLERANCE, check_network, sizes_at

OWN: tuple[NetworkName, ...] = ("denoiser", "vae_decoder")


@pytest.fixture(scope="module")
def own_bundle(once: Callable[..., Path], small_checkpoint: Path, cache: Path) -> Bundle:
    """An fp32 bundle for ONNX Runtime alone; with one size, so that the denoiser's upsampling is rewritten too."""
    options = BuildOptions(
        height=32, width=32, frames="2:3:5", ff_chunks=2, precision="fp32", backend="onnxruntime", cache=cache
    )
    return Bundle.open(once("own", lambda path: build_bundle(small_checkpoint, path, options)))


def kinds_of(bundle: Bundle, name: NetworkName) -> collections.Counter[tuple[str, str]]:
    graph = onnx.load(bundle.onnx_path(name), load_external_data=False).graph
    return collections.Counter((node.domain, node.op_type) for node in graph.node)


def test_has_its_operators(own_bundle: Bundle) -> None:
    assert own_bundle.manifest.graph.operators == "onnxruntime"
    kinds = kinds_of(own_bundle, "denoiser")
    assert kinds["com.microsoft", "MultiHeadAttention"]
    for name in OWN:
        kinds = kinds_of(own_bundle, name)
        assert not kinds["", "Softmax"]
        assert not kinds["", "DepthToSpace"]


def test_bundles_with_engines_are_standard(dynamic_bundle: Bundle) -> None:
    assert dynamic_bundle.manifest.graph.operators == "onnx"
    for name in OWN:
        assert {domain for domain, _ in kinds_of(dynamic_bundle, name)} == {""}


@pytest.mark.parametrize("end", END)
@pytest.mark.parametrize("name", OWN)
def test_network(name: NetworkName, end: str, own_bundle: Bundle, small_checkpoint: Path, record_property: Any) -> None:
    check_network(own_bundle, name, end, small_checkpoint, record_property)


def test_half_precision_leaves_the_attention_as_it_is(small_checkpoint: Path) -> None:
    """ONNX Runtime's operator keeps scores in fp32, so no weight is scaled for them."""
    checkpoint = open_checkpoint(str(small_checkpoint))
    theirs = [layer for layer in checkpoint.load("unet", torch.float16).modules() if isinstance(layer, Attention)]
    own = make_network("denoiser", checkpoint.load("unet", torch.float16), operators="onnxruntime")
    ours = [layer for layer in own.modules() if isinstance(layer, FusedAttention)]
    assert ours
    weights = {
        tensor.detach().numpy().tobytes() for layer in theirs for tensor in (layer.to_q.weight, layer.to_k.weight)
    }
    for layer in ours:
        assert layer.scale == pytest.approx((layer.to_q.out_features // layer.heads) ** -0.5)
        assert layer.to_q.weight.numpy().tobytes() in weights
        assert layer.to_k.weight.numpy().tobytes() in weights


@pytest.mark.parametrize(
    ("options", "own"),
    [
        ({"backend": "onnxruntime", "precision": "fp32"}, True),
        ({"backend": "onnxruntime", "precision": "fp16"}, False),
        ({"backend": "onnxruntime", "precision": "fp16", "operators": "onnxruntime"}, True),
        ({"backend": "onnxruntime", "precision": "fp32", "operators": "onnx"}, False),
        ({"backend": "tensorrt", "operators": "onnxruntime"}, "add --backend onnxruntime"),
        ({"backend": "onnxruntime", "operators": "onnxruntime", "rewrites": False}, "leave out --no-rewrites"),
    ],
)
def test_who_gets_them(options: dict[str, Any], own: bool | str) -> None:
    if isinstance(own, str):
        with pytest.raises(ArgumentError, match=own):
            _ = BuildOptions(**options).graph
    else:
        assert (BuildOptions(**options).graph.operators == "onnxruntime") == own


@pytest.mark.slow
def test_decoder_of_any_size(small_checkpoint: Path, tmp_path: Path, record_property: Any) -> None:
    """Symbolic sizes leave the upsampling as it is; the other layers are those for ONNX Runtime."""
    checkpoint = open_checkpoint(str(small_checkpoint))
    sides = Range(40, 72, 136)
    ranges = ranges_of(BuildOptions(height=sides, width=sides, decode_chunk="1:2:4"), checkpoint.description.model)
    spec = network_specs(checkpoint.description.model, ranges)["vae_decoder"]
    vae = checkpoint.load("vae", torch.float32)
    path = tmp_path / "decoder.onnx"
    export_network(make_network("vae_decoder", vae, operators="onnxruntime"), spec, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with load_models(checkpoint, "vae_decoder") as models:
        for end in END:
            inputs = draw_inputs(spec, sizes_at(spec, end))
            (theirs,) = diffusers_output(models, "vae_decoder", inputs)
            (ours,) = session.run(None, inputs)
            difference = float(np.abs(ours.astype(float) - theirs).max())
            record_property(f"largest_difference_{end}", difference)
            assert difference <= TOLERANCE["fp32"]["vae_decoder"]


@pytest.mark.parametrize(("channels", "out"), [(8, 8), (6, 10)])
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (4, 2)])
@torch.no_grad()
def test_upsampling_by_phases(size: tuple[int, int], channels: int, out: int) -> None:
    """Equal to the pixel shuffle, and up to rounding to nearest upsampling followed by the convolution."""
    torch.manual_seed(0)
    nearest = CroppedUpsample(SimpleNamespace(conv=nn.Conv2d(channels, out, 3, padding=1)))
    shuffled = SubpixelUpsample(nearest)
    hidden = torch.randn(3, channels, *size)
    phased = PhasedUpsample(shuffled)(hidden)
    torch.testing.assert_close(phased, shuffled(hidden), rtol=0, atol=1e-6)
    torch.testing.assert_close(phased, nearest(hidden), rtol=0, atol=2e-6)


@pytest.mark.parametrize("chunks", [1, 3, 8])
@pytest.mark.parametrize("shape", [(2, 5, 16), (2, 7, 3, 16), (1, 2, 16)])
@torch.no_grad()
def test_feed_forward_over_a_list_of_tokens(shape: tuple[int, ...], chunks: int) -> None:
    """Also with fewer tokens than parts, when some parts are empty."""
    torch.manual_seed(0)
    plain = FeedForward(16, activation_fn="geglu")
    norm = nn.LayerNorm(16)
    layer = ResidualFeedForward(norm, SplitFeedForward(plain))
    hidden = torch.randn(shape)
    torch.testing.assert_close(TokenFeedForward(layer, chunks)(hidden), hidden + plain(norm(hidden)), rtol=0, atol=1e-6)
