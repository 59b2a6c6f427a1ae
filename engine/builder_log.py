"""What TensorRT's builder logs about a network's layers and about the kernels that it compiled from them.

With ``profiling_verbosity`` DETAILED the log has a line for each kernel: its name, inputs, constants, outputs and the
ONNX nodes that were fused into it. Before that, TensorRT for RTX describes every layer with its axes; an axis that
depends on the dynamic ones is an expression over their names (see `svd_trt.engine.size_expressions`). TensorRT
documents neither form, so a line that does not match is passed over.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

import msgspec

__all__ = ["LoggedKernel", "LoggedLayer", "LoggedTensor", "concerns_kernels", "read_log"]

_KERNEL = re.compile(r"\s*(?:Layers:\s*)?Name: (?P<name>.*?), LayerType: (?P<type>[\w/]+)(?P<rest>.*)", re.DOTALL)
_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), (?P<fields>[^{}]*)\}")
_DIMENSIONS = re.compile(r"Dimensions: \[([-\d,\s]*)\]")
_STRIDES = re.compile(r"Strides: \[([-\d,\s]*)\]")
_DATATYPE = re.compile(r"Datatype: ([^,}]*)")
_FORMATS = {"FP32": "Float", "FP16": "Half", "BF16": "BFloat16", "INT8": "Int8", "INT32": "Int32", "INT64": "Int64"}
_ONNX = re.compile(r"\[ONNX Layer: (.*?)\]")
_PROFILE = re.compile(r" \[profile (\d+)\]")
_SUBGRAPH = re.compile(r"_myl(\d+)(?:_\d+)?$")

_LAYER = re.compile(r"([A-Z][A-Z_]*) (\S.*)$")
_SIDE = re.compile(r"    (Input|Output) \d+$")
_AXIS = re.compile(r"        \S+\t(.+)$")
_DESCRIPTION = re.compile(rf"(?:{_LAYER.pattern}|{_SIDE.pattern}|{_AXIS.pattern})")


class LoggedTensor(msgspec.Struct, frozen=True):
    """A tensor as a kernel sees it; unknown axes and strides are -1, and strides are () if the log has none."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]


class LoggedKernel(msgspec.Struct, frozen=True):
    """A kernel of the optimisation profile ``profile``; ``layers`` are the ONNX nodes that were fused into it."""

    name: str
    type: str
    profile: int
    inputs: tuple[LoggedTensor, ...]
    constants: tuple[LoggedTensor, ...]
    outputs: tuple[LoggedTensor, ...]
    layers: tuple[str, ...]


class LoggedLayer(msgspec.Struct):
    """A layer of the network that TensorRT's parser made; axes are expressions."""

    type: str
    inputs: list[list[str]]
    outputs: list[list[str]]


def concerns_kernels(message: str) -> bool:
    """True if `read_log` reads ``message``, one of the builder's messages; the others need not be kept."""
    return "LayerType: " in message or _DESCRIPTION.match(message) is not None


def read_log(messages: Iterable[str]) -> tuple[list[LoggedKernel], dict[str, list[LoggedLayer]]]:
    """The kernels in the builder's order, and the network's layers by name (a name can stand for several layers)."""
    lines = [line for message in messages for line in message.split("\n")]
    kernels = [_read_kernel(match) for line in lines if "LayerType: " in line and (match := _KERNEL.match(line))]
    return list(_with_profiles(kernels)), _read_layers(lines)


def _read_layers(lines: Iterable[str]) -> dict[str, list[LoggedLayer]]:
    layers: defaultdict[str, list[LoggedLayer]] = defaultdict(list)
    layer: LoggedLayer | None = None
    axes: list[str] | None = None
    for line in lines:
        if axes is not None and (match := _AXIS.match(line)):
            axes.append(match[1])
        elif layer is not None and (match := _SIDE.match(line)):
            axes = []
            (layer.inputs if match[1] == "Input" else layer.outputs).append(axes)
        elif match := _LAYER.match(line):
            layer, axes = LoggedLayer(match[1], [], []), None
            layers[match[2]].append(layer)
        else:
            layer = axes = None
    return {name: found for name, found in layers.items() if any(one.outputs for one in found)}


def _read_kernel(match: re.Match[str]) -> LoggedKernel:
    inputs, _, rest = match["rest"].partition("Constants: [")
    constants, _, rest = rest.partition("Outputs: [")
    if not rest:  # the log of plain TensorRT has no constants
        inputs, _, rest = inputs.partition("Outputs: [")
    outputs, _, metadata = rest.partition("Metadata:")
    return LoggedKernel(
        name=match["name"],
        type=match["type"],
        profile=_profile_in(match["rest"]),
        inputs=_read_tensors(inputs),
        constants=_read_tensors(constants),
        outputs=_read_tensors(outputs),
        layers=tuple(_ONNX.findall(metadata)),
    )


def _profile_in(text: str) -> int:
    match = _PROFILE.search(text)
    return int(match[1]) if match else 0


def _read_tensors(text: str) -> tuple[LoggedTensor, ...]:
    return tuple(_read_tensor(match) for match in _TENSOR.finditer(text))


def _read_tensor(match: re.Match[str]) -> LoggedTensor:
    fields = match["fields"]
    dims, strides, dtype = (pattern.search(fields) for pattern in (_DIMENSIONS, _STRIDES, _DATATYPE))
    name = _SUBGRAPH.sub("", match["name"])
    return LoggedTensor(_PROFILE.sub("", name), _dtype_in(dtype[1] if dtype else ""), _numbers(dims), _numbers(strides))


def _dtype_in(text: str) -> str:
    """``Half`` of ``Half``, or of plain TensorRT's ``Channel major FP16 format``."""
    words = text.split()
    return next((_FORMATS[word] for word in words if word in _FORMATS), words[0] if words else "")


def _numbers(match: re.Match[str] | None) -> tuple[int, ...]:
    return tuple(int(number) for number in match[1].split(",") if number.strip()) if match else ()


def _with_profiles(kernels: list[LoggedKernel]) -> Iterator[LoggedKernel]:
    """Each kernel with the profile of its compiled subgraph, which only some of the tensors' names mention."""
    subgraphs = [match[1] if (match := _SUBGRAPH.search(kernel.name)) else None for kernel in kernels]
    profiles: dict[str, int] = {}
    for kernel, subgraph in zip(kernels, subgraphs, strict=True):
        if subgraph is not None:
            profiles[subgraph] = max(kernel.profile, profiles.get(subgraph, 0))
    for kernel, subgraph in zip(kernels, subgraphs, strict=True):
        profile = kernel.profile if subgraph is None else profiles[subgraph]
        name = _PROFILE.sub("", _SUBGRAPH.sub("", kernel.name))
        yield msgspec.structs.replace(kernel, name=name, profile=profile)
