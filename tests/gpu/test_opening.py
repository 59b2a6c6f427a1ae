"""Choosing a device and opening it: what is refused, with which message, and before which calls."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import PIL.Image
import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.engine.driver import gpu_count, list_gpus, load_driver, select_gpu
from svd_trt.engine.rebuild import rebuild_command
from svd_trt.engine.spec import NETWORKS
from svd_trt.engine.tensorrt_build import engine_memory
from svd_trt.engine.tensorrt_import import find_tensorrt, select_tensorrt
from svd_trt.errors import ArgumentError, BackendError, CudaError
from svd_trt.runtime.backends import choose
from tests.gpu.conftest import Rig
from tests.gpu.test_pipeline import FAST
from tests.standin.cuda import StandInCuda
from tests.standin.rtx import real


def test_two_gpus_give_equal_frames(
    dynamic_bundle: Bundle, picture: PIL.Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(monkeypatch, StandInCuda(devices=2))
    with rig.open(dynamic_bundle, device="cuda:0") as one, rig.open(dynamic_bundle, device="cuda:1") as two:
        assert "GPU 1" in two.device.name
        np.testing.assert_array_equal(one(picture, **FAST).frames, two(picture, **FAST).frames)
    with pytest.raises(BackendError, match=r"there is no cuda:2; this machine has cuda:0 .*, cuda:1 "):
        rig.open(dynamic_bundle, device="cuda:2")
    rig.check()


def test_engines_are_built_on_the_gpu_that_is_named(monkeypatch: pytest.MonkeyPatch, dynamic_bundle: Bundle) -> None:
    rig = Rig(monkeypatch, StandInCuda(devices=2))
    rig.install(dynamic_bundle, tensorrt="tensorrt")
    monkeypatch.setattr(rig.trt, "__version__", "10.13.0")
    chosen = select_tensorrt("tensorrt", "cuda:1")
    assert chosen is not None
    assert (chosen.device, chosen.target) == (1, load_sm(1))
    with pytest.raises(BackendError, match=r"there is no cuda:2; this machine has cuda:0 .*, cuda:1 "):
        select_tensorrt("tensorrt", "cuda:2")
    with pytest.raises(ArgumentError, match="--target is for --backend tensorrt-rtx"):
        select_tensorrt("auto", None, ["sm89"])
    driver = load_driver()
    select_gpu(driver, 1)
    contexts = [int(driver.call("cuDevicePrimaryCtxRetain", driver.call("cuDeviceGet", index))) for index in (0, 1)]
    assert contexts.index(int(driver.call("cuCtxGetCurrent"))) == 1


@pytest.mark.parametrize(("capability", "served"), [((8, 9), True), ((9, 0), False), ((10, 0), False), ((13, 0), True)])
def test_auto_refuses_engines_that_no_gpu_here_would_load(
    capability: tuple[int, int], served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT for RTX 1.7 builds on an H200, and then says that the engine cannot run on it."""
    Rig(monkeypatch, StandInCuda(capability=capability))
    if served:
        chosen = select_tensorrt("auto")
        assert chosen is not None
        assert chosen.name == "tensorrt-rtx"
    else:
        with pytest.raises(BackendError, match=r"serves sm75, .* has .*\(sm\d+\)\. Install TensorRT: pip install"):
            select_tensorrt("auto")
    for options in ({"backend": "tensorrt-rtx"}, {"backend": "auto", "targets": ["sm89"]}):
        chosen = select_tensorrt(**options)  # type: ignore[arg-type]
        assert chosen is not None
        assert chosen.name == "tensorrt-rtx"


def test_memory_is_asked_of_the_engine_where_it_loads(monkeypatch: pytest.MonkeyPatch, dynamic_bundle: Bundle) -> None:
    rig = Rig(monkeypatch, StandInCuda())  # the builder's process keeps its context, so nothing is checked at the end
    rig.install(dynamic_bundle)
    select_gpu(load_driver(), 0)
    for name in NETWORKS:
        path, plan = dynamic_bundle.plan_path(name), dynamic_bundle.network(name).plan
        assert path is not None
        assert plan is not None
        asked = engine_memory(rig.trt, path, len(plan.profiles))
        assert asked is not None
        assert len(asked) == len(plan.profiles)
        assert all(need > 0 for need in asked)


def test_memory_is_the_builders_without_a_gpu(dynamic_bundle: Bundle) -> None:
    path = dynamic_bundle.plan_path("denoiser")
    assert path is not None
    if gpu_count() == 0:
        assert engine_memory(find_tensorrt("tensorrt-rtx").trt, path, 2) is None


