"""A TensorRT plan as a node of an ONNX graph: what ONNX Runtime answers, which docs/embedding.md quotes."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest

from svd_trt import Bundle
from svd_trt.engine.driver import gpu_count
from svd_trt.engine.spec import NetworkSpec

_TYPES = {"float16": onnx.TensorProto.FLOAT16, "float32": onnx.TensorProto.FLOAT, "uint8": onnx.TensorProto.UINT8}
_PLUGIN = "NvTensorRTRTXExecutionProvider"


def write_wrapper(path: Path, plan: Path, spec: NetworkSpec) -> None:
    """Write an ONNX graph with one node, which names ``plan``, in the form of ONNX Runtime's EPContext design."""

    def described(tensors: tuple) -> list[onnx.ValueInfoProto]:  # type: ignore[type-arg]
        return [onnx.helper.make_tensor_value_info(t.name, _TYPES[t.dtype], [str(n) for n in t.shape]) for t in tensors]

    node = onnx.helper.make_node(
        "EPContext",
        [t.name for t in spec.inputs],
        [t.name for t in spec.outputs],
        domain="com.microsoft",
        embed_mode=0,
        main_context=1,
        source=_PLUGIN,
        ep_cache_context=plan.name,
    )
    graph = onnx.helper.make_graph([node], "plan", described(spec.inputs), described(spec.outputs))
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def test_without_a_gpu_no_provider_takes_the_plan(small_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(small_bundle)
    plan = bundle.plan_path("vae_decoder")
    assert plan is not None
    (tmp_path / plan.name).write_bytes(plan.read_bytes())
    write_wrapper(tmp_path / "plan.onnx", plan, bundle.network("vae_decoder").spec)
    with pytest.raises(Exception, match=r"(?i)EPContext.*not compatible|not compatible.*EPContext"):
        onnxruntime.InferenceSession(tmp_path / "plan.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.skipif(gpu_count() > 0, reason="there is a driver")
def test_without_a_driver_the_plugin_does_not_register() -> None:
    import onnxruntime_ep_nv_tensorrt_rtx as plugin

    with pytest.raises(Exception, match=r"libcuda\.so\.1"):
        onnxruntime.register_execution_provider_library(_PLUGIN, plugin.get_library_path())
