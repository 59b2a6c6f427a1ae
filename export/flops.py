"""Arithmetic of a network, counted from its ONNX graph.

As papers count them: two operations for every multiply-add of matrix products and convolutions, which are more than
99 % of the work. Normalisations, activations and other passes over memory are left out.
"""

from __future__ import annotations

import math
from pathlib import Path

import onnx_ir as ir
from onnxscript import optimizer

from svd_trt.engine.spec import NetworkSpec
from svd_trt.errors import ExportError
from svd_trt.export.silence import silence_libraries

__all__ = ["count_flops"]


def count_flops(onnx_path: Path, spec: NetworkSpec) -> int:
    """Floating-point operations of one run of the network at the largest sizes in the ranges of ``spec``.

    Only the graph and the constants in it are read, not the weights.

    Raises:
        ExportError: the shape of a product cannot be inferred from those of the inputs.
    """
    sizes = {symbol: r.max for symbol, r in spec.ranges.items()}
    model = ir.load(onnx_path)
    _allow_hard_links(model, onnx_path.parent)
    for value, tensor in zip(model.graph.inputs, spec.inputs, strict=True):
        value.shape = ir.Shape(tensor.resolve(sizes))
    for node in model.graph:
        for value in node.outputs:
            value.shape = None  # the exported shapes have symbols
        if node.op_type == "GroupNormalization":
            # ONNX infers no shape for it; the shape of an instance normalisation is the same.
            node.op_type = "InstanceNormalization"
            node.attributes.clear()
    with silence_libraries():
        optimizer.fold_constants(model, onnx_shape_inference=True)  # with sizes as numbers, all shapes become numbers
    return sum(_operations(node) for node in model.graph)


def _allow_hard_links(model: ir.Model, folder: Path) -> None:
    """Name external data by its absolute path, for which onnx_ir does not refuse files with several hard links.

    A network that a build reuses is a hard link to the file of the older bundle.
    """
    for value in model.graph.initializers.values():
        data = value.const_value
        if isinstance(data, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                str(folder.absolute() / data.location),
                data.offset,
                data.length,
                data.dtype,
                shape=ir.Shape(data.shape),
                name=data.name or "",
            )


def _operations(node: ir.Node) -> int:
    if node.op_type not in {"MatMul", "Gemm", "Conv", "ConvTranspose"}:
        return 0
    left, right, out = _shape(node, node.inputs[0]), _shape(node, node.inputs[1]), _shape(node, node.outputs[0])
    if node.op_type == "ConvTranspose":
        return 2 * math.prod(left) * math.prod(right[1:])  # [C, C', kernel]: products with one input value
    if node.op_type == "Conv":
        each = math.prod(right[1:])  # [C', C, kernel]: products for one output value
    elif node.op_type == "Gemm":
        transposed = node.attributes.get_int("transA", 0)
        each = left[0] if transposed else left[1]
    else:
        each = left[-1]
    return 2 * math.prod(out) * each


def _shape(node: ir.Node, value: ir.Value | None) -> tuple[int, ...]:
    shape = None if value is None else value.shape
    if shape is None or not all(isinstance(axis, int) for axis in shape):
        raise ExportError(f"the shapes of {node.name} ({node.op_type}) cannot be inferred from its network's inputs")
    return tuple(int(axis) for axis in shape if isinstance(axis, int))
