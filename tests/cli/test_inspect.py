"""``svd-trt inspect``: tables, JSON and plans from the manifest alone."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import click
import msgspec
import pytest

from svd_trt import Bundle
from svd_trt.cli.sizes import ByteSize
from svd_trt.engine.manifest import Manifest, write_manifest
from svd_trt.engine.memory import MemoryRequest, activation_bytes, compare_plans, plan_memory, smallest_budget
from svd_trt.engine.spec import NETWORKS
from tests.cli.conftest import Run, invoke


def test_tables(run: Run, small_bundle: Path) -> None:
    result = run("inspect", small_bundle)
    assert result.returncode == 0, result.stderr
    words = ("fp16", "fp32", "previous_denoised", "uint8", "float32", "FLOP", "range", "one engine at a time")
    for word in (*NETWORKS, *words, "[branches, 1, 4, 16, 16]"):
        assert word in result.stdout, result.stdout
    tables = [line for line in result.stdout.splitlines()[1:] if line]
    assert max(map(len, tables)) <= 80, "for a terminal of any width"
    assert "…" not in result.stdout, "cut off"


def test_json_holds_what_the_manifest_holds(small_bundle: Path) -> None:
    found = json.loads(invoke("inspect", small_bundle, "--json").stdout)
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


def test_engines_are_not_read(small_bundle: Path, tmp_path: Path) -> None:
    """Only sizes are checked: a plan of the right size and other content is not opened."""
    bundle = tmp_path / "bundle"
    shutil.copytree(small_bundle, bundle)
    plan = bundle / "tensorrt-rtx" / "denoiser.plan"
    plan.write_bytes(b"x" * plan.stat().st_size)
    assert invoke("inspect", bundle).returncode == 0
    plan.unlink()
    result = invoke("inspect", bundle)
    assert result.returncode == 1
    assert "denoiser.plan is missing; to repair it, run `svd-trt build " in result.stderr


def test_refusals(small_checkpoint: Path, tmp_path: Path) -> None:
    for place, words in (
        (tmp_path / "none", "there is no bundle"),
        (small_checkpoint, "is a checkpoint, not a bundle"),
    ):
        result = invoke("inspect", place)
        assert result.returncode == 1
        assert words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_memory_follows_frames_and_chunks(small_bundle: Path) -> None:
    manifest = Bundle.open(small_bundle).manifest
    denoiser = manifest.networks["denoiser"]
    assert denoiser.plan is not None
    exact, whole = (profile.activation_bytes for profile in denoiser.plan.profiles)
    assert whole is not None
    assert activation_bytes(denoiser, {}) == whole == denoiser.plan.activation_bytes
    assert activation_bytes(denoiser, {"frames": 3}) == exact
    assert activation_bytes(denoiser, {"branches": 1}) == pytest.approx(whole / 2, abs=1)
    assert activation_bytes(denoiser, {"frames": 2}) == pytest.approx(whole * 2 / 6, abs=1)
    needs = {
        (request.frames, plan.decode_chunk_size, plan.resident): plan.total_bytes or 0
        for request, plan in compare_plans(manifest)
    }
    for (frames, chunk, resident), need in needs.items():
        assert need > 0
        assert need <= needs[frames, chunk, True]
        assert need <= needs.get((frames, frames, resident), need)


def whole_video(manifest: Manifest) -> MemoryRequest:
    return MemoryRequest(manifest.model.num_frames, manifest.ranges.height.max, manifest.ranges.width.max)


def test_plan_within_a_budget(small_bundle: Path) -> None:
    result = invoke("inspect", small_bundle, "--vram-budget", "1.5 GB")
    assert result.returncode == 0, result.stderr
    words = ("3 frames of 32x32", "all loaded", "together", "all frames together", "1.5 GB", "left over", "context")
    for word in (*words, "weights", "activations", "buffers", "total", "budget"):
        assert word in result.stdout, result.stdout
    assert "previous_denoised" not in result.stdout, "the plan alone"
    assert max(map(len, result.stdout.splitlines()[1:])) <= 80
    fewer = invoke("inspect", small_bundle, "--vram-budget", "1.5 GB", "--num-frames", "2")
    assert "2 frames of 32x32" in fewer.stdout


def test_the_smallest_budget_works(small_bundle: Path) -> None:
    manifest = Bundle.open(small_bundle).manifest
    request = replace(whole_video(manifest), frames=6)
    smallest = smallest_budget(manifest, request)
    assert smallest is not None
    result = invoke("inspect", small_bundle, "--vram-budget", f"{smallest} B", "--num-frames", "6")
    assert result.returncode == 0, result.stderr
    for words in ("loaded one at a time", "one at a time, two runs a step", "left over +0 bytes"):
        assert re.search(words, result.stdout), result.stdout
    result = invoke("inspect", small_bundle, "--vram-budget", f"{smallest - 1}B", "--num-frames", "6")
    assert result.returncode == 1
    assert "is not enough for 6 frames of 32x32: the smallest budget that works is" in result.stderr
    assert "--split-guidance --ff-chunks 4" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not result.stdout


def test_plan_as_json(small_bundle: Path) -> None:
    manifest = Bundle.open(small_bundle).manifest
    found = json.loads(invoke("inspect", small_bundle, "--json", "--vram-budget", "1GiB").stdout)
    plan = plan_memory(manifest, whole_video(manifest), 2**30)
    assert found["plan"] == {
        "resident": True,
        "split_guidance": False,
        "decode_chunk": 3,
        "streamed_bytes": 0,
        "activation_bytes": plan.activation_bytes,
        "total_bytes": plan.total_bytes,
        "shallow_steps": False,
        "budget": 2**30,
    }
    assert list(found["networks"]) == list(NETWORKS)
    assert "plan" not in json.loads(invoke("inspect", small_bundle, "--json").stdout)


def test_plan_needs_engines(small_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(small_bundle, bundle)
    manifest = Bundle.open(bundle).manifest
    networks = {name: msgspec.structs.replace(entry, plan=None) for name, entry in manifest.networks.items()}
    write_manifest(msgspec.structs.replace(manifest, tensorrt=None, networks=networks), bundle)
    result = invoke("inspect", bundle, "--vram-budget", "8GB")
    assert result.returncode == 1
    assert "has no engines" in result.stderr
    assert "--backend tensorrt-rtx" in result.stderr
    assert invoke("inspect", bundle).returncode == 0


def test_refused_budgets(small_bundle: Path) -> None:
    for code, words, options in (
        (2, "8 bytes? write 8GB", ("--vram-budget", "8")),
        (2, "is not more than 0 bytes", ("--vram-budget", "-8GB")),
        (2, "--num-frames is for --vram-budget", ("--num-frames", "2")),
        (2, "--width is for --vram-budget", ("--width", "32")),
        (1, "height 40 is outside what this bundle was built for", ("--vram-budget", "8GB", "--height", "40")),
        (1, "frames 9 is outside what this bundle was built for", ("--vram-budget", "8GB", "--num-frames", "9")),
    ):
        result = invoke("inspect", small_bundle, *options)
        assert result.returncode == code, result.stderr
        assert words in result.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("7.5 GB", 7_500_000_000),
        ("8G", 8 * 10**9),
        ("8gb", 8 * 10**9),
        (" 8GiB ", 8 * 2**30),
        ("8Gi", 8 * 2**30),
        ("800MB", 800_000_000),
        ("1.5kB", 1500),
        ("2TB", 2 * 10**12),
        ("8000000000", 8 * 10**9),
        ("+8GB", 8 * 10**9),
        ("12 B", 12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert ByteSize().convert(text, None, None) == size
    assert ByteSize().convert(size, None, None) == size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("8", "8 bytes[?] write 8GB"),
        ("7.5", "write 7.5GB"),
        ("8000", "write 8000MB"),
        ("0", "more than 0"),
        ("0GB", "more than 0"),
        ("0.0000000001GB", "more than 0"),
        ("-8GB", "more than 0"),
        ("-1", "more than 0"),
        ("eight", "is not a size such as 8GB"),
        ("8 GBit", "is not a size"),
        ("8,5GB", "is not a size"),
        ("1e9", "is not a size"),
        ("inf", "is not a size"),
        ("", "is not a size"),
    ],
)
def test_refused_sizes(text: str, words: str) -> None:
    with pytest.raises(click.BadParameter, match=words):
        ByteSize().convert(text, None, None)


def test_a_bundle_with_a_shallow_denoiser(run: Run, shallow_bundle: Bundle, small_bundle: Path) -> None:
    path = shallow_bundle.path
    tables = invoke("inspect", path).stdout
    assert "shallow_denoiser" in tables
    assert "-> deep_features" in tables, "of the denoiser"
    assert "   deep_features" in tables, "of the shallow one"
    assert "float16" in tables
    assert "(svd-trt infer --deep-every 3)" in tables
    assert max(len(line) for line in tables.splitlines()[1:]) <= 80
    found = json.loads(invoke("inspect", path, "--json").stdout)
    assert list(found["networks"]) == ["image_encoder", "vae_encoder", "denoiser", "shallow_denoiser", "vae_decoder"]
    assert found["graph"]["deep_channels"] == 32
    assert invoke("inspect", path, "--trtexec", "shallow_denoiser").stdout.count("--loadEngine=") == 2
    kernels = invoke("inspect", path, "--kernels", "shallow_denoiser", "--frames", "6")
    assert kernels.returncode == 0, kernels.stderr
    assert "shallow_denoiser" in kernels.stdout
    assert "shallow_denoiser" in invoke("inspect", path, "--kernels").stdout
    plans = {
        n: json.loads(invoke("inspect", path, "--vram-budget", "1GB", "--deep-every", n, "--json").stdout)["plan"]
        for n in ("1", "3")
    }
    assert (plans["1"]["shallow_steps"], plans["3"]["shallow_steps"]) == (False, True)
    weights = found["networks"]["shallow_denoiser"]["weight_bytes"]
    assert plans["3"]["total_bytes"] - plans["1"]["total_bytes"] == weights
    for option, problem in {
        (
            "--vram-budget",
            "1GB",
            "--deep-every",
            "3",
        ): "deep_every 3 needs a shallow denoiser, and this bundle has none; build one with --shallow-steps",
        ("--trtexec", "shallow_denoiser"): "has no shallow_denoiser; build one with --shallow-steps",
        ("--kernels", "shallow_denoiser"): "there is no network 'shallow_denoiser'; choose one of: image_encoder, ",
        ("--deep-every", "3"): "--deep-every is for --vram-budget; give both",
    }.items():
        refused = invoke("inspect", small_bundle, *option)
        assert refused.returncode != 0
        assert problem in refused.stderr
