"""Real TensorRT builds: every node is parsed, profiles match the ranges, memory is recorded, cancelling works."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from svd_trt import Bundle
from svd_trt.engine.kernels import read_kernels
from svd_trt.engine.plan import build_plan, kernels_path
from svd_trt.engine.profiles import profiles_of
from svd_trt.engine.spec import NETWORKS, Range
from svd_trt.engine.tensorrt_build import (
    EngineOptions,
    MappedWeights,
    kept_timings,
    make_config,
    make_profile,
    parse_network,
)
from svd_trt.engine.tensorrt_import import find_tensorrt
from svd_trt.errors import EngineBuildError

pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx", reason="TensorRT for RTX is not installed (svd-trt[rtx])")


@pytest.fixture
def builder() -> tuple[Any, Any, Any]:
    tensorrt = find_tensorrt("tensorrt-rtx")
    logger = tensorrt.trt.Logger(tensorrt.trt.Logger.ERROR)
    return tensorrt, tensorrt.trt.Builder(logger), logger


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_plans_are_built_and_described(
    precision: str, dynamic_bundle: Bundle, small_bundle: Path, builder: Any
) -> None:
    bundle = {"fp32": dynamic_bundle, "fp16": Bundle.open(small_bundle)}[precision]
    assert bundle.manifest.precision == precision
    tensorrt, trt_builder, logger = builder
    assert bundle.manifest.tensorrt is not None
    assert (bundle.manifest.tensorrt.name, bundle.manifest.tensorrt.version) == ("tensorrt-rtx", tensorrt.version)
    for name in NETWORKS:
        entry = bundle.network(name)
        assert entry.plan is not None
        assert entry.plan.file.size > 1000
        assert entry.plan.activation_bytes is not None
        assert entry.plan.activation_bytes > 0
        bytes_each = 2 if bundle.manifest.precision == "fp16" and name != "vae_encoder" else 4
        assert entry.plan.weight_bytes is not None
        # The builder folds constants, lays weights out for its kernels, and may keep small ones twice.
        assert 0.8 <= entry.plan.weight_bytes / (entry.onnx.parameters * bytes_each) <= 2
        path = bundle.onnx_path(name)
        network, _parser = parse_network(tensorrt, trt_builder, logger, path, entry.spec, MappedWeights(path))
        assert network.num_layers == entry.plan.layers


@pytest.mark.parametrize("name", NETWORKS)
def test_profile_holds_the_ranges(name: Any, dynamic_bundle: Bundle, builder: Any) -> None:
    spec = dynamic_bundle.network(name).spec
    _, trt_builder, _ = builder
    plan = dynamic_bundle.network(name).plan
    assert plan is not None
    assert plan.profiles[-1].ranges == spec.ranges
    for ranges in (profile.ranges for profile in plan.profiles):
        profile = make_profile(trt_builder, spec, ranges)
        assert profile
        for tensor in spec.inputs:
            if tensor.dynamic:
                held = [tuple(shape) for shape in profile.get_shape(tensor.name)]
                assert held == [
                    tensor.resolve({s: getattr(r, end) for s, r in ranges.items()}) for end in ("min", "opt", "max")
                ]


def test_every_onnx_operator_is_taken(dynamic_bundle: Bundle, builder: Any) -> None:
    """The parser reports the operators that it does not support; there are none."""
    tensorrt, trt_builder, logger = builder
    for name in NETWORKS:
        network = trt_builder.create_network(0)
        parser = tensorrt.trt.OnnxParser(network, logger)
        supported = parser.supports_model_v2(
            dynamic_bundle.onnx_path(name).read_bytes(), str(dynamic_bundle.onnx_path(name))
        )
        assert supported, [parser.get_error(i).desc() for i in range(parser.num_errors)]
        assert parser.num_subgraphs == 1


def test_a_refused_graph_is_named(small_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(small_bundle)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(bundle.onnx_path("denoiser").read_bytes()[:5000])
    with pytest.raises(EngineBuildError, match="cannot parse denoiser"):
        build_plan(find_tensorrt("tensorrt-rtx"), broken, bundle.network("denoiser").spec, tmp_path / "p.plan")
    assert not (tmp_path / "p.plan").exists()


def test_a_graph_of_other_tensors_is_refused(small_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(small_bundle)
    with pytest.raises(EngineBuildError, match="not what its manifest says"):
        build_plan(
            find_tensorrt("tensorrt-rtx"),
            bundle.onnx_path("vae_encoder"),
            bundle.network("image_encoder").spec,
            tmp_path / "p.plan",
        )


def test_weight_streaming_is_a_flag_of_the_builder(small_bundle: Path, builder: Any) -> None:
    bundle = Bundle.open(small_bundle)
    tensorrt, trt_builder, _ = builder
    spec = bundle.network("denoiser").spec
    flag = tensorrt.trt.BuilderFlag.WEIGHT_STREAMING
    for wanted in (False, True):
        options = EngineOptions(weight_streaming=wanted)
        config = make_config(tensorrt, trt_builder, spec, profiles_of(spec, ()), options)
        assert config.get_flag(flag) == wanted
        assert config.num_optimization_profiles == 1


def test_fp32_is_not_rounded_to_tf32(small_bundle: Path, builder: Any) -> None:
    spec = Bundle.open(small_bundle).network("vae_encoder").spec
    tensorrt, trt_builder, _ = builder
    tf32 = tensorrt.trt.BuilderFlag.TF32
    assert trt_builder.create_builder_config().get_flag(tf32), "TensorRT's default"
    assert not make_config(tensorrt, trt_builder, spec, profiles_of(spec, ()), EngineOptions()).get_flag(tf32)


@pytest.mark.parametrize("name", NETWORKS)
def test_profiles_of_the_default_build(name: Any, dynamic_bundle: Bundle) -> None:
    """The optimum of every range is a profile of its own, whose activations are its own, and the range is the last."""
    entry = dynamic_bundle.network(name)
    assert entry.plan is not None
    exact, whole = entry.plan.profiles
    assert exact.ranges == {symbol: Range(r.opt, r.opt, r.opt) for symbol, r in entry.spec.ranges.items()}
    assert whole.ranges == entry.spec.ranges
    assert exact.activation_bytes is not None
    assert whole.activation_bytes is not None
    assert 0 < exact.activation_bytes < whole.activation_bytes, "the largest sizes need more than the optimum"


@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_are_listed_for_each_profile(name: Any, dynamic_bundle: Bundle) -> None:
    plan = dynamic_bundle.network(name).plan
    assert plan is not None
    assert plan.kernels in dynamic_bundle.manifest.files
    kernels = read_kernels(kernels_path(dynamic_bundle.path / plan.file.path))
    assert [p.ranges for p in kernels.profiles] == [p.ranges for p in plan.profiles]
    assert [p.activation_bytes for p in kernels.profiles] == [p.activation_bytes for p in plan.profiles]
    assert all(len(p.kernels) > 20 for p in kernels.profiles)


def test_engines_for_several_gpus(builder: Any, small_bundle: Path, tmp_path: Path) -> None:
    _, trt_builder, _ = builder
    bundle = Bundle.open(small_bundle)
    spec, graph = bundle.network("image_encoder").spec, bundle.onnx_path("image_encoder")
    both = find_tensorrt("tensorrt-rtx", targets=["sm75", "sm120"])
    assert both.target == "sm75,sm120"
    config = make_config(both, trt_builder, spec, profiles_of(spec, ()), EngineOptions(optimization_level=1))
    found = [str(config.get_compute_capability(i)) for i in range(config.num_compute_capabilities)]
    assert found == ["ComputeCapability.SM75", "ComputeCapability.SM120"]
    assert config.builder_optimization_level == 1
    build_plan(both, graph, spec, tmp_path / "both.plan")
    assert (tmp_path / "both.plan").stat().st_size > 1000


class _Config:
    """A builder's configuration, as far as its timing cache goes: text of a version and times."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.cache = SimpleNamespace(content=b"")

    def create_timing_cache(self, content: bytes) -> SimpleNamespace:
        return SimpleNamespace(content=content)

    def set_timing_cache(self, cache: SimpleNamespace, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return not cache.content or cache.content.startswith(self.version.encode())

    def get_timing_cache(self) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: self.version.encode() + b"+" + self.cache.content)


