"""The arithmetic of a network, counted from files that a build reuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from svd_trt import BuildOptions, Bundle
from svd_trt.errors import ArgumentError
from svd_trt.export.flops import count_flops


def test_networks_that_are_hard_links_are_counted(dynamic_bundle: Bundle, tmp_path: Path) -> None:
    """A build links the networks of an older bundle into its staging folder; onnx_ir refuses such files."""
    (tmp_path / "onnx").mkdir()
    for entry in dynamic_bundle.manifest.networks.values():
        for file in entry.onnx.files:
            os.link(dynamic_bundle.path / file.path, tmp_path / file.path)
        assert count_flops(tmp_path / entry.onnx.files[0].path, entry.spec) == entry.flops


@pytest.mark.parametrize("option", [{"precision": "bf16"}, {"backend": "abacus"}, {"operators": "own"}])
def test_unknown_options_are_refused(option: dict[str, str]) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(option))} must be one of"):
        BuildOptions(**option)  # type: ignore[arg-type]
