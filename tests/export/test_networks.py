"""Each exported network in ONNX Runtime against diffusers' own modules, at the ends and middle of every range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from svd_trt import Bundle
from svd_trt.benchmarks.reference import diffusers_output, draw_inputs
from svd_trt.engine.spec import NETWORKS, NetworkName, NetworkSpec

# Largest difference allowed, by network and precision; frames are in levels of 255.
TOLERANCE: dict[str, dict[NetworkName, float]] = {
    "fp32": {"image_encoder": 5e-6, "vae_encoder": 5e-6, "denoiser": 5e-5, "vae_decoder": 1},
    "fp16": {"image_encoder": 1e-2, "vae_encoder": 5e-6, "denoiser": 2e-2, "vae_decoder": 3},
}
END = ("min", "opt", "max")


def sizes_at(spec: NetworkSpec, end: str) -> dict[str, int]:
    return {symbol: getattr(r, end) for symbol, r in spec.ranges.items()}


def largest_difference(path: Path, spec: NetworkSpec, sizes: dict[str, int], reference: Any) -> float:
    """Of the network ``spec`` in the file ``path``."""
    inputs = draw_inputs(spec, sizes)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    ours = session.run(None, inputs)
    theirs = diffusers_output(reference, spec.name, {k: torch.from_numpy(v) for k, v in inputs.items()})
    assert [o.shape for o in ours] == [t.resolve(sizes) for t in spec.outputs]
    assert all(float(t.std()) > 0.01 for t in theirs), "a flat reference would agree with anything"
    return max(float(np.abs(o.astype(np.float64) - t.numpy()).max()) for o, t in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("end", END)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.xdist_group("dynamic")
def test_fp32_network(
    name: NetworkName, end: str, dynamic_bundle: Bundle, reference: Any, record_property: Any
) -> None:
    spec = dynamic_bundle.network(name).spec
    difference = largest_difference(dynamic_bundle.onnx_path(name), spec, sizes_at(spec, end), reference)
    record_property("largest_difference", difference)
    assert difference <= TOLERANCE["fp32"][name]


@pytest.mark.parametrize("end", END)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.xdist_group("fixed")
def test_fp16_network(name: NetworkName, end: str, fixed_bundle: Bundle, reference: Any, record_property: Any) -> None:
    spec = fixed_bundle.network(name).spec
    difference = largest_difference(fixed_bundle.onnx_path(name), spec, sizes_at(spec, end), reference)
    record_property("largest_difference", difference)
    assert difference <= TOLERANCE["fp16"][name]


@pytest.mark.xdist_group("fixed")
def test_half_precision_keeps_fp32_where_it_matters(fixed_bundle: Bundle) -> None:
    """Softmax and statistics of normalisation, in the rewritten networks of an fp16 bundle."""
    import onnx

    for name in ("denoiser", "vae_decoder"):
        graph = onnx.load(fixed_bundle.onnx_path(name), load_external_data=False).graph  # type: ignore[arg-type]
        made_by = {output: node for node in graph.node for output in node.output}
        kinds = [node.op_type for node in graph.node]
        assert "InstanceNormalization" not in kinds
        assert "GroupNormalization" in kinds
        for node in graph.node:
            if node.op_type == "Softmax":
                scale = made_by[node.input[0]]
                cast = made_by[scale.input[0]]
                assert (scale.op_type, cast.op_type) == ("Mul", "Cast")
                assert cast.attribute[0].i == onnx.TensorProto.FLOAT
            if node.op_type in ("GroupNormalization", "LayerNormalization"):
                stash = {a.name: a.i for a in node.attribute}.get("stash_type", 1)  # 1, fp32, is the default
                assert stash == onnx.TensorProto.FLOAT


@pytest.mark.xdist_group("fixed")
def test_precision_is_in_the_graph(fixed_bundle: Bundle) -> None:
    """Strongly typed: half weights in the fp16 networks, none in the VAE encoder."""
    import onnx

    for name in NETWORKS:
        graph = onnx.load(fixed_bundle.onnx_path(name), load_external_data=False).graph
        halves = sum(t.data_type == onnx.TensorProto.FLOAT16 for t in graph.initializer)
        assert (halves == 0) == (name == "vae_encoder"), name
        assert not any(node.doc_string or node.metadata_props for node in graph.node), "stack traces left in the file"
