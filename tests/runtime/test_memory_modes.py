"""Bundles with rewrites, split guidance or feed-forward chunks give the latents of a plain bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from svd_trt import BuildOptions, Bundle, VideoPipeline, build_bundle
from svd_trt.engine.memory import MemoryPlan, MemoryRequest, plan_footprint
from svd_trt.engine.spec import Range

pytestmark = pytest.mark.slow

OPTIONS = BuildOptions(
    height=Range.parse("40"), width=Range.parse("48"), frames=Range(2, 3, 6), precision="fp32", backend="tensorrt-rtx"
)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"rewrites": False},
    "rewritten": {},
    "split guidance in chunks": {"split_guidance": True, "ff_chunks": 5},
}


@pytest.fixture(scope="module")
def bundles(small_checkpoint: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("modes")
    for name, changes in VARIANTS.items():
        build_bundle(small_checkpoint, folder / name, replace(OPTIONS, cache=cache, **changes))
    return {name: Bundle.open(folder / name) for name in VARIANTS}


def frames_of(bundle: Bundle, picture: PIL.Image.Image, **arguments: Any) -> Any:
    with VideoPipeline.open(bundle) as pipe:
        return pipe(picture, seed=3, num_frames=5, num_inference_steps=4, output_type="latent", **arguments).frames


@pytest.mark.parametrize("scale", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("name", ["rewritten", "split guidance in chunks"])
def test_latents_match_the_plain_networks(
    name: str, scale: float, bundles: dict[str, Bundle], picture: PIL.Image.Image, record_property: Any
) -> None:
    plain = frames_of(bundles["plain"], picture, max_guidance_scale=scale)
    light = frames_of(bundles[name], picture, max_guidance_scale=scale)
    difference = float(np.abs(plain - light).max() / plain.std())
    record_property("relative_difference", difference)
    assert difference <= 5e-5


def test_rewrites_and_chunks_save_memory_and_work(bundles: dict[str, Bundle], record_property: Any) -> None:
    denoisers = [bundles[name].network("denoiser") for name in VARIANTS]
    plain, rewritten, light = (d.plan.activation_bytes for d in denoisers if d.plan)
    record_property("rewritten_share", rewritten / plain)
    record_property("light_share", light / plain)
    assert light < rewritten < plain
    flops = [d.flops for d in denoisers]
    assert flops[1] < flops[0]
    assert flops[2] * 2 == pytest.approx(flops[1], rel=0.01)
    assert denoisers[1].onnx.nodes < denoisers[0].onnx.nodes


def test_options_are_in_the_manifest(bundles: dict[str, Bundle]) -> None:
    plain, rewritten, light = (bundles[name].manifest for name in VARIANTS)
    assert (plain.graph.rewrites, plain.graph.ff_chunks) == (False, 1)
    assert rewritten.graph.rewrites
    assert light.graph.ff_chunks == 5
    assert light.ranges.branches.max == 1
    needs = []
    for manifest, split in ((plain, False), (rewritten, False), (light, True)):
        found = plan_footprint(manifest, MemoryRequest(6, 40, 48), MemoryPlan(False, split, 1))
        assert found is not None
        needs.append(found.total)
    assert needs == sorted(needs, reverse=True)
