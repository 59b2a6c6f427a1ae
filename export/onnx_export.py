"""Torch module to ONNX file, with the symbolic axes of its specification.

Torch exports and translates the network. The passes of onnxscript's optimizer then clean the graph, except for its
pattern rewriter, which is quadratic in the number of nodes (half of the whole export on a small UNet) and
whose fusions TensorRT and ONNX Runtime find by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import Sequential, common
from onnxscript import opset18, optimizer
from torch.export import Dim

from svd_trt.engine.spec import LARGEST_COUNT, NetworkSpec, Symbol, TensorSpec
from svd_trt.errors import ExportError, first_line
from svd_trt.export.silence import silence_libraries

__all__ = ["OPSET", "OnnxReport", "export_network"]

OPSET = 20
_OPSET_OF_GROUP_NORMALIZATION = 21

# Traced sizes of symbolic axes. Any values do, as long as none is 0 or 1, which torch.export takes for constants;
# odd ones keep it from concluding that a size is always even.
_TRACED = {"batch": 2, "pictures": 2, "branches": 2, "frames": 3, "chunk": 3, "height": 21, "width": 27}


@dataclass(frozen=True)
class OnnxReport:
    """An exported network: its files, the graph first, and its size."""

    files: tuple[Path, ...]
    nodes: int
    parameters: int


def export_network(
    module: torch.nn.Module,
    spec: NetworkSpec,
    path: Path,
    *,
    smallest_latent: int = 2,
    fp32_statistics: bool = False,
) -> OnnxReport:
    """Write ``path`` and ``path.data``: the network with tensors named, shaped and ordered as in ``spec``.

    Args:
        module: takes the inputs of ``spec`` in order and returns its outputs.
        spec: symbolic axes become dynamic, integers become constants.
        path: the ``.onnx`` file; weights go beside it, as external data.
        smallest_latent: least height and width of the smallest pictures that the network takes, latents or features of
            half their size, if those are symbolic.
        fp32_statistics: write group normalisation as the operator of that name, which computes mean and variance in
            fp32 whatever its input, instead of as an instance normalisation of the input's type. TensorRT needs no
            more memory for it (with casts around it, twice as much); ONNX Runtime on a CPU is slower with it.

    Raises:
        ExportError: torch could not trace or translate the network.
    """
    factor = _latent_factor(spec)
    arguments = tuple(torch.zeros(_traced_shape(t, factor), dtype=getattr(torch, t.dtype)) for t in spec.inputs)
    shapes = _dynamic_shapes(spec, factor, smallest_latent)
    try:
        with silence_libraries(), torch.no_grad():
            program = torch.export.export(
                module,
                arguments,
                dynamic_shapes=shapes,
                strict=False,
                # Guards such as "the upsampled size covers the skip connection" hold for every size, but the
                # symbolic solver cannot prove it; as run-time assertions they are dropped from the graph.
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            translated = _translate(
                program,
                opset_version=_OPSET_OF_GROUP_NORMALIZATION if fp32_statistics else OPSET,
                input_names=[t.name for t in spec.inputs],
                output_names=[t.name for t in spec.outputs],
            )
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        raise ExportError(f"{spec.name} could not be exported to ONNX: {first_line(error)}") from error
    model = translated.model
    _clean(model)
    _name_axes(model, spec)
    weights = path.with_name(f"{path.name}.data")
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (path, weights):
        leftover.unlink(missing_ok=True)
    with silence_libraries():
        translated.save(path, external_data=True)
    onnx.checker.check_model(str(path))
    return OnnxReport(
        files=(path, weights) if weights.exists() else (path,),
        nodes=model.graph.num_nodes(),
        parameters=_parameters(model),
    )


def _translate(program: torch.export.ExportedProgram, **options: Any) -> torch.onnx.ONNXProgram:
    """The program in ONNX.

    Torch traces the program once more to decompose its operators, which takes as long as the first time. Nearly all of
    them have a translation as they are, so that is tried first. The second trace is needed for an operator without one,
    for one that changes a tensor in place, after an operator of ONNX Runtime's own, and for shapes of several symbolic
    axes: TensorRT does not find their limits in the form that the translations give them.
    """
    if not any(_needs_decomposition(node) for node in program.graph.nodes):
        _simplify(program.graph_module)
        decompose = program.run_decompositions
        program.run_decompositions = lambda _table=None: program
        try:
            return _to_onnx(program, custom_translation_table=_TRANSLATIONS, **options)
        except torch.onnx.errors.OnnxExporterError:
            pass
        finally:
            program.run_decompositions = decompose
    return _to_onnx(program, **options)


def _to_onnx(program: torch.export.ExportedProgram, **options: Any) -> torch.onnx.ONNXProgram:
    translated = torch.onnx.export(program, (), dynamo=True, optimize=False, verbose=False, **options)
    assert translated is not None
    return translated


def _cast(value: Any, dtype: int, *_: Any, **__: Any) -> Any:
    return opset18.Cast(value, to=dtype)


def _conv_transpose(
    value: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    output_padding: Sequence[int] = (0, 0),
    groups: int = 1,
    dilation: Sequence[int] = (1, 1),
) -> Any:
    return opset18.ConvTranspose(
        value,
        weight,
        bias,
        strides=list(stride),
        pads=[*padding, *padding],
        output_padding=list(output_padding),
        group=groups,
        dilations=list(dilation),
    )


_FLATTENING = (torch.ops.aten.flatten.using_ints, torch.ops.aten.unflatten.int)

# Operators that torch.onnx knows only in their decomposed form.
_TRANSLATIONS: dict[Any, Any] = {
    torch.ops.aten.to.dtype: _cast,
    torch.ops.aten.conv_transpose2d.input: _conv_transpose,
}


def _needs_decomposition(node: torch.fx.Node) -> bool:
    if node.target in _FLATTENING:
        return _is_output(node) or _reshape_to(node) is None
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    # The shape of an operator of ONNX Runtime's own cannot be inferred, so those after it have to be written in full.
    return node.target._schema.is_mutable or node.target.namespace == "onnx_symbolic"


def _is_output(node: torch.fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _simplify(module: torch.fx.GraphModule) -> None:
    """Remove conversions of a tensor to the type that it has, and write flatten and unflatten as reshapes.

    The translations of these two compute their shapes with three nodes and more.
    """
    for node in list(module.graph.nodes):
        new = None
        if _is_output(node):  # the program knows it by its name
            continue
        if node.target is torch.ops.aten.to.dtype and node.args[0].meta["val"].dtype == node.args[1]:
            new = node.args[0]
        elif node.target in _FLATTENING:
            with module.graph.inserting_before(node):
                shape = [_size(module.graph, node, size) for size in _reshape_to(node) or ()]
                new = module.graph.call_function(torch.ops.aten.reshape.default, (node.args[0], shape))
            new.meta = dict(node.meta)
        if new is not None:
            node.replace_all_uses_with(new)
            module.graph.erase_node(node)
    module.recompile()


def _size(graph: torch.fx.Graph, node: torch.fx.Node, size: int | torch.fx.Node | str) -> int | torch.fx.Node:
    """One size of `_reshape_to`; that of an axis of the input becomes a node in ``graph``."""
    if not isinstance(size, str):
        return size
    new = graph.call_function(torch.ops.aten.sym_size.int, (node.args[0], int(size)))
    new.meta["val"] = node.args[0].meta["val"].shape[int(size)]  # type: ignore[union-attr]
    return new


def _reshape_to(node: torch.fx.Node) -> list[int | torch.fx.Node | str] | None:
    """The shape that ``node`` gives: a number, a node, or, as text, the input's axis of that number.

    One axis is -1. None if two symbolic axes are neither named nor the input's.
    """
    source = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    axes = {str(size): str(axis) for axis, size in enumerate(source) if not isinstance(size, int)}
    shape: list[Any] = [size if isinstance(size, int) else axes.get(str(size), -1) for size in node.meta["val"].shape]
    if node.target is torch.ops.aten.unflatten.int:
        _, axis, sizes = node.args
        assert isinstance(axis, int)
        assert isinstance(sizes, list | tuple)
        for offset, size in enumerate(sizes):
            if isinstance(size, torch.fx.Node) and shape.count(-1) > 1:
                shape[axis % len(source) + offset] = size
    if -1 not in shape:
        last = next((i for i, size in reversed(list(enumerate(shape))) if isinstance(size, str)), None)
        if last is not None:
            shape[last] = -1
    return shape if shape.count(-1) <= 1 else None


def _parameters(model: ir.Model) -> int:
    """Number of weights, which are the initializers of floating point; the others are shapes and indices."""
    weights = (value.const_value for value in model.graph.initializers.values())
    return sum(int(w.size) for w in weights if w is not None and w.dtype.is_floating_point())


def _latent_factor(spec: NetworkSpec) -> int:
    """The largest divisor in the axes of inputs: the VAE's scale factor, or twice that.

    The inputs of the VAE's encoder are whole pictures, so its factor is that of its output. 1 if no axis is divided.
    """
    for tensors in (spec.inputs, spec.outputs):
        axes = (axis for tensor in tensors for axis in tensor.shape if isinstance(axis, Symbol))
        if (largest := max((axis.divisor for axis in axes), default=1)) > 1:
            return largest
    return 1


def _traced_shape(tensor: TensorSpec, factor: int) -> tuple[int, ...]:
    pixels = {"height": _TRACED["height"] * factor, "width": _TRACED["width"] * factor}
    return tensor.resolve(_TRACED | pixels)


def _dynamic_shapes(spec: NetworkSpec, factor: int, smallest_latent: int) -> list[dict[int, Any]]:
    smallest = {s: Dim(f"latent_{s}", min=smallest_latent) for s in ("height", "width")}
    dims: dict[str, Any] = {
        "batch": Dim("batch", min=1, max=LARGEST_COUNT),
        "pictures": Dim("pictures", min=1, max=LARGEST_COUNT),
        "branches": Dim("branches", min=1, max=2),
        "frames": Dim("frames", min=2, max=LARGEST_COUNT),
        "chunk": Dim("chunk", min=1, max=LARGEST_COUNT),
    }
    axes = {axis for tensor in spec.inputs for axis in tensor.shape if isinstance(axis, Symbol)}
    for axis in axes:
        if axis.symbol in smallest:
            times, dim = factor // axis.divisor, smallest[axis.symbol]
            dims[str(axis)] = times * dim if times > 1 else dim
    return [{i: dims[str(axis)] for i, axis in enumerate(t.shape) if isinstance(axis, Symbol)} for t in spec.inputs]


def _clean(model: ir.Model) -> None:
    """Inline torchlib's functions, fold constants, and drop the stack traces that the exporter leaves on nodes."""
    optimizer.inline(model)
    optimizer.fold_constants(model)
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
        common.ClearMetadataAndDocStringPass(),
    )(model)


def _name_axes(model: ir.Model, spec: NetworkSpec) -> None:
    """Write the specification's symbols over the exporter's (``s19``), so that the file explains itself."""
    for value, tensor in zip((*model.graph.inputs, *model.graph.outputs), spec.tensors, strict=True):
        if value.name != tensor.name:
            raise ExportError(f"{spec.name}: the exporter renamed {tensor.name} to {value.name}")
        value.shape = ir.Shape(axis if isinstance(axis, int) else str(axis) for axis in tensor.shape)