def load_sm(index: int) -> str:
    return list_gpus(load_driver())[index].sm


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"version": "1.5.0"},
            r"from tensorrt-rtx 1\.7\.1\.116, and 1\.5\.0 is installed; build it again: `svd-trt build .* --backend",
        ),
        ({"tensorrt": "tensorrt"}, "its engines are for tensorrt-rtx, and tensorrt was asked for"),
    ],
)
def test_engines_of_another_tensorrt_are_refused(
    options: dict[str, Any], problem: str, standin: Rig, dynamic_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin.install(dynamic_bundle, **options)
    if "tensorrt" in options:
        monkeypatch.setattr(standin.trt, "__version__", "10.13.0")
    with pytest.raises(BackendError, match=problem):
        VideoPipeline.open(dynamic_bundle, backend=options.get("tensorrt", "auto"))
    assert standin.cuda.count("cuDevicePrimaryCtxRetain") == 0, "the bundle was refused too late"


# A capability, a bit of the diagnostics, a line of the log, and what the message says and does not say.
REFUSALS: dict[str, tuple[dict[str, Any], str, str, str, str | None]] = {
    "a GPU that the engines were not built for": (
        {"capability": (7, 5)},
        "UNSUPPORTED_CC",
        "",
        r"not built for this compute capability; build it again: `svd-trt build \S+/checkpoint -o \S+/dynamic "
        "--backend tensorrt-rtx --target sm75`",
        None,
    ),
    "a GPU that TensorRT for RTX does not serve": (
        {"capability": (9, 0)},
        "UNSUPPORTED_CC",
        "",
        r"\(sm90\): it serves sm75, .*sm121, and no other GPU; .* --backend tensorrt` .*, or run its ONNX",
        "tensorrt-rtx --target",
    ),
    "an old driver": (
        {"driver_version": 12040},
        "OLD_CUDA_DRIVER",
        "",
        r"the driver, which supports CUDA 12\.4, is too old; install NVIDIA driver 580 or newer",
        "svd-trt build",
    ),
    "a driver that only the log calls too old": (
        {},
        "",
        "Error reading CUDA GPU properties: CUDA driver version is insufficient for CUDA runtime version",
        r"CUDA driver version is insufficient for CUDA runtime version; install NVIDIA driver 580 or newer",
        "svd-trt build",
    ),
    "something else that only the log says": (
        {},
        "",
        "Error reading CUDA GPU properties: out of luck",
        "out of luck; run its ONNX networks with --backend onnxruntime --provider cuda",
        "svd-trt build",
    ),
    "a line of the log with the word driver": (
        {},
        "",
        "Error reading CUDA GPU properties: the driver returned 999",
        "the driver returned 999; run its ONNX networks",
        "install NVIDIA driver",
    ),
    "nothing": ({}, "", "", "it does not say why; run its ONNX networks", "svd-trt build"),
    "a damaged plan": ({}, "MALFORMED_ENGINE", "", "the plan is damaged; build it again: `svd-trt build", "--target"),
    "too small a GPU": ({}, "INSUFFICIENT_GPU_MEMORY", "", "choose a larger GPU with --device", "svd-trt build"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_engine_is_built_again_only_if_that_helps(
    case: str, dynamic_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, bit, log, said, unsaid = REFUSALS[case]
    rig = Rig(monkeypatch, StandInCuda(**gpu))
    rig.install(dynamic_bundle)
    diagnostics = real.EngineInvalidityDiagnostics
    rig.trt.validity = (real.EngineValidity.INVALID, int(diagnostics.__members__[bit].value) if bit else 0)
    rig.trt.validity_log = log
    with pytest.raises(BackendError, match=said) as caught:
        VideoPipeline.open(dynamic_bundle)
    assert unsaid is None or unsaid not in str(caught.value)
    assert rig.cuda.count("cuMemAlloc") == 0
    rig.check()


def test_a_command_for_another_gpu_names_it(dynamic_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, StandInCuda(devices=2, capability=(9, 0)))
    rig.install(dynamic_bundle)
    problem = real.EngineInvalidityDiagnostics.__members__["UNSUPPORTED_CC"]
    rig.trt.validity = (real.EngineValidity.INVALID, int(problem.value))
    with pytest.raises(BackendError, match=r"cuda:1: .*--backend tensorrt --device cuda:1` with the other options of"):
        VideoPipeline.open(dynamic_bundle, device="cuda:1")
    rig.check()


def test_a_bundle_without_engines_is_built_again_with_a_backend(dynamic_bundle: Bundle) -> None:
    """The options of the first build made none."""
    manifest = msgspec.structs.replace(dynamic_bundle.manifest, tensorrt=None)
    without = Bundle(dynamic_bundle.path, manifest)
    with pytest.raises(BackendError, match=r"--backend tensorrt --device cuda:1` with the other options of the first"):
        choose(without, device="cuda:1")


def test_an_engine_that_is_not_the_best_for_a_gpu_runs(standin: Rig, dynamic_bundle: Bundle) -> None:
    standin.install(dynamic_bundle)
    standin.trt.validity = (real.EngineValidity.SUBOPTIMAL, 0)
    VideoPipeline.open(dynamic_bundle).close()


def test_the_command_names_a_checkpoint_that_is_gone(dynamic_bundle: Bundle) -> None:
    source = dynamic_bundle.manifest.source
    changes: list[dict[str, str]] = [
        {"path": "/gone/svd xt", "variant": "fp16"},
        {"commit": "8a1c2"},
        {},
        {"path": "/gone/next.safetensors", "config": "svd-xt"},
    ]
    commands = []
    for change in changes:
        nothing = {"path": None, "variant": None, "commit": None, "config": None}
        changed = msgspec.structs.replace(source, model="org/svd", **(nothing | change))
        manifest = msgspec.structs.replace(dynamic_bundle.manifest, source=changed)
        commands.append(rebuild_command(manifest, Path("a bundle"), "--backend", "tensorrt"))
    assert commands == [
        "`svd-trt build MODEL -o 'a bundle' --backend tensorrt --variant fp16` with the other options of the first "
        "build (MODEL was /gone/svd xt)",
        "`svd-trt build org/svd -o 'a bundle' --backend tensorrt --revision 8a1c2` with the other options of the first "
        "build",
        "`svd-trt build org/svd -o 'a bundle' --backend tensorrt` with the other options of the first build",
        "`svd-trt build MODEL -o 'a bundle' --backend tensorrt --config svd-xt` with the other options of the first "
        "build (MODEL was /gone/next.safetensors)",
    ]


def test_a_missing_library_or_gpu_is_reported(
    standin: Rig, dynamic_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with VideoPipeline.open(dynamic_bundle, device="cpu") as pipe:
        assert "CPU" in pipe.device.name
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"pip install 'svd-trt\[tensorrt\]', or choose --device cpu"):
        VideoPipeline.open(dynamic_bundle, backend="tensorrt")
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", StandInCuda(devices=0))
    assert gpu_count() == 0
    with pytest.raises(BackendError, match="shows no GPU"):
        VideoPipeline.open(dynamic_bundle, device="cuda")
    with VideoPipeline.open(dynamic_bundle) as pipe:
        assert "CPU" in pipe.device.name
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(ImportError, match=r"svd-trt\[gpu\]"):
        VideoPipeline.open(dynamic_bundle, device="cuda")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"device": "gpu"}, "write cpu, cuda, or cuda:1"),
        ({"device": "cuda:x"}, "write cpu, cuda, or cuda:1"),
        ({"backend": "tensorrt", "provider": "cuda"}, "only ONNX Runtime has providers"),
        ({"backend": "tensorrt", "device": "cpu"}, "does not run on cpu"),
        ({"provider": "cpu", "device": "cuda"}, "does not run on cuda"),
        ({"provider": "cuda", "device": "cpu"}, "does not run on cpu"),
        ({"vram_budget": 0}, "whole number of bytes above 0"),
        ({"vram_budget": "8GB"}, "whole number of bytes above 0"),
        ({"vram_budget": True}, "whole number of bytes above 0"),
        ({"device": 0}, "write cpu, cuda, or cuda:1"),
    ],
)
def test_contradicting_options_are_refused(options: dict[str, Any], problem: str, dynamic_bundle: Bundle) -> None:
    with pytest.raises(ArgumentError, match=problem):
        VideoPipeline.open(dynamic_bundle, **options)


