"""The denoisers of a bundle with shallow steps, as torch modules and as networks of a bundle."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from svd_trt import BuildOptions, Bundle, VideoPipeline, build_bundle
from svd_trt.engine.spec import (
    DEEP_FEATURES,
    SHALLOW,
    KeptFeatures,
    NetworkName,
    NetworkSpec,
    Range,
    Ranges,
    network_specs,
)
from svd_trt.errors import ArgumentError
from svd_trt.export.build_job import make_job
from svd_trt.export.checkpoint_kinds import open_checkpoint
from svd_trt.export.networks import make_network
from svd_trt.export.reference import diffusers_output, draw_inputs, load_models
from svd_trt.export.verify import verify_networks
from svd_trt.progress import ignore_progress
from tests.conftest import TINY
from tests.export.test_networks import END, TOLERANCE, check_network, sizes_at

FP32 = TOLERANCE["fp32"]["denoiser"]
SIZES = {"batch": 2, "pictures": 2, "branches": 2, "frames": 3, "chunk": 3, "height": 48, "width": 80}


@pytest.fixture(scope="module")
def model() -> Any:
    """The description of the trained miniature, whose UNet has three levels."""
    return open_checkpoint(str(TINY / "checkpoint")).description


@pytest.fixture(scope="module")
def specs(model: Any) -> dict[NetworkName, NetworkSpec]:
    ranges = Ranges(**{symbol: Range(1, size, size) for symbol, size in SIZES.items()})
    return network_specs(model.model, ranges, KeptFeatures(model.deep_channels, "float32"))


@pytest.fixture(scope="module")
def models() -> Iterator[Any]:
    with load_models(open_checkpoint(str(TINY / "checkpoint")), "denoiser") as found:
        yield found


def run(module: torch.nn.Module, spec: NetworkSpec, inputs: dict[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(module(*(torch.from_numpy(inputs[tensor.name]) for tensor in spec.inputs)))


@pytest.mark.parametrize("rewrites", [True, False])
def test_a_shallow_step_with_fresh_features_is_the_whole_step(
    rewrites: bool, specs: dict[NetworkName, NetworkSpec], models: Any
) -> None:
    """Sizes of 16 that are not multiples of 64, so the deep levels are cropped and the top one is not."""
    inputs = draw_inputs(specs["denoiser"], SIZES)

    def made(name: NetworkName, *, keeps: bool, doubling: bool) -> torch.nn.Module:
        unet = copy.deepcopy(models.unet)
        return make_network(name, unet, rewrites=rewrites, doubling=doubling, keeps_features=keeps)

    plain = run(made("denoiser", keeps=False, doubling=False), specs["denoiser"], inputs)
    *step, features = run(made("denoiser", keeps=True, doubling=False), specs["denoiser"], inputs)
    for one, other in zip(step, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert features.shape == specs[SHALLOW].tensor(DEEP_FEATURES).resolve(SIZES)
    shallow = run(made(SHALLOW, keeps=False, doubling=True), specs[SHALLOW], inputs | {DEEP_FEATURES: features.numpy()})
    stale = run(
        made(SHALLOW, keeps=False, doubling=True), specs[SHALLOW], inputs | {DEEP_FEATURES: 1.1 * features.numpy()}
    )
    for one, other, off in zip(shallow, step, stale, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=FP32)
        assert (off - other).abs().max() > 20 * FP32, "the features must matter"


def test_the_kept_features_and_the_shallow_step_are_those_of_diffusers(
    specs: dict[NetworkName, NetworkSpec], models: Any
) -> None:
    """In diffusers, the upsampler to the top level gets other features by a hook."""
    for name in ("denoiser", SHALLOW):
        inputs = draw_inputs(specs[name], SIZES)
        module = make_network(name, copy.deepcopy(models.unet), doubling=name == SHALLOW, keeps_features=True)
        ours = run(module, specs[name], inputs)
        theirs = diffusers_output(models, name, inputs, keeps_features=True)
        assert len(ours) == len(theirs) == len(specs[name].outputs)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, torch.from_numpy(other), rtol=0, atol=FP32)


@pytest.mark.parametrize("end", END)
@pytest.mark.parametrize("name", ["denoiser", SHALLOW])
def test_networks_of_a_bundle(
    name: NetworkName, end: str, shallow_bundle: Bundle, small_checkpoint: Path, record_property: Any
) -> None:
    bundle = shallow_bundle
    sizes = sizes_at(bundle.network(name).spec, end)
    with VideoPipeline.open(bundle, backend="onnxruntime") as pipe:
        found = list(verify_networks(pipe, open_checkpoint(str(small_checkpoint)), [sizes], [name]))
    record_property("largest_difference", max(d.max_abs for d in found))
    assert [d.what.partition(".")[2] for d in found] == [t.name for t in bundle.network(name).spec.outputs]
    assert all(d.ok and d.max_abs <= TOLERANCE["fp16"]["denoiser"] and d.reference_std > 0.01 for d in found)


def test_a_shallow_denoiser_is_a_small_part(shallow_bundle: Bundle) -> None:
    whole, shallow = (shallow_bundle.network(name) for name in ("denoiser", SHALLOW))
    assert shallow.flops < 0.9 * whole.flops  # both levels of the small one are 32 wide; SVD has four, deep ones wider
    assert shallow.onnx.parameters < 0.75 * whole.onnx.parameters
    assert whole.plan is not None
    assert shallow.plan is not None
    assert whole.spec.tensor(DEEP_FEATURES).dtype == "float16"
    assert [r.ranges for r in shallow.plan.profiles] == [r.ranges for r in whole.plan.profiles]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"height": 40, "width": 64}, "--height 40: with --shallow-steps, sizes are multiples of 16"),
        ({"height": 64, "width": "64:72:96"}, "--width 64:72:96: with --shallow-steps, sizes are multiples of 16"),
        (
            {"height": "64:64:96", "width": 64, "exact_sizes": "72x64"},
            "--exact-sizes 72x64: with --shallow-steps, sizes are multiples of 16",
        ),
    ],
)
def test_sizes_without_a_half_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ArgumentError) as refused:
        make_job("random:tiny", BuildOptions(shallow_steps=True, backend="tensorrt-rtx", **options), ignore_progress)
    assert str(refused.value) == problem


@pytest.mark.slow
def test_a_range_of_sizes(checkpoint: Path, cache: Path, tmp_path: Path, record_property: Any) -> None:
    options = BuildOptions(
        height="64:64:96",
        width="64:64:80",
        frames="2:3:6",
        precision="fp32",
        backend="onnxruntime",
        shallow_steps=True,
        cache=cache,
    )
    bundle = build_bundle(checkpoint, tmp_path / "bundle", options).bundle
    assert bundle.manifest.host.symbols["height"].multiple == 16
    for name in ("denoiser", SHALLOW):
        for end in END:
            check_network(bundle, name, end, checkpoint, record_property)  # type: ignore[arg-type]
    with VideoPipeline.open(bundle) as pipe, pytest.raises(ArgumentError, match="height 72 is not a multiple of 16"):
        pipe(TINY / "picture.png", height=72)
