"""When a network is traced once, and when torch has to trace it again to decompose its operators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from svd_trt.engine.spec import NetworkSpec, Range, Symbol, TensorSpec
from svd_trt.export.onnx_export import export_network

SHAPE = (Symbol("branches"), Symbol("frames"), 4, 6, 8)
SPEC = NetworkSpec(
    "denoiser",
    (TensorSpec("hidden", "float32", SHAPE, ""),),
    (TensorSpec("out", "float32", SHAPE, ""),),
    {"branches": Range(1, 2, 2), "frames": Range(2, 3, 5)},
)


class Layers(nn.Module):
    """The operators of the networks that have no translation of their own, or one that is not used."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(4, 4)
        self.in_place = in_place

    def forward(self, hidden: Tensor) -> Tensor:
        videos, frames = hidden.shape[:2]
        flat = self.up(hidden.flatten(0, 1).to(torch.float32))
        tokens = self.linear(flat.flatten(2).transpose(1, 2).unflatten(0, (videos, frames)))
        half = tokens.half().flatten(1, 2).unflatten(1, (frames, -1)).float()
        if self.in_place:
            half.mul_(2.0)
        return half.transpose(2, 3).unflatten(3, (6, 8)) * 1.0


@pytest.mark.parametrize("in_place", [False, True])
def test_only_what_has_to_be_is_traced_twice(in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[object] = []
    decompose = torch.export.ExportedProgram.run_decompositions

    def note(program: torch.export.ExportedProgram, table: object = None) -> object:
        traced.append(table)
        return decompose(program, table)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", note)
    layers = Layers(in_place=in_place).eval().requires_grad_(requires_grad=False)
    export_network(layers, SPEC, tmp_path / "layers.onnx")
    assert len(traced) == int(in_place)
    session = onnxruntime.InferenceSession(str(tmp_path / "layers.onnx"), providers=["CPUExecutionProvider"])
    for branches, frames in ((1, 2), (2, 5)):
        hidden = np.random.default_rng(0).standard_normal((branches, frames, 4, 6, 8)).astype(np.float32)
        with torch.no_grad():
            expected = layers(torch.from_numpy(hidden)).numpy()
        (found,) = session.run(None, {"hidden": hidden})
        np.testing.assert_allclose(found, expected, atol=2e-3)
