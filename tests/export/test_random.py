"""Random checkpoints: the published sizes, equal weights in memory and on disk, and no two equal parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svd_trt.errors import ArgumentError
from svd_trt.export.checkpoint import COMPONENT_OF, Component
from svd_trt.export.checkpoint_kinds import open_checkpoint
from svd_trt.export.presets import PRESETS, configurations
from svd_trt.export.random_checkpoint import empty_model, random_model

COMPONENTS: list[Component] = list(dict.fromkeys(COMPONENT_OF.values()))


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_sizes_are_as_stated(preset: str, component: Component) -> None:
    """The full sizes are also those published: 1,524.6 M parameters in the UNet."""
    model = empty_model(component, configurations(PRESETS[preset])[component])
    assert sum(p.numel() for p in model.parameters()) == PRESETS[preset].parameters[component]
    assert all(p.is_meta for p in model.parameters()), "counting takes no memory"


@pytest.mark.parametrize("component", COMPONENTS)
def test_one_model_in_both_precisions(component: Component) -> None:
    half, full = (random_model(component, PRESETS["tiny"], 3, dtype) for dtype in (torch.float16, torch.float32))
    other = random_model(component, PRESETS["tiny"], 4, torch.float32)
    for (name, a), b, c in zip(half.named_parameters(), full.parameters(), other.parameters(), strict=True):
        assert a.dtype == torch.float16
        assert torch.equal(a.float(), b), name
        assert not torch.equal(b, c), name
        if b.numel() > 4096:
            fan_in = b.numel() // b.shape[0]
            assert float(b.std()) == pytest.approx((3 * fan_in) ** -0.5, rel=0.1), name


def test_in_memory_as_on_disk(tiny_checkpoint: Path) -> None:
    here, there = open_checkpoint("random:tiny"), open_checkpoint(str(tiny_checkpoint))
    assert here.description == there.description
    assert dict(here.parameters) == dict(there.parameters)
    for component in COMPONENTS:
        pairs = zip(
            here.load(component, torch.float32).parameters(),
            there.load(component, torch.float32).parameters(),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in pairs)


def test_names() -> None:
    assert open_checkpoint("random:svd").description.model.num_frames == 14
    assert open_checkpoint("random:svd-xt@7").description.model.num_frames == 25
    digests = [open_checkpoint(f"random:{n}").source.digests["unet"] for n in ("tiny", "tiny@0", "tiny@1", "svd")]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    for name in ("random:", "random:sd", "random:tiny@-1", "random:tiny@x"):
        with pytest.raises(ArgumentError):
            open_checkpoint(name)


def test_blend_factors_differ() -> None:
    """Equal factors would hide that two are mixed up."""
    model = random_model("unet", PRESETS["tiny"], 0, torch.float32)
    factors = torch.cat([p.flatten() for n, p in model.named_parameters() if n.endswith("mix_factor")])
    assert len(factors) > 10
    assert 0.5 < float(factors.std()) < 1.5
