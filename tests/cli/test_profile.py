"""``svd-trt infer --profile`` on the CPU, and where it refuses to write."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from svd_trt.engine.spec import NETWORKS
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
    assert list(scratch.iterdir()) == []


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
