"""``infer --profile`` on a GPU: the times that TensorRT reports of every layer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.engine.spec import NETWORKS
from svd_trt.errors import ArgumentError
from svd_trt.runtime.layer_times import LayerTimes
from tests.cli.conftest import invoke
from tests.gpu.conftest import Rig

FAST = ("--num-inference-steps", "4", "--num-frames", "3", "--seed", "7", "--decode-chunk-size", "2")


def test_every_layer_has_its_calls_and_times(rig: Rig, small_bundle: Path, picture_file: Path, tmp_path: Path) -> None:
    rig.install(Bundle.open(small_bundle))
    plain, out, profile = tmp_path / "plain.npy", tmp_path / "o.npy", tmp_path / "layers.json"
    common = ("infer", small_bundle, picture_file, *FAST, "--device", "cuda")
    assert invoke(*common, "-o", plain).returncode == 0
    result = invoke(*common, "-o", out, "--profile", profile)
    assert result.returncode == 0, result.stderr
    assert "CUDA graphs are not used: the times of layers are measured" in result.stderr
    np.testing.assert_array_equal(np.load(out), np.load(plain))
    written = json.loads(profile.read_text())
    assert written["parameters"]["num_inference_steps"] == 4
    assert set(written["networks"]) == set(NETWORKS)
    runs = {"image_encoder": 1, "vae_encoder": 1, "denoiser": 4, "vae_decoder": 2}
    for name, network in written["networks"].items():
        assert all(layer["calls"] == runs[name] for layer in network["layers"])
        times = [layer["milliseconds"] for layer in network["layers"]]
        assert times == sorted(times, reverse=True)
        assert network["milliseconds"] == pytest.approx(sum(times), abs=0.01)
    if rig.cuda:
        assert written["networks"]["denoiser"]["layers"] == [
            {"name": "__myl_denoiser_1", "calls": 4, "milliseconds": 8.0, "median": 2.0},
            {"name": "__myl_denoiser_0", "calls": 4, "milliseconds": 2.0, "median": 0.5},
        ]
        assert "denoiser       __myl_denoiser_1" in result.stderr


def test_a_provider_of_onnxruntime_is_refused(
    standin: Rig, small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    times: LayerTimes = {}
    with (
        VideoPipeline.open(small_bundle, provider="cuda") as pipe,
        pytest.raises(ArgumentError, match="does not report the times of layers; TensorRT does"),
    ):
        pipe.device.measure_layers(times)


def test_engines_that_are_loaded_later_are_measured_and_graphs_are_not_captured(
    standin: Rig, small_bundle: Path, picture: PIL.Image.Image
) -> None:
    times: LayerTimes = {}
    with standin.open(Bundle.open(small_bundle)) as pipe:
        pipe.device.measure_layers(times)
        for _ in range(2):
            pipe(picture, num_inference_steps=4, num_frames=3, output_type="latent")
        pipe.release()
        pipe(picture, num_inference_steps=4, num_frames=3, output_type="latent")
        assert pipe.device.notes == ["CUDA graphs are not used: the times of layers are measured"]
    assert times["denoiser"] == {"__myl_denoiser_0": [0.5] * 12, "__myl_denoiser_1": [2.0] * 12}
