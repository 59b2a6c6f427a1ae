"""Kernel lists: parsed from the logs of real builds, with unknown axes that equal those of an exact build."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from svd_trt.engine.builder_log import LoggedKernel, LoggedTensor
from svd_trt.engine.kernel_kinds import kind_of
from svd_trt.engine.kernels import (
    KernelCost,
    KernelList,
    kernel_costs,
    parse_kernels,
    read_kernels,
    write_kernels,
)
from svd_trt.engine.size_expressions import Product, evaluate, product_of
from svd_trt.errors import ArgumentError, BundleError
from tests.engine.kernel_block import CHANNELS, EXACT, HEADS, PIXELS, SPEC, build_log, write_block

pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx", reason="TensorRT for RTX is not installed (svd-trt[rtx])")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("block") / "block.onnx"
    write_block(path)
    return path


@pytest.fixture(scope="module")
def log(graph: Path) -> list[str]:
    """Of an engine with two profiles: exactly 4 frames, and 1 to 8."""
    return build_log(graph, EXACT, SPEC.ranges)


@pytest.fixture(scope="module")
def kernels(log: list[str]) -> KernelList:
    return parse_kernels(log, SPEC, [(EXACT, 1000), (SPEC.ranges, 2000)])


def costs_of(kernels: KernelList, profile: int, chunk: int) -> list[KernelCost]:
    return kernel_costs(kernels.profiles[profile], {"chunk": chunk})


def tensors_of(kernels: KernelList, profile: int, chunk: int) -> dict[tuple[str, ...], list[int | None]]:
    """Elements of each tensor of the kernels that fused ONNX nodes, by those nodes."""
    found = kernels.profiles[profile]
    return {
        (k.name, *k.layers): [found.tensors[i].elements({"chunk": chunk}) for i in (*k.inputs, *k.outputs)]
        for k in found.kernels
        if k.layers
    }


def test_kernels_are_sorted_into_kinds(kernels: KernelList) -> None:
    kinds = {node: cost.kernel.kind for cost in costs_of(kernels, 0, 4) for node in cost.kernel.layers}
    assert kinds["node_conv"] == "convolution"
    assert kinds["node_to_q"] == kinds["node_up"] == kinds["node_gelu"] == "product", "gelu is part of the product"
    assert kinds["node_softmax"] == kinds["node_scores"] == "attention"
    assert kinds["node_norm"] == "norm fused"
    assert kinds["node_layer_norm"] == "norm in pieces"
    assert kinds["node_frames"] == "copy or layout"
    assert "shape arithmetic" in {k.kind for k in kernels.profiles[1].kernels}, "a range needs sizes at run time"
    assert "shape arithmetic" not in {k.kind for k in kernels.profiles[0].kernels}


@pytest.mark.parametrize(
    ("name", "type_", "kind"),
    [
        ("node_scaled_dot_product_attention", "gemm", "product"),  # of a VAE, whose heads are too wide to fuse
        ("__myl_MaxrSubExpSumDivMul", "kgen", "softmax alone"),
        ("__myl_ReshReshAddAddDivCastErfCastAddMulMulMul", "kgen", "gelu alone"),
        ("__myl_SiluGnor", "kgen", "norm fused"),
        ("__myl_Inor", "runtime_function", "norm fused"),
        ("__myl_FcAddSilu", "runtime_fusion", "product"),
        ("__myl_TranReshConc", "kgen", "copy or layout"),
        ("__myl_SlicReshMulCosSinConcSlicSlicConc", "kgen", "pointwise"),
    ],
)
def test_kinds_of_kernels_seen_in_builds(name: str, type_: str, kind: str) -> None:
    tensor = LoggedTensor("x", "Half", (2, 3), (3, 1))
    assert kind_of(LoggedKernel(name, type_, 0, (tensor,), (), (tensor,), ())) == kind


def test_profiles_hold_their_own_kernels(kernels: KernelList, log: list[str]) -> None:
    exact, span = kernels.profiles
    listed = sum("LayerType: " in line for line in "\n".join(log).split("\n"))
    work_on_host = sum("LayerType: shape_call" in line for line in "\n".join(log).split("\n"))
    assert len(exact.kernels) + len(span.kernels) == listed - work_on_host
    assert (exact.activation_bytes, span.activation_bytes) == (1000, 2000)
    assert all(-1 not in tensor.dims for tensor in exact.tensors)
    assert any(-1 in tensor.dims for tensor in span.tensors)
    assert not any("[profile" in text for text in [t.name for t in span.tensors] + [k.name for k in span.kernels])


def test_a_range_at_a_size_equals_an_exact_build(graph: Path, kernels: KernelList) -> None:
    """Tensor by tensor where the same nodes were fused, and in sum."""
    for chunk in (4, 7):
        ranges = {"chunk": msgspec.convert({"min": chunk, "opt": chunk, "max": chunk}, type(EXACT["chunk"]))}
        narrowed = parse_kernels(build_log(graph, ranges), SPEC, [(ranges, None)])
        exact, resolved = tensors_of(narrowed, 0, chunk), tensors_of(kernels, 1, chunk)
        same = exact.keys() & resolved.keys()
        assert len(same) >= 8
        assert {key: resolved[key] for key in same} == {key: exact[key] for key in same}
        here, there = costs_of(kernels, 1, chunk), costs_of(narrowed, 0, chunk)
        assert all(cost.known for cost in here)
        assert sum(c.flops for c in here) == sum(c.flops for c in there)
        assert sum(c.moved for c in here) == pytest.approx(sum(c.moved for c in there), rel=0.1), "fused otherwise"


def test_bytes_and_arithmetic_are_those_of_the_shapes(kernels: KernelList) -> None:
    rows = 4 * PIXELS
    by_node = {node: cost for cost in costs_of(kernels, 0, 4) for node in cost.kernel.layers}
    assert by_node["node_conv"].flops == 2 * rows * CHANNELS * CHANNELS * 9
    assert by_node["node_to_q"].flops == 3 * 2 * rows * CHANNELS * CHANNELS, "queries, keys and values together"
    assert by_node["node_mixed"].flops == 2 * 2 * 4 * HEADS * PIXELS * PIXELS * (CHANNELS // HEADS)
    assert by_node["node_layer_norm"].flops == 0
    gelu = by_node["node_gelu"]
    assert (gelu.read, gelu.written) == (2 * rows * CHANNELS, 2 * rows * 4 * CHANNELS)
    assert gelu.weights == 2 * CHANNELS * 4 * CHANNELS
    attention = by_node["node_mixed"]
    assert attention.read == 3 * attention.written, "queries, keys and values are parts of one tensor"
    by_kind = {c.kernel.kind: c for c in costs_of(kernels, 0, 4) if c.spilled}
    assert by_kind.keys() == {"norm in pieces"}, "the output of the network is fp32 too, but no kernel reads it"


def test_sizes_are_those_of_the_profile(kernels: KernelList) -> None:
    exact, span = kernels.profiles
    assert exact.sizes({}) == {"chunk": 4}
    assert exact.sizes({"chunk": 5}) is None
    assert span.sizes({"chunk": 5, "frames": 25}) == {"chunk": 5}
    assert span.sizes({}) == {"chunk": 8}


def test_a_log_without_kernels_is_an_empty_list() -> None:
    messages = [
        "Layers:",
        "Name: (Unnamed Layer* 0)",
        "nothing",
        "        1\t(((",
        "    Input 0",
        "",
        "A B",
        "    Output 0",
    ]
    assert parse_kernels(messages, SPEC, [(EXACT, None)]).profiles[0].kernels == ()


def test_a_log_of_plain_tensorrt_is_read() -> None:
    """Its lines have other types and no constants, strides or ONNX nodes."""
    line = (
        "Name: conv + relu, LayerType: CaskConvolution, Inputs: [ { Name: latents, Location: Device, Dimensions: "
        "[4,64,16,16], Format/Datatype: Channel major FP16 format }], Outputs: [ { Name: y, Location: Device, "
        "Dimensions: [4,32,16,16], Format/Datatype: Row major linear FP32 format }], ParameterType: Convolution"
    )
    (kernel,) = parse_kernels([line], SPEC, [(EXACT, None)]).profiles[0].kernels
    assert (kernel.name, kernel.kind) == ("conv + relu", "convolution")
    (cost,) = kernel_costs(parse_kernels([line], SPEC, [(EXACT, None)]).profiles[0], {"chunk": 4})
    assert (cost.read, cost.written) == (2 * 4 * 64 * 256, 4 * 4 * 32 * 256)


def test_what_cannot_be_explained_is_said(log: list[str]) -> None:
    """Without the description of the layers only tensors that follow from the inputs are known."""
    lines = [message for message in log if "LayerType: " in message]
    kernels = parse_kernels(lines, SPEC, [(EXACT, None), (SPEC.ranges, None)])
    assert not all(cost.known for cost in costs_of(kernels, 1, 4))
    assert all(cost.known for cost in costs_of(kernels, 0, 4))


def test_axes_that_are_not_understood_do_not_fail_a_build(log: list[str]) -> None:
    """TensorRT may have other symbols and operators in another version."""
    for new in ("\t(NEW_OPERATOR chunk 2)", "\tsomething_else", "\t(* chunk", "\t"):
        other = [message.replace("\tchunk", new) for message in log]
        kernels = parse_kernels(other, SPEC, [(EXACT, None), (SPEC.ranges, None)])
        assert [len(profile.kernels) for profile in kernels.profiles] == [12, 17]
        assert not all(cost.known for cost in costs_of(kernels, 1, 4))


def test_lists_survive_a_file(kernels: KernelList, tmp_path: Path) -> None:
    path = tmp_path / "denoiser.kernels.json"
    write_kernels(kernels, path)
    assert read_kernels(path) == kernels


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"network"', b'"netwurk"'),
        (b"(* 256 chunk)", b"(* 256 chunky)"),
        (b"(* 256 chunk)", b"(^ 256 chunk)"),
        (b'"norm fused"', b'"norm fusion"'),
        (b"}", b""),
    ],
)
def test_a_damaged_list_is_a_damaged_bundle(old: bytes, new: bytes, kernels: KernelList, tmp_path: Path) -> None:
    path = tmp_path / "denoiser.kernels.json"
    write_kernels(kernels, path)
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    with pytest.raises(BundleError, match=r"denoiser\.kernels\.json is not a list of kernels \("):
        read_kernels(path)


def test_a_list_that_names_no_tensor_is_damaged(kernels: KernelList, tmp_path: Path) -> None:
    path = tmp_path / "denoiser.kernels.json"
    short = [msgspec.structs.replace(profile, tensors=profile.tensors[:3]) for profile in kernels.profiles]
    write_kernels(msgspec.structs.replace(kernels, profiles=tuple(short)), path)
    with pytest.raises(BundleError, match="is not a list of kernels"):
        read_kernels(path)
    path.unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        read_kernels(path)


def test_expressions() -> None:
    sizes = {"height": 72, "frames": 3, "branches": 2}
    halved = '(+ (CEIL_DIV (+ "height//8" -2) 2) 1)'
    assert evaluate(halved, sizes) == 5, "9 rows halve to 5"
    assert evaluate("(* E0 (MAX E0 E1)) where E0=(* branches frames) E1=(- frames 1)", sizes) == 36
    product = product_of(f"(* 4 (* frames (* 2 {halved})))")
    assert product == Product(8, 1, ("(+ (CEIL_DIV (+ height//8 -2) 2) 1)", "frames"))
    assert evaluate(product.over(6).text, sizes) == 20
    assert product.over(7).values([sizes]) is None
    for text in ("(* frames", "frames frames", "(* frames width)", "(? 1)", ")", "(MAX)"):
        with pytest.raises(ArgumentError):
            evaluate(text, sizes)
