"""``svd-trt inspect``: what the manifest knows, for people and for programs, without loading anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from svd_trt import Bundle
from svd_trt.engine.memory import Mode, activation_bytes, modes, vram_bytes
from svd_trt.engine.spec import NETWORKS
from tests.cli.conftest import Run

pytestmark = pytest.mark.xdist_group("small")


def test_tables(run: Run, small_bundle: Path) -> None:
    result = run("inspect", small_bundle)
    assert result.returncode == 0, result.stderr
    words = ("fp16", "fp32", "previous_denoised", "uint8", "float32", "FLOP", "range", "one engine at a time")
    for word in (*NETWORKS, *words, "[branches, 1, 4, 16, 16]"):
        assert word in result.stdout, result.stdout
    tables = [line for line in result.stdout.splitlines()[1:] if line]
    assert max(map(len, tables)) <= 80, "for a terminal of any width"
    assert "…" not in result.stdout, "cut off"


def test_json_holds_what_the_manifest_holds(run: Run, small_bundle: Path) -> None:
    found = json.loads(run("inspect", small_bundle, "--json").stdout)
    manifest = Bundle.open(small_bundle).manifest
    assert list(found["networks"]) == list(NETWORKS)
    for name, network in found["networks"].items():
        entry = manifest.networks[name]
        assert entry.plan is not None
        assert network["activation_bytes"] == entry.plan.activation_bytes > 0
        assert network["weight_bytes"] == entry.plan.weight_bytes > 0
        assert network["plan_bytes"] == (small_bundle / entry.plan.file.path).stat().st_size
        assert network["nodes"] == entry.onnx.nodes > 10
        assert network["parameters"] == entry.onnx.parameters > 1000
        assert network["flops"] == entry.flops > 1e5
        assert [t["name"] for t in network["tensors"]] == [t.name for t in entry.spec.tensors]
    assert found["networks"]["vae_encoder"]["precision"] == "fp32"
    assert found["networks"]["denoiser"]["precision"] == "fp16"
    assert all(mode["bytes"] > 0 for mode in found["vram"])


def test_engines_are_not_read(run: Run, small_bundle: Path, tmp_path: Path) -> None:
    """Only sizes are checked: a plan of the right size and other content is not opened."""
    bundle = tmp_path / "bundle"
    shutil.copytree(small_bundle, bundle)
    plan = bundle / "tensorrt-rtx" / "denoiser.plan"
    plan.write_bytes(b"x" * plan.stat().st_size)
    assert run("inspect", bundle).returncode == 0
    plan.unlink()
    result = run("inspect", bundle)
    assert result.returncode == 1
    assert "denoiser.plan is missing; run `svd-trt build` again" in result.stderr


def test_refusals(run: Run, small_checkpoint: Path, tmp_path: Path) -> None:
    for place, words in (
        (tmp_path / "none", "there is no bundle"),
        (small_checkpoint, "is a checkpoint, not a bundle"),
    ):
        result = run("inspect", place)
        assert result.returncode == 1
        assert words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_memory_follows_frames_and_chunks(small_bundle: Path) -> None:
    manifest = Bundle.open(small_bundle).manifest
    denoiser = manifest.networks["denoiser"]
    assert denoiser.plan is not None
    whole = activation_bytes(denoiser, {})
    assert whole == denoiser.plan.activation_bytes
    assert activation_bytes(denoiser, {"branches": 1}) == pytest.approx(whole / 2, abs=1)
    assert activation_bytes(denoiser, {"frames": 2}) == pytest.approx(whole * 2 / 3, abs=1)
    needs = {mode: vram_bytes(manifest, mode) or 0 for mode in modes(manifest)}
    for mode, need in needs.items():
        assert need > 0
        assert need <= needs.get(Mode(mode.frames, mode.decode_chunk, resident=True), need)
        assert need <= needs.get(Mode(mode.frames, mode.frames, mode.resident), need)
