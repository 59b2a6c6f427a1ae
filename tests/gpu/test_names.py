"""Every name that the runtime uses of the CUDA driver and of TensorRT exists in the real modules."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from cuda.bindings import driver

import svd_trt.runtime.cuda
from tests.standin.cuda import StandInCuda
from tests.standin.rtx import real

HERE = Path(svd_trt.runtime.cuda.__file__).resolve().parent
SOURCES = [*HERE.glob("*.py"), HERE.parents[1] / "engine" / "driver.py"]
TEXT = {path.name: path.read_text() for path in SOURCES}

# Names of TensorRT that the runtime uses, by class. `RTX` has those that only TensorRT for RTX has.
COMMON = {
    "Runtime": ["deserialize_cuda_engine", "error_recorder"],
    "ICudaEngine": [
        "error_recorder",
        "get_device_memory_size_for_profile_v2",
        "create_runtime_config",
        "create_execution_context",
        "streamable_weights_size",
        "weight_streaming_budget_v2",
        "weight_streaming_scratch_memory_size",
    ],
    "IRuntimeConfig": ["set_execution_context_allocation_strategy"],
    "ExecutionContextAllocationStrategy": ["USER_MANAGED"],
    "IExecutionContext": [
        "error_recorder",
        "execute_async_v3",
        "set_optimization_profile_async",
        "set_input_shape",
        "set_tensor_address",
        "get_tensor_shape",
        "infer_shapes",
        "update_device_memory_size_for_shapes",
        "set_device_memory",
        "profiler",
    ],
    "IProfiler": ["report_layer_time"],
    "ILogger": ["ERROR", "INTERNAL_ERROR"],
    "IErrorRecorder": ["report_error", "clear", "num_errors", "get_error_code", "get_error_desc", "has_overflowed"],
    "ErrorCodeTRT": ["FAILED_ALLOCATION"],
}
RTX = {
    "Runtime": ["get_engine_validity", "engine_header_size"],
    "IRuntimeConfig": [
        "dynamic_shapes_kernel_specialization_strategy",
        "cuda_graph_strategy",
        "create_runtime_cache",
        "set_runtime_cache",
    ],
    "IRuntimeCache": ["serialize", "deserialize"],
    "IExecutionContext": ["is_stream_capturable"],
    "EngineValidity": ["INVALID"],
    "ComputeCapability": ["SM75", "SM80", "SM86", "SM89", "SM120"],
    "CudaGraphStrategy": ["WHOLE_GRAPH_CAPTURE", "DISABLED"],
    "DynamicShapesKernelSpecializationStrategy": ["EAGER"],
    "EngineInvalidityDiagnostics": [
        "VERSION_MISMATCH",
        "UNSUPPORTED_CC",
        "OLD_CUDA_DRIVER",
        "OLD_CUDA_RUNTIME",
        "INSUFFICIENT_GPU_MEMORY",
        "MALFORMED_ENGINE",
        "CUDA_ERROR",
    ],
}


def test_functions_of_the_driver_exist() -> None:
    called = {name for text in TEXT.values() for name in re.findall(r'call\(\s*"(cu[A-Z]\w+)"', text)}
    assert len(called) > 25
    assert called <= set(dir(driver))
    assert {name for name in called if not hasattr(StandInCuda, name)} == set(), "the stand-in lacks these"


def test_constants_of_the_driver_exist() -> None:
    used = {name for text in TEXT.values() for name in re.findall(r"\b(?:CU|CUDA_ERROR)_(?!ERROR\b)[A-Z0-9_]+\b", text)}
    members = {
        name
        for kind in ("CUresult", "CUdevice_attribute", "CUstream_flags", "CUevent_flags", "CUstreamCaptureMode")
        for name in getattr(driver, kind).__members__
    }
    assert used
    assert used <= members


@pytest.mark.parametrize("owner", sorted({*COMMON, *RTX}))
def test_names_of_tensorrt_for_rtx_exist(owner: str) -> None:
    for name in COMMON.get(owner, []) + RTX.get(owner, []):
        assert hasattr(getattr(real, owner), name), f"{owner}.{name}"


def test_names_of_tensorrt_exist() -> None:
    """TensorRT's bindings do not load without its libraries, so the test looks for the names in the file."""
    found = importlib.util.find_spec("tensorrt_bindings")
    assert found is not None, "install TensorRT's bindings: pip install -e '.[dev]'"
    assert found.origin is not None
    content = (Path(found.origin).parent / "tensorrt.so").read_bytes()
    missing = [n for names in COMMON.values() for n in names if n.encode() + b"\0" not in content]
    assert missing == []
    assert b"is_stream_capturable\0" not in content, "the search finds names that plain TensorRT does not have"


def test_the_lists_of_names_are_complete() -> None:
    """Every name that the runtime uses of an engine, a context, a configuration or the runtime is listed above."""
    listed = {name for names in (*COMMON.values(), *RTX.values()) for name in names}
    objects = r"(?:_engine|_context|\bhandle|\bengine|\bconfig|\.handle|\b_cache|\bgraphs)\.([a-z]\w+)"
    own = {"current", "take", "give", "gpu", "close", "driver", "rebuild", "save", "attach", "spec"}
    own |= {"tensorrt_import", "bundle", "manifest", "memory", "temporary_files"}
    text = "".join(
        TEXT[f"{name}.py"] for name in ("tensorrt", "tensorrt_context", "tensorrt_errors", "tensorrt_runtime")
    )
    found = set(re.findall(objects, text)) | set(re.findall(r"\bthing\.([a-z]\w+)", text))
    assert found - own <= listed
    assert len(found & listed) > 15
