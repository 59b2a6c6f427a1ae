"""The networks at full width against torch in fp32, at sizes that a CPU affords: ``make test-full``.

Minutes long and up to 16 GB of memory, so not part of ``make test``; the figures of the last run are in
``benchmarks/results/full-size-parity.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from svd_trt.engine.manifest import GraphEntry, Precision
from svd_trt.engine.spec import NetworkName, NetworkSpec, Range, Ranges, network_specs
from svd_trt.export.checkpoint_kinds import open_checkpoint
from svd_trt.export.export_process import Exporter
from svd_trt.export.presets import PRESETS
from svd_trt.export.random_checkpoint import random_model
from svd_trt.export.recipe import make_recipe
from svd_trt.export.reference import diffusers_output, draw_inputs, load_models

pytestmark = pytest.mark.slow

MODEL, PRESET = "random:svd-xt", "svd-xt"
NAMES: tuple[NetworkName, ...] = ("denoiser", "vae_decoder")
# Latents of 8x16; three frames, three of a chunk.
SIZES = {"branches": 2, "frames": 3, "chunk": 3}

GRAPHS = {
    "rewritten": (GraphEntry(rewrites=True, ff_chunks=2), Range(1, 2, 2)),
    "low memory": (GraphEntry(rewrites=True, ff_chunks=4), Range(1, 1, 1)),
}


def spec_of(name: NetworkName, branches: Range) -> NetworkSpec:
    one = Range(1, 1, 1)
    ranges = Ranges(
        batch=one,
        pictures=one,
        branches=branches,
        frames=Range(2, 3, 25),
        chunk=Range(1, 3, 25),
        height=Range.parse("64"),
        width=Range.parse("128"),
    )
    return network_specs(open_checkpoint(MODEL).description.model, ranges)[name]


def inputs_of(name: NetworkName, branches: Range) -> dict[str, Any]:
    return draw_inputs(spec_of(name, branches), SIZES | {"branches": branches.max})


def reference_of(name: NetworkName, inputs: dict[str, Any]) -> list[Any]:
    """diffusers' own modules, in fp32, with its scheduler around the UNet."""
    with load_models(open_checkpoint(MODEL), name) as models:
        return diffusers_output(models, name, inputs)


def run_exported(name: NetworkName, precision: Precision, graph: GraphEntry, branches: Range, folder: Path) -> Any:
    """The network exported as a build does it, in ONNX Runtime."""
    spec, path = spec_of(name, branches), folder / f"{name}.onnx"
    checkpoint = open_checkpoint(MODEL)
    with Exporter(checkpoint, []) as exporter:
        exporter.export(make_recipe(spec, precision, graph, checkpoint.description.upsamplers), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, inputs_of(name, branches))


def cosine(a: Any, b: Any) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", NAMES)
def test_full_width(name: NetworkName, graph: str, precision: Precision, tmp_path: Path, record_property: Any) -> None:
    if name == "vae_decoder" and graph != "rewritten":
        pytest.skip("the decoder has one graph")
    entry, branches = GRAPHS[graph]
    inputs = inputs_of(name, branches)
    theirs = reference_of(name, inputs)
    ours = run_exported(name, precision, entry, branches, tmp_path)
    cosines = [cosine(o, t) for o, t in zip(ours, theirs, strict=True)]
    differences = [float(np.abs(o.astype(np.float64) - t).max() / t.std()) for o, t in zip(ours, theirs, strict=True)]
    record_property("smallest_cosine_from_1", 1 - min(cosines))
    record_property("largest_relative_difference", max(differences))
    assert all(float(t.std()) > 0.01 for t in theirs), "a flat reference would agree with anything"
    assert min(cosines) >= (0.9999 if precision == "fp16" else 0.9999999)


@torch.no_grad()
def test_activations_stay_sane(record_property: Any) -> None:
    """Random weights are drawn so that a full-size network neither fades out nor explodes."""
    largest: list[float] = []

    def watch(_module: Any, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            assert torch.isfinite(output).all()
            largest.append(float(output.abs().max()))

    unet = random_model("unet", PRESETS[PRESET], 0, torch.float32)
    for module in unet.modules():
        module.register_forward_hook(watch)
    x = torch.randn(1, 3, 8, 8, 16)
    out = unet(x, 0.3, torch.randn(1, 1, 1024), torch.tensor([[6.0, 127.0, 0.02]]), return_dict=False)[0]
    record_property("largest_activation", max(largest))
    assert max(largest) < 1000
    assert 0.05 < float(out.std()) < 20
