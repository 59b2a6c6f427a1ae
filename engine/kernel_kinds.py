"""What a kernel does, from its type and from the names of the operations that the builder fused into it.

TensorRT for RTX names a generated kernel after its operations, four letters each: ``__myl_AddSqrtDivMulMulAdd``.
"""

from __future__ import annotations

import re
from typing import Literal, TypeAlias, get_args

from svd_trt.engine.builder_log import LoggedKernel

__all__ = ["KINDS", "Kind", "is_attention", "is_host_work", "kind_of"]

Kind: TypeAlias = Literal[
    "convolution",
    "product",
    "attention",
    "norm fused",
    "norm in pieces",
    "softmax alone",
    "gelu alone",
    "copy or layout",
    "pointwise",
    "shape arithmetic",
]

KINDS: tuple[Kind, ...] = get_args(Kind)

_WORD = re.compile(r"[A-Z][a-z]+")
_LAYOUT = {"Cast", "Conc", "Copy", "Gath", "Move", "Padd", "Repl", "Resh", "Slic", "Tran"}
# Types of TensorRT for RTX, and parts of those of plain TensorRT.
_TYPES: tuple[tuple[str, Kind], ...] = (
    ("correlation", "convolution"),
    ("conv", "convolution"),
    ("gemm", "product"),
    ("matrixmultiply", "product"),
    ("matmul", "product"),
    ("normalization", "norm fused"),
    ("softmax", "softmax alone"),
    ("reformat", "copy or layout"),
    ("shuffle", "copy or layout"),
    ("slice", "copy or layout"),
    ("copy", "copy or layout"),
)


def is_host_work(kernel: LoggedKernel) -> bool:
    """True if the builder lists work on the host that computes shapes, which is no kernel."""
    return kernel.type == "shape_call"


def is_attention(name: str) -> bool:
    """True for the name of a fused attention kernel; a product can be named after an ONNX node of attention."""
    return "mha" in name


def kind_of(kernel: LoggedKernel) -> Kind:
    """The kind of a kernel; what matches nothing is pointwise."""
    if is_attention(kernel.name):
        return "attention"
    if _computes_shapes(kernel):
        return "shape arithmetic"
    if not kernel.name.startswith("__myl_"):
        return next((kind for part, kind in _TYPES if part in kernel.type.lower()), "pointwise")
    return _kind_of_words(set(_WORD.findall(kernel.name)))


def _kind_of_words(words: set[str]) -> Kind:
    if "Fc" in words:
        return "product"
    if any(word.endswith("nor") for word in words):  # Gnor, Inor: normalisations as functions of their own
        return "norm fused"
    if words <= _LAYOUT:
        return "copy or layout"
    if words & {"Mean", "Sqrt"}:
        return "norm in pieces"
    if "Erf" in words:
        return "gelu alone"
    if {"Exp", "Sum"} <= words:
        return "softmax alone"
    return "pointwise"


def _computes_shapes(kernel: LoggedKernel) -> bool:
    """True if all that a kernel handles are single 64-bit integers, which are axes."""
    tensors = kernel.inputs + kernel.outputs
    return bool(tensors) and all(t.dtype == "Int64" and t.dims in ((), (1,)) for t in tensors)
