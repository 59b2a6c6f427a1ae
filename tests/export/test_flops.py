"""The arithmetic of a network, counted from files that a build reuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import pytest
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from svd_trt import BuildOptions, Bundle
from svd_trt.engine.spec import NetworkSpec, Range, Symbol, TensorSpec
from svd_trt.errors import ArgumentError
from svd_trt.export.flops import count_flops
from svd_trt.export.onnx_export import export_network
from svd_trt.export.rewrites.upsample import replace_upsamplers, subpixel_upsampling


def test_networks_that_are_hard_links_are_counted(dynamic_bundle: Bundle, tmp_path: Path) -> None:
    """A build links the networks of an older bundle into its staging folder; onnx_ir refuses such files."""
    (tmp_path / "onnx").mkdir()
    for entry in dynamic_bundle.manifest.networks.values():
        for file in entry.onnx.files:
            os.link(dynamic_bundle.path / file.path, tmp_path / file.path)
        assert count_flops(tmp_path / entry.onnx.graph.path, entry.spec) == entry.flops


def test_upsampling_takes_four_products_of_nine(tmp_path: Path) -> None:
    flops = []
    for name in ("plain.onnx", "rewritten.onnx"):
        module = replace_upsamplers(nn.Sequential(Upsample2D(4, use_conv=True)))
        if name == "rewritten.onnx":
            subpixel_upsampling(module)
        spec = NetworkSpec(
            "vae_decoder",
            (TensorSpec("latents", "float32", (Symbol("chunk"), 4, 6, 7), ""),),
            (TensorSpec("frames", "float32", (Symbol("chunk"), 4, 12, 14), ""),),
            {"chunk": Range(1, 2, 3)},
        )
        export_network(_Network(module.eval().requires_grad_(requires_grad=False)), spec, tmp_path / name)
        flops.append(count_flops(tmp_path / name, spec))
    assert flops == [2 * 9 * 3 * 4 * 4 * 12 * 14, 2 * 4 * 3 * 4 * 4 * 12 * 14]


class _Network(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, latents: Tensor) -> Tensor:
        return cast(Tensor, self.module(latents))


@pytest.mark.parametrize("option", [{"precision": "bf16"}, {"backend": "abacus"}, {"operators": "own"}])
def test_unknown_options_are_refused(option: dict[str, str]) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(option))} must be one of"):
        BuildOptions(**option)  # type: ignore[arg-type]
