"""A small network with a convolution, normalisations, attention and a feed-forward, and the builder's log of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from svd_trt.engine.builder_log import concerns_kernels
from svd_trt.engine.spec import NetworkSpec, Range, Symbol, TensorSpec
from svd_trt.engine.tensorrt_import import find_tensorrt

CHANNELS, HEADS, SIDE = 64, 2, 16
PIXELS = SIDE * SIDE

SPEC = NetworkSpec(
    "vae_decoder",
    (TensorSpec("latents", "float32", (Symbol("chunk"), CHANNELS, SIDE, SIDE), ""),),
    (TensorSpec("frames", "float32", (Symbol("chunk"), PIXELS, CHANNELS), ""),),
    {"chunk": Range(1, 4, 8)},
)
EXACT = {"chunk": Range(4, 4, 4)}


def write_block(path: Path) -> None:
    """Write the network in half precision, with ``chunk`` as its dynamic axis."""
    random = np.random.default_rng(0)
    weights: list[Any] = []
    nodes: list[Any] = []

    def constant(name: str, value: Any, dtype: Any = np.float16) -> str:
        weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add(op: str, name: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, list(inputs), [name], f"node_{name}", **attributes))
        return name

    def linear(name: str, x: str, columns: int, rows: int = CHANNELS) -> str:
        return add("MatMul", name, x, constant(f"{name}_w", random.normal(size=(rows, columns)) / 16))

    def heads(name: str, x: str, order: list[int]) -> str:
        split = add("Reshape", f"{name}_split", x, constant(f"{name}_s", [0, PIXELS, HEADS, -1], np.int64))
        return add("Transpose", name, split, perm=order)

    x = add("Cast", "x", "latents", to=TensorProto.FLOAT16)
    filters = constant("filters", random.normal(size=(CHANNELS, CHANNELS, 3, 3)) / 32)
    x = add("Conv", "conv", x, filters, pads=[1, 1, 1, 1])
    scale, bias = constant("scale", np.ones(CHANNELS)), constant("bias", np.zeros(CHANNELS))
    x = add("GroupNormalization", "norm", x, scale, bias, num_groups=32)
    x = add("Reshape", "flat", x, constant("flat_s", [0, CHANNELS, PIXELS], np.int64))
    tokens = add("Transpose", "tokens", x, perm=[0, 2, 1])
    normed = add(
        "LayerNormalization",
        "layer_norm",
        tokens,
        constant("ln_w", np.ones(CHANNELS)),
        constant("ln_b", np.zeros(CHANNELS)),
    )
    q = heads("q", linear("to_q", normed, CHANNELS), [0, 2, 1, 3])
    k = heads("k", linear("to_k", normed, CHANNELS), [0, 2, 3, 1])
    v = heads("v", linear("to_v", normed, CHANNELS), [0, 2, 1, 3])
    scores = add("Mul", "scaled", add("MatMul", "scores", q, k), constant("factor", 0.1767))
    mixed = add("MatMul", "mixed", add("Softmax", "softmax", scores), v)
    back = add("Transpose", "back", mixed, perm=[0, 2, 1, 3])
    joined = add("Reshape", "joined", back, constant("joined_s", [0, PIXELS, CHANNELS], np.int64))
    x = add("Add", "added", linear("to_out", joined, CHANNELS), tokens)
    wide = add("Gelu", "gelu", linear("up", x, 4 * CHANNELS))
    x = add("Add", "result", linear("down", wide, CHANNELS, 4 * CHANNELS), x)
    add("Cast", "frames", x, to=TensorProto.FLOAT)
    axes = [TensorProto.FLOAT, ["chunk", CHANNELS, SIDE, SIDE]], [TensorProto.FLOAT, ["chunk", PIXELS, CHANNELS]]
    ends = [helper.make_tensor_value_info(name, *a) for name, a in zip(("latents", "frames"), axes, strict=True)]
    graph = helper.make_graph(nodes, "block", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)


def build_log(path: Path, *profiles: dict[str, Range]) -> list[str]:
    """The builder's messages about kernels, for an engine of `write_block` with ``profiles``."""
    trt = find_tensorrt("tensorrt-rtx").trt

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if concerns_kernels(message):
                self.messages.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse(path.read_bytes()), parser.get_error(0).desc()
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for ranges in profiles:
        profile = builder.create_optimization_profile()
        ends = ({s: getattr(r, end) for s, r in ranges.items()} for end in ("min", "opt", "max"))
        profile.set_shape("latents", *(SPEC.inputs[0].resolve(sizes) for sizes in ends))
        config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
    return log.messages