def test_a_failed_open_leaks_nothing(standin: Rig, dynamic_bundle: Bundle) -> None:
    cuda = standin.cuda
    for call in ("cuDevicePrimaryCtxRetain", "cuStreamCreate", "cuEventCreate"):
        cuda.fail(call, cuda.CUresult.CUDA_ERROR_UNKNOWN)
        with pytest.raises(CudaError, match=call):
            standin.open(dynamic_bundle)
        cuda.assert_clean()


def test_a_missing_driver_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(flags: int) -> None:
        raise RuntimeError("no libcuda")  # as cuda-python does

    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", SimpleNamespace(cuInit=missing))
    with pytest.raises(BackendError, match="no NVIDIA driver"):
        load_driver()


def test_a_broken_driver_is_an_error(standin: Rig, dynamic_bundle: Bundle) -> None:
    """Otherwise a video would take hours on the CPU without an explanation."""
    standin.cuda.fail("cuInit", standin.cuda.CUresult.CUDA_ERROR_UNKNOWN)
    with pytest.raises(CudaError, match="cuInit failed: CUDA_ERROR_UNKNOWN"):
        VideoPipeline.open(dynamic_bundle)


@pytest.mark.parametrize("device", [None, "cuda"])
def test_a_driver_that_was_updated_without_a_restart_is_an_error(
    device: str | None, standin: Rig, dynamic_bundle: Bundle
) -> None:
    """The GPU is there, so the CPU is no substitute."""
    standin.cuda.fail("cuInit", standin.cuda.CUresult.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH)
    with pytest.raises(CudaError, match=r"SYSTEM_DRIVER_MISMATCH.* restart the machine"):
        VideoPipeline.open(dynamic_bundle, device=device)


def test_a_gpu_without_cuda_python_is_an_error(
    dynamic_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    monkeypatch.setattr("svd_trt.runtime.backends._DEVICE_NODE", tmp_path)
    with pytest.raises(BackendError, match=r"svd-trt\[gpu\]', or choose --device cpu"):
        VideoPipeline.open(dynamic_bundle)
    monkeypatch.setattr("svd_trt.runtime.backends._DEVICE_NODE", tmp_path / "none")
    VideoPipeline.open(dynamic_bundle).close()
