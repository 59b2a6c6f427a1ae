"""TensorRT fuses the rewritten layers, as the memory that its builder reports shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from svd_trt.engine.plan import build_plan
from svd_trt.engine.spec import NetworkSpec, Range, Symbol, TensorSpec
from svd_trt.engine.tensorrt_import import find_tensorrt
from svd_trt.export.onnx_export import export_network
from svd_trt.export.rewrites.attention import BoundedAttention
from svd_trt.export.rewrites.feed_forward import SplitFeedForward

pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx", reason="TensorRT for RTX is not installed (svd-trt[rtx])")

TOKENS, CHANNELS, HEADS, FRAMES = 2304, 128, 2, 4
STREAM = FRAMES * TOKENS * CHANNELS * 2
"""Bytes of one half-precision tensor of the layer."""


class InHalf(nn.Module):
    """A layer with its residual connection, with fp32 inputs and outputs as networks have them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        half = hidden.half()
        result: Tensor = (half + self.layer(half)).float()
        return result


def activations(layer: nn.Module, folder: Path) -> int:
    shape = (Symbol("frames"), TOKENS, CHANNELS)
    spec = NetworkSpec(
        "denoiser",
        (TensorSpec("hidden", "float32", shape, ""),),
        (TensorSpec("out", "float32", shape, ""),),
        {"frames": Range(2, FRAMES, FRAMES)},
    )
    export_network(InHalf(layer).eval().requires_grad_(requires_grad=False), spec, folder / "layer.onnx")
    report = build_plan(find_tensorrt("tensorrt-rtx"), folder / "layer.onnx", spec, folder / "layer.plan")
    (needed,) = report.activation_bytes
    assert needed is not None
    return needed


def test_scores_are_never_stored(tmp_path: Path, record_property: Any) -> None:
    layer = BoundedAttention(Attention(CHANNELS, heads=HEADS, dim_head=CHANNELS // HEADS).half())
    scores = FRAMES * HEADS * TOKENS * TOKENS * 2
    needed = activations(layer, tmp_path)
    record_property("share_of_scores", needed / scores)
    assert needed < scores / 4


def test_halves_and_chunks_need_less(tmp_path: Path, record_property: Any) -> None:
    plain = FeedForward(CHANNELS, activation_fn="geglu").half()
    needs = [activations(plain, tmp_path)]
    needs += [activations(SplitFeedForward(plain, chunks), tmp_path) for chunks in (1, 2, 4)]
    record_property("streams_of_plain_and_1_2_4_chunks", " ".join(f"{need / STREAM:.2f}" for need in needs))
    assert needs == sorted(needs, reverse=True)
    assert needs[-1] < 0.7 * needs[0]
