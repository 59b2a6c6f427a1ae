"""Videos with ``deep_every``: which steps are deep, what that changes, and what refuses it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest

from svd_trt import ArgumentError, Bundle, VideoPipeline
from svd_trt.engine.memory import MemoryRequest, smallest_budget
from svd_trt.runtime.deep_steps import deep_steps
from tests.conftest import TINY

Array = npt.NDArray[Any]
FAST: dict[str, Any] = {"num_frames": 3, "num_inference_steps": 5, "seed": 42}


@pytest.fixture(scope="module")
def pipe(shallow_bundle: Bundle) -> Iterator[VideoPipeline]:
    with VideoPipeline.open(shallow_bundle, backend="onnxruntime") as opened:
        yield opened


@pytest.fixture(scope="module")
def rocket() -> PIL.Image.Image:
    return PIL.Image.open(TINY / "picture.png")


def letters(every: int, guided: str) -> str:
    """The schedule as text, D for deep and s for shallow; ``guided`` has G for steps with guidance."""
    return "".join("D" if deep else "s" for deep in deep_steps(every, [step == "G" for step in guided]))


@pytest.mark.parametrize(
    ("every", "guided", "schedule"),
    [
        (1, "GGGG", "DDDD"),
        (2, "GGGGG", "DsDsD"),
        (3, "GGGGGGGG", "DssDssDs"),
        (9, "GGGG", "Dsss"),
        (3, "-----", "DssDs"),
        (2, "-GGGG--", "DDsDsDs"),
        (3, "--GGGG", "DsDssD"),
        (2, "", ""),
    ],
)
def test_the_schedule(every: int, guided: str, schedule: str) -> None:
    """The first step is deep, and so is the first one with other branches, from which counting starts again."""
    assert letters(every, guided) == schedule


def latents(pipe: VideoPipeline, picture: Any, **arguments: Any) -> Array:
    found: Array = pipe(picture, output_type="latent", **(FAST | arguments)).frames
    return found


def test_without_shallow_steps_nothing_changes(
    pipe: VideoPipeline, small_bundle: Path, rocket: PIL.Image.Image
) -> None:
    """As in a bundle that was built without the option, to the bit."""
    with VideoPipeline.open(small_bundle, backend="onnxruntime") as plain:
        wanted = plain(rocket, output_type="np", **FAST).frames
    np.testing.assert_array_equal(pipe(rocket, output_type="np", **FAST).frames, wanted)
    np.testing.assert_array_equal(pipe(rocket, output_type="np", deep_every=1, **FAST).frames, wanted)


def test_branches_one_at_a_time(shallow_bundle: Bundle, pipe: VideoPipeline, rocket: PIL.Image.Image) -> None:
    """The smallest budget loads both denoisers together, and each pass keeps the features of its branch."""
    arguments = FAST | {"deep_every": 2, "decode_chunk_size": 1}
    least = smallest_budget(shallow_bundle.manifest, MemoryRequest(3, 32, 32, decode_chunk_size=1, shallow_steps=True))
    together = latents(pipe, rocket, **arguments)
    with VideoPipeline.open(shallow_bundle, backend="onnxruntime", vram_budget=least) as lean:
        made = lean(rocket, output_type="latent", **arguments)
    assert (made.memory.split_guidance, made.memory.resident) == (True, False)
    np.testing.assert_allclose(made.frames, together, atol=2e-2)
    whole = latents(pipe, rocket, **(arguments | {"deep_every": 1}))
    assert np.abs(made.frames - together).max() < np.abs(together - whole).max()


def test_latents_of_a_callback(pipe: VideoPipeline, rocket: PIL.Image.Image) -> None:
    """Shallow steps go on from other latents, with the features of the deep step before."""

    def halve(_: Any, step: int, __: float, values: dict[str, Any]) -> Any:
        return {"latents": values["latents"] * 0.5} if step in (1, 2) else None

    found = latents(pipe, rocket, deep_every=2, callback_on_step_end=halve)
    assert np.isfinite(found).all()
    assert np.abs(found - latents(pipe, rocket, deep_every=2)).max() > 1e-3


def test_a_bundle_without_shallow_denoiser_refuses(small_bundle: Path, rocket: PIL.Image.Image) -> None:
    with VideoPipeline.open(small_bundle, backend="onnxruntime") as plain:
        with pytest.raises(ArgumentError) as refused:
            plain(rocket, deep_every=3)
        assert plain(rocket, deep_every=1, output_type="np", **FAST).frames.shape == (1, 3, 32, 32, 3)
    assert str(refused.value) == (
        "deep_every 3 needs a shallow denoiser, and this bundle has none; "
        "build one with --shallow-steps, or leave deep_every out"
    )


@pytest.mark.parametrize("value", [0, -1, 1001, 2.5, "3", True])
def test_malformed_values_are_refused(value: Any, pipe: VideoPipeline, rocket: PIL.Image.Image) -> None:
    with pytest.raises(ArgumentError, match=r"^deep_every must be "):
        pipe(rocket, deep_every=value)


def test_limits_are_in_the_manifest(shallow_bundle: Bundle, small_bundle: Path) -> None:
    with_, without = (
        bundle.manifest.host.arguments["deep_every"] for bundle in (shallow_bundle, Bundle.open(small_bundle))
    )
    assert (with_.default, with_.min, with_.max) == (1, 1, 1000)
    assert (without.default, without.min, without.max) == (1, 1, 1)


def test_the_value_is_in_the_metadata(pipe: VideoPipeline, rocket: PIL.Image.Image) -> None:
    made = pipe(rocket, deep_every=2, **FAST)
    assert made.parameters.deep_every == 2
    assert made.parameters.as_dict()["deep_every"] == 2
