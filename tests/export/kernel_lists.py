"""The kernels that TensorRT for RTX compiles for a module, for tests of what fuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svd_trt.engine.builder_log import concerns_kernels
from svd_trt.engine.kernels import ProfileKernels, kernel_costs, parse_kernels
from svd_trt.engine.profiles import Profile
from svd_trt.engine.spec import Axis, NetworkSpec, Range, TensorSpec
from svd_trt.engine.tensorrt_build import EngineOptions, MappedWeights, make_config, parse_network
from svd_trt.engine.tensorrt_import import find_tensorrt
from svd_trt.export.onnx_export import export_network

NAMES = ("latents", "image_latents", "image_embeds")


class InHalf(nn.Module):
    """A module in half precision, with fp32 inputs and outputs as networks have them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.half().eval().requires_grad_(requires_grad=False)

    def forward(
        self, latents: Tensor, image_latents: Tensor | None = None, image_embeds: Tensor | None = None
    ) -> Tensor:
        given = (t.half() for t in (latents, image_latents, image_embeds) if t is not None)
        result: Tensor = self.module(*given).float()
        return result


def compile_kernels(
    module: nn.Module, inputs: Sequence[tuple[Axis, ...]], ranges: dict[str, Range], folder: Path
) -> tuple[ProfileKernels, ProfileKernels]:
    """Kernels of an engine with two profiles: exact, at the largest sizes, and the range.

    Args:
        module: takes tensors of the shapes ``inputs``, the names of whose axes are in ``ranges``; its output has the
            shape of the first.
        inputs: up to three.
        ranges: of every symbol.
        folder: for the ONNX file.
    """
    tensors = tuple(TensorSpec(name, "float32", shape, "") for name, shape in zip(NAMES, inputs, strict=False))
    spec = NetworkSpec("denoiser", tensors, (TensorSpec("out", "float32", inputs[0], ""),), ranges)
    path = folder / "module.onnx"
    with torch.no_grad():
        export_network(InHalf(module), spec, path, fp32_statistics=True)
    exact = {symbol: Range(r.max, r.max, r.max) for symbol, r in ranges.items()}
    profiles: tuple[Profile, Profile] = (exact, ranges)
    messages = _build(path, spec, profiles)
    first, second = parse_kernels(messages, spec, [(profile, None) for profile in profiles]).profiles
    return first, second


def moved_bytes(profile: ProfileKernels) -> int:
    """Bytes that its kernels read and write at the largest sizes, without weights."""
    costs = kernel_costs(profile, {symbol: r.max for symbol, r in profile.ranges.items()})
    assert all(cost.known for cost in costs)
    return sum(cost.read + cost.written for cost in costs)


def _build(path: Path, spec: NetworkSpec, profiles: Sequence[Profile]) -> list[str]:
    tensorrt = find_tensorrt("tensorrt-rtx")
    trt = tensorrt.trt

    class Log(trt.ILogger):  # type: ignore[misc]  # from a module found at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if concerns_kernels(message):
                self.messages.append(message)

    log = Log()
    builder = trt.Builder(log)
    weights = MappedWeights(path)
    network, _parser = parse_network(tensorrt, builder, log, path, spec, weights)
    config = make_config(tensorrt, builder, spec, profiles, EngineOptions())
    assert builder.build_serialized_network(network, config) is not None
    return log.messages
