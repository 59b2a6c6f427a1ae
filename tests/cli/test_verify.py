"""``svd-trt verify``: a bundle against diffusers, right and wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from svd_trt import Bundle
from svd_trt.engine.spec import NETWORKS
from tests.cli.conftest import Run

TINY = Path(__file__).parent.parent.parent / "examples" / "tiny" / "checkpoint"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_good_bundle_passes(precision: str, tiny_bundle: Callable[[str], Bundle], run: Run) -> None:
    done = run("verify", tiny_bundle(precision).path, "--model", TINY, "--frames", "2", "--frames", "8", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"]
    whats = [d["what"] for d in found["differences"]]
    assert {what.partition(".")[0] for what in whats} == {*NETWORKS, "video"}
    assert whats.count("video") == 2, "both frame counts"
    assert all(d["max_abs"] >= 0 for d in found["differences"])


@pytest.mark.xdist_group("dynamic")
def test_ends_of_the_ranges(dynamic_bundle: Bundle, checkpoint: Path, run: Run) -> None:
    sizes = ("--size", "48x40", "--size", "160x136", "--frames", "2", "--frames", "9")
    done = run("verify", dynamic_bundle.path, "--model", checkpoint, *sizes, "--only", "denoiser")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("denoiser.denoised") == 4


@pytest.mark.xdist_group("dynamic")
def test_another_checkpoint_fails(dynamic_bundle: Bundle, run: Run) -> None:
    only = ("--only", "denoiser", "--only", "image_encoder")
    done = run("verify", dynamic_bundle.path, "--model", "random:tiny@7", *only)
    assert done.returncode == 1
    assert "has other weights than the bundle was built from" in done.stderr
    assert "beyond tolerance: image_encoder.image_embeds, denoiser." in done.stderr
    assert "FAILED" in done.stdout


@pytest.mark.xdist_group("dynamic")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--frames", "40", "--model", "random:tiny"), 1, "this bundle was built for (2 to 9)"),
        (("--size", "4000x40", "--model", "random:tiny"), 1, "width 4000"),
        (("--size", "large"), 2, "is not a size"),
        (("--model", "random:mid"), 1, "another architecture"),
        (("--model", "random:none"), 1, "no preset"),
        (("--only", "unet"), 2, "is not one of"),
        ((), 2, "give --model"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], code: int, message: str, dynamic_bundle: Bundle, run: Run) -> None:
    done = run("verify", dynamic_bundle.path, *arguments)
    assert done.returncode == code
    assert message in done.stderr
