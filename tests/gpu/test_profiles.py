"""Which optimisation profile a run takes, what is said about it, and plans that follow what engines say they need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import PIL.Image
import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.engine.measured import with_measured
from svd_trt.engine.memory import MemoryRequest, plan_memory
from svd_trt.engine.spec import NETWORKS
from svd_trt.errors import BudgetError
from tests.cli.conftest import invoke
from tests.gpu.conftest import Rig
from tests.gpu.test_cuda_calls import with_changed_plans
from tests.gpu.test_pipeline import FAST

REQUEST = MemoryRequest(frames=4, height=72, width=96)
CASES: dict[str, tuple[dict[str, Any], dict[str, list[bool]]]] = {
    "all exact": ({}, {name: [True] for name in NETWORKS}),
    "a chunk that is smaller": ({"decode_chunk_size": 3}, {"vae_decoder": [False], "denoiser": [True]}),
    "an exact chunk and a rest": (
        {"num_frames": 5, "decode_chunk_size": 4},
        {"vae_decoder": [True, False], "denoiser": [False], "vae_encoder": [True]},
    ),
    "another size": (
        {"height": 40, "width": 136},
        {"vae_encoder": [False], "denoiser": [False], "vae_decoder": [False], "image_encoder": [True]},
    ),
    "no guidance": ({"max_guidance_scale": 1.0}, {"denoiser": [False], "vae_decoder": [True]}),
    "no guidance, then guidance": ({"guidance_interval": (0, 50)}, {"denoiser": [False, True]}),
    "guidance, then none": ({"guidance_interval": (50, 700)}, {"denoiser": [True, False]}),
    "guidance in every step": ({"guidance_interval": (0, 700)}, {"denoiser": [True]}),
    "two videos": (
        {"num_videos_per_prompt": 3, "decode_chunk_size": 4},
        {"denoiser": [False, True], "image_encoder": [True], "vae_decoder": [True]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_exact_profile_is_taken_if_it_holds_the_sizes(
    case: str, rig: Rig, dynamic_bundle: Bundle, dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    """The bundle has exact profiles for one video of 4 frames of 96x72 with guidance, and for 4 frames to decode."""
    changes, expected = CASES[case]
    arguments = FAST | changes
    with rig.open(dynamic_bundle) as pipe:
        made = pipe(picture, **arguments)
    assert {name: [one.exact for one in made.profiles[name]] for name in expected} == expected  # type: ignore[index]
    theirs = dynamic_pipe(picture, **arguments)
    assert np.abs(made.frames.astype(int) - theirs.frames).max() <= (0 if rig.cuda else 2)
    assert theirs.profiles == {}
    if rig.trt is not None:
        taken = {name: [one.index for one in profiles] for name, profiles in made.profiles.items()}
        runs = {name: list(dict.fromkeys(p for n, p in rig.trt.profiles if n == name)) for name in NETWORKS}
        assert taken == runs, "what is said is what ran"


def test_infer_says_which_profiles_it_took(rig: Rig, small_bundle: Path, picture_file: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(small_bundle)
    rig.install(bundle)
    common = ("infer", small_bundle, picture_file, "--num-inference-steps", 2, "--seed", 7, "--json")
    result = invoke(*common, "--num-frames", 4, "--device", "cuda", "-o", tmp_path / "video.npy")
    profiles = json.loads(result.stdout)["profiles"]
    plan = bundle.network("denoiser").plan
    assert plan is not None
    ranges = {symbol: str(r) for symbol, r in plan.profiles[-1].ranges.items()}
    assert profiles["denoiser"] == [{"index": len(plan.profiles) - 1, "exact": False, "ranges": ranges}]
    assert ranges["frames"] == "2:3:6"
    result = invoke(*common, "--num-frames", 3, "--device", "cuda", "-o", tmp_path / "exact.npy")
    (exact,) = json.loads(result.stdout)["profiles"]["denoiser"]
    assert (exact["index"], exact["exact"], exact["ranges"]["frames"]) == (0, True, "3")
    result = invoke(*common, "--num-frames", 3, "--device", "cpu", "-o", tmp_path / "cpu.npy")
    assert json.loads(result.stdout)["profiles"] == {}


# Plans after engines were asked.


def test_a_plan_follows_what_the_engines_say(
    standin: Rig, dynamic_bundle: Bundle, dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    """The engines need half as much again as their builder said, and the budget is what the builder's figures need."""
    budget = plan_memory(dynamic_bundle.manifest, REQUEST, None).total_bytes
    assert budget is not None
    standin.install(dynamic_bundle)
    standin.trt.activation_factor = dict.fromkeys(NETWORKS, 1.5)
    with standin.open(dynamic_bundle, vram_budget=budget) as pipe:
        before = pipe.plan(REQUEST)
        made = pipe(picture, **FAST)
        assert pipe.plan(REQUEST) == made.memory
    assert before.total_bytes == budget
    assert before.words() != made.memory.words(), "the plan of the builder's figures would not fit"
    assert standin.cuda.peak_bytes <= budget
    arguments = FAST | {"decode_chunk_size": made.memory.decode_chunk_size}
    np.testing.assert_array_equal(made.frames, dynamic_pipe(picture, **arguments).frames)


