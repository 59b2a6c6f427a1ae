"""Runs of an engine: ONNX Runtime runs the ONNX file of the network on memory of the stand-in."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from svd_trt.engine.spec import NetworkSpec, Symbol, TensorSpec
from tests.standin.clock import Range

__all__ = ["Run", "bytes_of", "solve"]

_ERRORS_ONLY = 3
_SCRATCH = 0xEE
_SCRIBBLED_BYTES = 16 << 20

_SESSIONS: dict[Path, Any] = {}


@dataclass(frozen=True)
class Run:
    """One run of a network. Its addresses and shapes are fixed when it is enqueued, so a graph can repeat it."""

    path: Path
    inputs: Mapping[TensorSpec, tuple[int, tuple[int, ...]]]
    outputs: Mapping[TensorSpec, tuple[int, tuple[int, ...]]]
    block: Range

    def __call__(self) -> None:
        """Overwrite the block, as activations would, and compute the outputs from the inputs."""
        address, nbytes = self.block
        if nbytes:
            ctypes.memset(address, _SCRATCH, min(nbytes, _SCRIBBLED_BYTES))
        session = _session(self.path)
        binding = session.io_binding()
        for tensor, (where, shape) in self.inputs.items():
            binding.bind_input(tensor.name, "cpu", 0, np.dtype(tensor.dtype).type, shape, where)
        for tensor, (where, shape) in self.outputs.items():
            binding.bind_output(tensor.name, "cpu", 0, np.dtype(tensor.dtype).type, shape, where)
        session.run_with_iobinding(binding)


def solve(spec: NetworkSpec, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The sizes of the symbols from the shapes of inputs. Raises ValueError if two inputs disagree."""
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        for axis, size in zip(tensor.shape, shapes.get(tensor.name, ()), strict=False):
            if isinstance(axis, Symbol):
                value = size * axis.divisor
                if sizes.setdefault(axis.symbol, value) != value:
                    raise ValueError(f"{tensor.name} has {axis.symbol} {value}, other inputs {sizes[axis.symbol]}")
    return sizes


def bytes_of(tensor: TensorSpec, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) * np.dtype(tensor.dtype).itemsize


def _session(path: Path) -> Any:
    if path not in _SESSIONS:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.intra_op_num_threads = 1
        _SESSIONS[path] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return _SESSIONS[path]
