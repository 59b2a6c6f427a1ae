"""``svd-trt infer --profile`` on the CPU, and where it refuses to write."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from svd_trt.cli.layer_profile import print_slowest_layers
from svd_trt.engine.spec import NETWORKS
from svd_trt.runtime.layer_times import LayerTimes
from tests.cli.conftest import assert_refused, invoke

FAST = ("--num-inference-steps", "2", "--num-frames", "3", "--seed", "7", "--device", "cpu")


def test_onnxruntime_reports_every_node(
    small_bundle: Path, picture_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    plain, out, profile = tmp_path / "plain.npy", tmp_path / "o.npy", tmp_path / "layers.json"
    assert invoke("infer", small_bundle, picture_file, "-o", plain, *FAST).returncode == 0
    result = invoke("infer", small_bundle, picture_file, "-o", out, *FAST, "--profile", profile, "--json")
    assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(np.load(out), np.load(plain))
    written = json.loads(profile.read_text())
    assert {name: written[name] for name in json.loads(result.stdout)} == json.loads(result.stdout)
    assert set(written["networks"]) == set(NETWORKS)
    denoiser = written["networks"]["denoiser"]["layers"]
    assert {layer["calls"] for layer in denoiser} == {2}
    convolutions = [layer for layer in denoiser if layer["name"].endswith(" (Conv)")]
    assert len(convolutions) > 10
    assert all(layer["milliseconds"] > 0 for layer in convolutions)
    slowest = max((layer for n in written["networks"].values() for layer in n["layers"]), key=_milliseconds)
    assert slowest["name"][:60] in result.stderr
    assert f"wrote {profile}: the times of " in result.stderr
    assert list(scratch.iterdir()) == []


def test_figures_are_whole_on_a_terminal_of_80_columns() -> None:
    text = io.StringIO()
    times: LayerTimes = {"image_encoder": {f"{n}{'layer' * 30}": [123456.0 + n] * 1000 for n in range(20)}}
    print_slowest_layers(Console(width=80, file=text, soft_wrap=True), times)
    head, *rows, others = text.getvalue().splitlines()
    assert "total ms" in head
    assert all(len(line) <= 80 and line.endswith("5.0%") and "…" in line for line in rows)
    assert others.endswith("40.0%")


def test_standard_output_is_not_a_place_for_a_profile(small_bundle: Path, picture_file: Path) -> None:
    result = invoke("infer", small_bundle, picture_file, "-o", "o.npy", *FAST, "--profile", "-")
    assert_refused(result, "--profile writes a file, and not to standard output", code=2)


def _milliseconds(layer: dict[str, float]) -> float:
    return layer["milliseconds"]


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ("{out}", "is also an input picture or a video to write"),
        ("{picture}", "is also an input picture or a video to write"),
        ("{bundle}/layers.json", "is inside the bundle"),
        ("{folder}", "is a folder; name a file for --profile"),
        ("{folder}/missing/layers.json", "does not exist; create it first"),
        ("/proc/layers.json", "cannot write /proc/layers.json"),
    ],
)
def test_a_profile_that_cannot_be_written_is_refused_before_the_work(
    profile: str, words: str, small_bundle: Path, picture_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.npy"
    places = {"out": out, "picture": picture_file, "bundle": small_bundle, "folder": tmp_path}
    asked = profile.format(**places)
    result = invoke("infer", small_bundle, picture_file, "-o", out, *FAST, "--profile", asked)
    assert_refused(result, words)
    assert not out.exists()