def test_kernel_times_are_kept(tmp_path: Path) -> None:
    """TensorRT for RTX times nothing, so this is the file alone: made, extended, and left alone by another version."""
    path, notes = tmp_path / "new" / "times", list[str]()
    for _ in range(2):
        with kept_timings(_Config("11"), path, notes.append):
            pass
    assert (path.read_bytes(), notes) == (b"11+11+", [])
    with kept_timings(_Config("12"), path, notes.append):
        pass
    assert path.read_bytes() == b"11+11+"
    assert len(notes) == 1
    assert "another TensorRT or GPU" in notes[0]
    (tmp_path / "folder").mkdir()
    with kept_timings(_Config("11"), tmp_path / "folder", notes.append):  # cannot be read
        pass
    with kept_timings(_Config("11"), path / "below a file", notes.append):  # cannot be written
        pass
    assert ["cannot be read" in notes[1], "cannot be written" in notes[2]] == [True, True]
    with pytest.raises(EngineBuildError), kept_timings(_Config("11"), path, notes.append):
        raise EngineBuildError("failed")
    assert path.read_bytes() == b"11+11+"


def test_progress_grows_to_the_end(small_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(small_bundle)
    calls: list[tuple[str, float, float]] = []
    spec = bundle.network("vae_decoder").spec
    build_plan(
        find_tensorrt("tensorrt-rtx"),
        bundle.onnx_path("vae_decoder"),
        spec,
        tmp_path / "p.plan",
        progress=lambda *call: calls.append(call),
    )
    seen = [done for _, done, _ in calls]
    assert {(stage, total) for stage, _, total in calls} == {("vae_decoder: building the engine", 1)}
    assert seen == sorted(seen)
    assert len(seen) > 10
    assert seen[0] == 0
    assert 0.5 < seen[-2] <= seen[-1] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.kernels.json", "p.plan"]


@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_ctrl_c_stops_the_builder(fraction: float, dynamic_bundle: Bundle, tmp_path: Path) -> None:
    """SIGINT during TensorRT's short steps and during its longest one: no process and no file is left."""

    def progress(stage: str, done: float, total: float) -> None:
        if done >= fraction:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_denoiser(dynamic_bundle, tmp_path / "p.plan", progress)
    assert list(tmp_path.iterdir()) == []
    assert builders() == []


def test_any_exception_ends_a_builder_that_does_not_answer(dynamic_bundle: Bundle, tmp_path: Path) -> None:
    """SIGTERM raises SystemExit while the child is in a step that cannot be interrupted."""

    def progress(stage: str, done: float, total: float) -> None:
        for pid in builders():
            os.kill(pid, signal.SIGSTOP)
            raise SystemExit(143)

    with pytest.raises(SystemExit):
        build_denoiser(dynamic_bundle, tmp_path / "p.plan", progress)
    assert list(tmp_path.iterdir()) == []
    assert builders() == []


def test_a_killed_builder_is_an_error(dynamic_bundle: Bundle, tmp_path: Path) -> None:
    """SIGKILL, as the kernel sends it when memory runs out."""

    def progress(stage: str, done: float, total: float) -> None:
        for pid in builders():
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(EngineBuildError, match="memory ran out"):
        build_denoiser(dynamic_bundle, tmp_path / "p.plan", progress)
    assert list(tmp_path.iterdir()) == []


def build_denoiser(bundle: Bundle, target: Path, progress: Any) -> None:
    spec = bundle.network("denoiser").spec
    build_plan(find_tensorrt("tensorrt-rtx"), bundle.onnx_path("denoiser"), spec, target, progress=progress)


def builders() -> list[int]:
    """Process ids of the running engine builders that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # also raised for a zombie
            if "svd_trt.engine.tensorrt_build" in process.cmdline():
                found.append(process.pid)
    return found
