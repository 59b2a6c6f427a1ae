"""When half precision overflows in the plain layers, the rewritten ones give the result of fp32.

Layers are run in fp16 as an engine may run them: every product and every tensor between is rounded to half. (torch's
own attention on a CPU adds up in fp32, which hides the overflow; so the plain one is written out here, in the order of
the plain ONNX graph.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor

from svd_trt.export.rewrites.attention import BoundedAttention
from svd_trt.export.rewrites.feed_forward import SplitFeedForward
from svd_trt.export.rewrites.onnxruntime import FusedAttention
from svd_trt.export.silence import silence_libraries

TOKENS, CHANNELS, HEADS = 96, 128, 2


def plain_attention(layer: Any, hidden: Tensor) -> Tensor:
    """diffusers' self-attention as exported: both factors scaled by the root of the scale, then the product."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    query, key, value = (heads(project(hidden)) for project in (layer.to_q, layer.to_k, layer.to_v))
    root = (query.shape[-1] ** -0.5) ** 0.5
    scores = (query * root) @ (key * root).transpose(-1, -2)
    mixed = torch.softmax(scores, dim=-1) @ value
    result: Tensor = layer.to_out[0](mixed.transpose(1, 2).flatten(2))
    return result


@pytest.fixture
def attention() -> Any:
    torch.manual_seed(0)
    layer = Attention(CHANNELS, heads=HEADS, dim_head=CHANNELS // HEADS).eval()
    return layer.requires_grad_(requires_grad=False)


@pytest.mark.parametrize("size", [1.0, 300.0, 10000.0])
def test_large_keys_of_small_queries(size: float, attention: Any, record_property: Any) -> None:
    """Their products fit into half precision: making them smaller loses nothing."""
    attention.to_k.weight.mul_(size)
    attention.to_q.weight.mul_(30 / size if size > 1 else 1)
    compare(attention, torch.randn(2, TOKENS, CHANNELS), 3e-2, overflows=False, record_property=record_property)


def test_large_keys_in_the_operator_of_onnxruntime(attention: Any, tmp_path: Path, record_property: Any) -> None:
    """It keeps scores in fp32, so its weights are those of the checkpoint."""
    for layer in (attention.to_q, attention.to_k):
        layer.weight.copy_(torch.eye(CHANNELS) * 1500.0)
    hidden = torch.randn(2, TOKENS, CHANNELS)
    exact = attention(hidden)
    own = FusedAttention(BoundedAttention(attention.half(), stored_scores=False)).eval()
    with silence_libraries():
        torch.onnx.export(own, (hidden.half(),), tmp_path / "layer.onnx", dynamo=True, optimize=False, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: hidden.half().numpy()})
    error = float((torch.from_numpy(found).float() - exact).norm() / exact.norm())
    record_property("relative_error", error)
    assert error <= 1e-2


@pytest.mark.parametrize("size", [128.0, 400.0, 1500.0])
def test_large_keys(size: float, attention: Any, record_property: Any) -> None:
    """Each token attends only to itself, with scores of 130,000 to 18,000,000."""
    for layer in (attention.to_q, attention.to_k):
        layer.weight.copy_(torch.eye(CHANNELS) * size)
    compare(attention, torch.randn(2, TOKENS, CHANNELS), 1e-2, overflows=True, record_property=record_property)


@pytest.mark.parametrize("scores", [300.0, 1500.0, 6000.0])
def test_large_scores_that_compete(scores: float, attention: Any, record_property: Any) -> None:
    """All keys have a large common part; their small differences decide, and half precision rounds these."""
    hidden = torch.randn(2, TOKENS, CHANNELS)
    hidden[..., 0] = 1.0
    size = (scores / 8) ** 0.5  # of each of 64 products, over the root of 64
    for layer in (attention.to_q, attention.to_k):
        layer.weight[:, 1:].mul_(0.3)
        layer.weight[:, 0] = size
    reference = attention(hidden)
    half = attention.half()
    plain, ours = (
        float((layer.float() - reference).norm() / reference.norm())
        for layer in (plain_attention(half, hidden.half()), BoundedAttention(half)(hidden.half()))
    )
    record_property("relative_error_plain_and_ours", f"{plain:.3f} {ours:.3f}")
    assert ours <= 1.2 * plain


def test_zero_weights(attention: Any) -> None:
    """An untrained layer has nothing to balance, which must not fail."""
    attention.to_q.weight.zero_()
    half = bounded(attention)
    assert torch.isfinite(half(torch.randn(1, TOKENS, CHANNELS).half())).all()


def test_large_activations(attention: Any, record_property: Any) -> None:
    """One token is much larger than the others, and the queries match it."""
    hidden = torch.randn(1, TOKENS, CHANNELS)
    hidden[:, 0] = 3000
    hidden[:, :, 0] = hidden[:, :, 0].abs() + 10
    attention.to_q.weight.copy_(torch.zeros(CHANNELS, CHANNELS))
    attention.to_q.weight[:, 0] = 1.0
    attention.to_k.weight.abs_()
    compare(attention, hidden, 1e-2, overflows=True, record_property=record_property)


def test_beyond_every_bound_is_finite(attention: Any) -> None:
    half = bounded(attention)
    half.to_q.weight.copy_(torch.randn_like(half.to_q.weight) * 1000)
    half.to_k.weight.copy_(torch.randn_like(half.to_k.weight) * 1000)
    assert torch.isfinite(half(torch.randn(1, TOKENS, CHANNELS).half())).all()


def bounded(attention: Any) -> Any:
    return BoundedAttention(attention.half())


def compare(attention: Any, hidden: Tensor, bound: float, *, overflows: bool, record_property: Any) -> None:
    reference = attention(hidden)
    half = attention.half()
    assert torch.isfinite(plain_attention(half, hidden.half())).all() != overflows, "the test is not the one meant"
    ours = BoundedAttention(half)(hidden.half()).float()
    assert torch.isfinite(ours).all()
    difference = float((ours - reference).abs().max() / reference.std())
    record_property("relative_difference", difference)
    assert difference <= bound


def test_large_gates(record_property: Any) -> None:
    """Value times gate is infinite in half precision, but the layer's output is finite."""
    torch.manual_seed(0)
    layer = FeedForward(CHANNELS, activation_fn="geglu").eval().requires_grad_(requires_grad=False)
    layer.net[2].weight.mul_(0.01)
    hidden = torch.randn(2, TOKENS, CHANNELS) * 250
    reference = layer(hidden)
    assert reference.abs().max() < 60000
    layer.half()
    assert not torch.isfinite(layer(hidden.half())).all()
    ours = SplitFeedForward(layer)(hidden.half()).float()
    difference = float((ours - reference).abs().max() / reference.std())
    record_property("relative_difference", difference)
    assert difference <= 1e-2
