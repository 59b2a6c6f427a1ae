"""``svd-trt verify``: a bundle against diffusers, right and wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.engine.spec import NETWORKS
from svd_trt.export.verify import sizes_to_try
from tests.cli.conftest import Run, invoke


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_good_bundle_passes(
    precision: str,
    dynamic_bundle: Bundle,
    small_bundle: Path,
    checkpoint: Path,
    small_checkpoint: Path,
    run: Run,
) -> None:
    frames = ("--frames", "2", "--frames", "6")
    size = ("--size", "48x40")
    if precision == "fp32":  # in a process of its own
        done = run("verify", dynamic_bundle.path, "--model", checkpoint, *frames, *size, "--json")
    else:
        done = invoke("verify", small_bundle, "--model", small_checkpoint, *frames, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"]
    outputs = [d["what"] for d in found["differences"]]
    assert {output.partition(".")[0] for output in outputs} == {*NETWORKS, "video"}
    assert outputs.count("video") == outputs.count("denoiser.denoised") == 2, "both frame counts"
    assert outputs.count("image_encoder.image_embeds") == 1, "it has no frames"
    assert all(d["max_abs"] >= 0 for d in found["differences"])


def test_every_combination_of_sizes(dynamic_bundle: Bundle) -> None:
    with VideoPipeline.open(dynamic_bundle) as pipe:
        tried = sizes_to_try(pipe, [2, 9], [(40, 48), (136, 160)])
        assert [(s["frames"], s["height"], s["width"], s["chunk"]) for s in tried] == [
            (2, 40, 48, 2),
            (2, 136, 160, 2),
            (9, 40, 48, 9),
            (9, 136, 160, 9),
        ]
        (middle,) = sizes_to_try(pipe, [], [])
        assert middle == {
            "batch": 1,
            "pictures": 1,
            "branches": 2,
            "frames": 4,
            "height": 72,
            "width": 96,
            "chunk": 4,
        }


def test_another_checkpoint_fails(dynamic_bundle: Bundle, other_checkpoint: Path) -> None:
    only = ("--only", "denoiser", "--only", "image_encoder")
    done = invoke("verify", dynamic_bundle.path, "--model", other_checkpoint, "--size", "48x40", *only)
    assert done.returncode == 1
    assert "has other weights than the bundle was built from" in done.stderr
    assert "beyond tolerance: image_encoder.image_embeds, denoiser." in done.stderr
    assert "FAILED" in done.stdout


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
def test_mistakes(arguments: tuple[str, ...], code: int, message: str, dynamic_bundle: Bundle) -> None:
    done = invoke("verify", dynamic_bundle.path, *arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
