"""Exact rewrites: the same function of the same weights, with less arithmetic, memory or risk of overflow.

Each is a function that changes a model in place, in one module with the layers that it inserts:

- `cross_attention_to_values` (transformer.py): attention to a single token is its value path.
- `tabulate_frame_positions` (transformer.py): the embedding of a frame's position is a constant.
- `temporal_convolutions_2d` (resnet.py): convolutions over frames in two dimensions, blending folded into them.
- `constant_blends` (blend.py): without image-only frames every AlphaBlender is one number.
- `split_feed_forwards` (feed_forward.py): both halves of a gated product separately; optional chunks of tokens.
- `bound_attention` (attention.py): scores that fit into half precision, softmax in fp32.
- `subpixel_upsampling` (upsample.py): one transposed convolution instead of enlarging and convolving.
- `put_tokens_first` (tokens_first.py): transformers in the order of axes that TensorRT's attention wants.
- `normalise_by_statistics` (statistics.py): normalisations that TensorRT does not fuse, with fewer reads.

For bundles that only ONNX Runtime will run, `fuse_for_onnxruntime` (onnxruntime.py) is applied instead of the last two.

"Exact" means in real numbers: in fp32 the outputs differ only by rounding, and the tests set bounds for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from svd_trt.engine.manifest import Operators
from svd_trt.export.rewrites.attention import bound_attention
from svd_trt.export.rewrites.blend import constant_blends
from svd_trt.export.rewrites.feed_forward import split_feed_forwards
from svd_trt.export.rewrites.resnet import temporal_convolutions_2d
from svd_trt.export.rewrites.statistics import normalise_by_statistics
from svd_trt.export.rewrites.tokens_first import put_tokens_first
from svd_trt.export.rewrites.transformer import cross_attention_to_values, tabulate_frame_positions
from svd_trt.export.rewrites.upsample import subpixel_upsampling

__all__ = ["REWRITES", "rewrite"]

REWRITES: tuple[Callable[[Any], int], ...] = (
    cross_attention_to_values,
    tabulate_frame_positions,
    temporal_convolutions_2d,
    constant_blends,
    split_feed_forwards,
    bound_attention,
    subpixel_upsampling,
    put_tokens_first,
    normalise_by_statistics,
)
"""In the order in which they are applied; each takes a model, changes it, and returns how many places it changed."""


def rewrite(model: Any, *, ff_chunks: int = 1, doubling: bool = True, operators: Operators = "onnx") -> dict[str, int]:
    """Apply the rewrites to a UNet, a VAE decoder or any part of one, in place; returns places changed by name.

    Args:
        model: its upsamplers already replaced by `svd_trt.export.rewrites.upsample.CroppedUpsample`.
        ff_chunks: see `split_feed_forwards`.
        doubling: upsampling doubles sizes exactly and crops nothing; if not, `subpixel_upsampling` is not applied.
        operators: for ``onnxruntime`` the rewrites that only TensorRT gains from are left out.
    """
    left_out = set() if doubling else {subpixel_upsampling}
    if operators == "onnxruntime":
        left_out |= {put_tokens_first, normalise_by_statistics}
    changed = {}
    for function in REWRITES:
        if function is split_feed_forwards:
            changed[function.__name__] = split_feed_forwards(model, chunks=ff_chunks)
        elif function is bound_attention:
            changed[function.__name__] = bound_attention(model, stored_scores=operators == "onnx")
        elif function not in left_out:
            changed[function.__name__] = function(model)
    return changed
