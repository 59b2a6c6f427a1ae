"""Each network of a bundle on ONNX Runtime against diffusers, at the ends and middle of every range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.engine.spec import NETWORKS, NetworkName, NetworkSpec
from svd_trt.export.checkpoint_kinds import open_checkpoint
from svd_trt.export.verify import verify_networks

# Largest difference allowed, by network and precision; frames are in levels of 255.
TOLERANCE: dict[str, dict[NetworkName, float]] = {
    "fp32": {"image_encoder": 5e-6, "vae_encoder": 5e-6, "denoiser": 5e-5, "shallow_denoiser": 5e-5, "vae_decoder": 1},
    "fp16": {"image_encoder": 1e-2, "vae_encoder": 5e-6, "denoiser": 2e-2, "vae_decoder": 3},
}
END = ("min", "opt", "max")


def sizes_at(spec: NetworkSpec, end: str) -> dict[str, int]:
    """Every symbol of the network at the ``end`` of its range."""
    return {symbol: getattr(values, end) for symbol, values in spec.ranges.items()}


def check_network(bundle: Bundle, name: NetworkName, end: str, checkpoint: Path, record_property: Any) -> None:
    """Compare the network ``name`` with every range at its ``end``, as `svd-trt verify` does."""
    sizes = sizes_at(bundle.network(name).spec, end)
    with VideoPipeline.open(bundle, backend="onnxruntime") as pipe:
        differences = list(verify_networks(pipe, open_checkpoint(str(checkpoint)), [sizes], [name]))
    largest = max(d.max_abs for d in differences)
    record_property("largest_difference", largest)
    assert largest <= TOLERANCE[bundle.manifest.precision][name]
    assert all(d.ok for d in differences)
    assert all(d.reference_std > 0.01 for d in differences), "a flat reference would agree with anything"


@pytest.mark.parametrize("end", END)
@pytest.mark.parametrize("name", NETWORKS)
def test_fp32_network(
    name: NetworkName, end: str, dynamic_bundle: Bundle, checkpoint: Path, record_property: Any
) -> None:
    check_network(dynamic_bundle, name, end, checkpoint, record_property)


@pytest.mark.parametrize("end", END)
@pytest.mark.parametrize("name", NETWORKS)
def test_fp16_network(
    name: NetworkName, end: str, small_bundle: Path, small_checkpoint: Path, record_property: Any
) -> None:
    check_network(Bundle.open(small_bundle), name, end, small_checkpoint, record_property)


def test_half_precision_keeps_fp32_where_it_matters(small_bundle: Path) -> None:
    """Softmax and statistics of normalisation, in the rewritten networks of an fp16 bundle."""
    import onnx

    for name in ("denoiser", "vae_decoder"):
        graph = onnx.load(Bundle.open(small_bundle).onnx_path(name), load_external_data=False).graph  # type: ignore[arg-type]
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


def test_precision_is_in_the_graph(small_bundle: Path) -> None:
    """Strongly typed: half weights in the fp16 networks, none in the VAE encoder."""
    import onnx

    for name in NETWORKS:
        graph = onnx.load(Bundle.open(small_bundle).onnx_path(name), load_external_data=False).graph
        halves = sum(t.data_type == onnx.TensorProto.FLOAT16 for t in graph.initializer)
        assert (halves == 0) == (name == "vae_encoder"), name
        assert not any(node.doc_string or node.metadata_props for node in graph.node), "stack traces left in the file"