def test_no_plan_fits_what_the_engines_say(standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image) -> None:
    budget = plan_memory(dynamic_bundle.manifest, REQUEST, None).total_bytes
    standin.install(dynamic_bundle)
    standin.trt.activation_factor = dict.fromkeys(NETWORKS, 40.0)
    with (
        standin.open(dynamic_bundle, vram_budget=budget) as pipe,
        pytest.raises(BudgetError, match="the smallest budget that works is"),
    ):
        pipe(picture, **FAST)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_engines_are_asked_once(
    factor: float, standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are loaded once, and a smaller figure than the builder's changes nothing."""
    standin.install(dynamic_bundle)
    standin.trt.activation_factor = dict.fromkeys(NETWORKS, factor)
    loads: list[str] = []
    with standin.open(dynamic_bundle) as pipe:
        device: Any = pipe.device
        opened = device.open
        monkeypatch.setattr(device, "open", lambda *a, **k: (loads.append(a[1]), opened(*a, **k))[1])
        plans = [pipe(picture, **FAST).memory for _ in range(2)]
        assert (device.activations.nbytes or 0) == plans[0].activation_bytes
    assert sorted(loads) == sorted(NETWORKS)
    planned = plan_memory(dynamic_bundle.manifest, REQUEST, None).total_bytes
    assert plans[0] == plans[1]
    assert (plans[0].total_bytes == planned) == (factor <= 1)


def test_what_engines_say_replaces_only_smaller_figures(dynamic_bundle: Bundle) -> None:
    plan = dynamic_bundle.network("denoiser").plan
    assert plan is not None
    figures = [profile.activation_bytes or 0 for profile in plan.profiles]
    changed = with_measured(dynamic_bundle.manifest, {"denoiser": [figures[0] + 1, figures[1] - 1]})
    entry = changed.networks["denoiser"].plan
    assert entry is not None
    assert [profile.activation_bytes for profile in entry.profiles] == [figures[0] + 1, figures[1]]
    others = {name: network for name, network in changed.networks.items() if name != "denoiser"}
    assert msgspec.structs.replace(changed, networks=dynamic_bundle.manifest.networks) == dynamic_bundle.manifest
    assert others == {name: dynamic_bundle.network(name) for name in others}


def test_buffers_for_streamed_weights_are_part_of_the_plan(
    standin: Rig, dynamic_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = with_changed_plans(dynamic_bundle, {"denoiser": {"weight_streaming": True}}, monkeypatch)
    plan = bundle.network("denoiser").plan
    assert plan is not None
    with standin.open(bundle) as pipe, pipe.device.open(bundle, "denoiser", streamed_bytes=100_000) as session:
        assert session.profile_bytes() == tuple(
            -(-(profile.activation_bytes or 0) // 256) * 256 for profile in plan.profiles
        )
