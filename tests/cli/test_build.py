"""``svd-trt build``: it builds once, resumes after a kill, leaves no partial bundle, and refuses with clear messages.

If the assertions of a test allow it, networks and engines come from the session's cache.
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import safetensors.torch
import torch

from svd_trt import Bundle, VideoPipeline
from svd_trt.engine.manifest import read_manifest
from svd_trt.engine.rebuild import rebuild_command
from svd_trt.engine.staging import Staging
from svd_trt.errors import BundleError, CheckpointError, ResourceError
from svd_trt.export.checkpoint_kinds import open_checkpoint
from svd_trt.export.preflight import Work, check_resources, disk_needed, memory_needed
from tests.cli.conftest import Run, assert_refused, invoke, start
from tests.export.test_single_file import write_full_size_header

SIZE = ("--height", "32", "--width", "32")
RTX = (*SIZE, "--frames", "2:3:6", "--decode-chunk", "1:3:6", "--backend", "tensorrt-rtx")


def copy(source: Path, to: Path) -> Path:
    shutil.copytree(source, to)
    return to


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def stages_of(result: Any) -> dict[tuple[str, str], str]:
    """By network and kind: built, reused, or from the cache."""
    assert result.returncode == 0, result.stderr
    return {
        (s["network"], s["kind"]): "cache" if s["from_cache"] else "reused" if s["reused"] else "built"
        for s in json.loads(result.stdout)["stages"]
    }


def test_second_build_does_nothing_and_says_so(small_checkpoint: Path, small_bundle: Path, tmp_path: Path) -> None:
    bundle = copy(small_bundle, tmp_path / "bundle")
    before = {p: p.stat().st_mtime_ns for p in bundle.rglob("*")}
    result = invoke("build", small_checkpoint, "-o", bundle, *RTX)
    assert result.returncode == 0, result.stderr
    assert "up to date" in result.stderr
    assert {p: p.stat().st_mtime_ns for p in bundle.rglob("*")} == before


def test_a_checkpoint_may_move_after_the_build(small_checkpoint: Path, small_bundle: Path, tmp_path: Path) -> None:
    """The manifest has the checkpoint's place, for the advice to build again. It is no part of what was built."""
    bundle = copy(small_bundle, tmp_path / "bundle")
    assert Bundle.open(bundle).manifest.source.path == str(small_checkpoint)
    moved = shutil.copytree(small_checkpoint, tmp_path / "elsewhere" / small_checkpoint.name)
    result = invoke("build", moved, "-o", bundle, *RTX)
    assert result.returncode == 0, result.stderr
    assert "up to date" in result.stderr
    (bundle / "tensorrt-rtx" / "vae_encoder.plan").write_bytes(b"x")
    with pytest.raises(BundleError, match=rf"run `svd-trt build {small_checkpoint} -o {bundle}` with the options"):
        Bundle.open(bundle)


@pytest.mark.slow
def test_other_ranges_keep_the_export(small_checkpoint: Path, small_bundle: Path, cache: Path, tmp_path: Path) -> None:
    """Frame ranges are in the profile, not in the graph: the denoiser's ONNX is reused, its plan is built again."""
    bundle = copy(small_bundle, tmp_path / "bundle")
    stages = stages_of(
        invoke(
            *("build", small_checkpoint, "-o", bundle, *RTX, "--frames", "2:4:6", "--decode-chunk", "1:2:3"),
            *("--cache", cache, "--json"),
        )
    )
    assert stages["denoiser", "onnx"] == "reused"
    assert stages["denoiser", "tensorrt-rtx"] in ("built", "cache"), "not that of the bundle; an earlier run's may do"
    assert stages["image_encoder", "tensorrt-rtx"] == "reused"
    assert Bundle.open(bundle).manifest.ranges.frames.max == 6
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("bundle", ".bundle.lock")] == []


@pytest.mark.slow
def test_weight_streaming_is_the_denoisers_plan_alone(
    small_checkpoint: Path, small_bundle: Path, cache: Path, tmp_path: Path
) -> None:
    bundle = copy(small_bundle, tmp_path / "bundle")
    assert not any(entry.plan and entry.plan.weight_streaming for entry in read_manifest(bundle).networks.values())
    options = (*RTX, "--weight-streaming", "--cache", cache)
    stages = stages_of(invoke("build", small_checkpoint, "-o", bundle, *options, "--json"))
    assert [stage for stage, how in stages.items() if how != "reused"] == [("denoiser", "tensorrt-rtx")]
    manifest = read_manifest(bundle)
    streamed = [name for name, entry in manifest.networks.items() if entry.plan and entry.plan.weight_streaming]
    assert streamed == ["denoiser"]
    plain, plan = (read_manifest(b).networks["denoiser"].plan for b in (small_bundle, bundle))
    assert plain is not None
    assert plan is not None
    # How much is streamed is decided when the engine is loaded, so the builder reports the same memory.
    figures = ("layers", "activation_bytes", "weight_bytes")
    assert [getattr(plan, name) for name in figures] == [getattr(plain, name) for name in figures]
    again = invoke("build", small_checkpoint, "-o", bundle, *RTX, "--weight-streaming", "--json")
    assert json.loads(again.stdout)["up_to_date"]


def test_weight_streaming_without_engines_is_refused(small_checkpoint: Path, tmp_path: Path) -> None:
    options = (*SIZE, "--backend", "onnxruntime", "--weight-streaming")
    assert_refused(
        invoke("build", small_checkpoint, "-o", tmp_path / "b", *options), "--weight-streaming", "leave it out"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_same_networks_are_taken_from_the_cache(
    small_checkpoint: Path, small_bundle: Path, cache: Path, tmp_path: Path
) -> None:
    """A second bundle at another place: the report says so, and its files are not links into the cache."""
    result = invoke("build", small_checkpoint, "-o", tmp_path / "bundle", *RTX, "--cache", cache, "--json")
    assert set(stages_of(result).values()) == {"cache"}
    assert result.stderr.count("from the cache") == 8
    for file in Bundle.open(tmp_path / "bundle").manifest.files:
        assert (tmp_path / "bundle" / file.path).stat().st_nlink == 1
    assert read_manifest(tmp_path / "bundle") == read_manifest(small_bundle)


@pytest.mark.slow
def test_another_unet_and_a_lora(small_checkpoint: Path, small_bundle: Path, cache: Path, tmp_path: Path) -> None:
    """Only the denoiser is another one, and it is what diffusers makes of both; tables and messages name them."""
    weights = safetensors.torch.load_file(small_checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
    unet, lora = tmp_path / "few-step.safetensors", tmp_path / "motion.safetensors"
    safetensors.torch.save_file({name: weight * 0.9 for name, weight in weights.items()}, unet)
    module, draw = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", torch.Generator().manual_seed(0)
    pair = {"lora_A": torch.randn((2, 32), generator=draw), "lora_B": torch.randn((32, 2), generator=draw)}
    safetensors.torch.save_file({f"unet.{module}.{name}.weight": tensor for name, tensor in pair.items()}, lora)
    bundle = tmp_path / "bundle"
    options = (*RTX[:-1], "onnxruntime", "--cache", cache, "--unet", unet, "--lora", f"{lora}:0.5")
    stages = stages_of(invoke("build", small_checkpoint, "-o", bundle, *options, "--json"))
    assert {name for (name, _), how in stages.items() if how != "cache"} <= {"denoiser"}
    source, plain = read_manifest(bundle).source, read_manifest(small_bundle).source
    assert {name for name in plain.digests if source.digests[name] != plain.digests[name]} == {"unet"}
    again = invoke("build", small_checkpoint, "-o", bundle, *options, "--json")
    assert json.loads(again.stdout)["up_to_date"]
    shown = " ".join(invoke("inspect", bundle).stdout.split())
    assert f"unet {unet}" in shown
    assert f"loras {lora} at scale 0.5" in shown
    command = rebuild_command(read_manifest(bundle), bundle)
    assert f"--unet {unet} --lora {lora}:0.5" in command
    found = invoke("verify", bundle, "--model", small_checkpoint, "--frames", "3", "--json")
    assert found.returncode == 0, found.stderr
    assert "other weights" not in found.stderr
    without = invoke("verify", bundle, "--model", small_checkpoint, "--unet", small_checkpoint, "--only", "denoiser")
    assert without.returncode == 1, "the UNet of the checkpoint is another one"
    assert "other weights than the bundle was built from: unet" in " ".join(without.stderr.split())


def test_a_cache_that_cannot_be_written_is_refused(small_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = invoke("build", small_checkpoint, "-o", tmp_path / "b", *RTX, "--cache", tmp_path / "file", "-q")
    assert_refused(result, "cannot write to the cache", "--cache")
    assert not list(tmp_path.glob("*b*/**"))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("scheduler/scheduler_config.json", {"sigma_max": 300.0}),
        ("feature_extractor/preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3]}),
    ],
)
def test_values_outside_the_networks_are_updated(
    file: str, changes: dict[str, Any], small_checkpoint: Path, small_bundle: Path, tmp_path: Path
) -> None:
    """Only the manifest has sigmas and image statistics: it is written again and the networks are reused."""
    bundle = copy(small_bundle, tmp_path / "bundle")
    checkpoint = copy(small_checkpoint, tmp_path / "small_checkpoint")
    edit(checkpoint / file, **changes)
    result = invoke("build", checkpoint, "-o", bundle, *RTX, "--json")
    assert not json.loads(result.stdout)["up_to_date"]
    assert set(stages_of(result).values()) == {"reused"}
    manifest = read_manifest(bundle)
    assert changes.get("sigma_max", 700.0) == manifest.sampler.sigma_max
    assert ("image_mean" in changes) == (manifest.model.image_mean == (0.1, 0.2, 0.3))


def test_other_files_are_never_deleted(small_checkpoint: Path, small_bundle: Path, tmp_path: Path) -> None:
    web = tmp_path / "web"
    web.mkdir()
    (web / "manifest.json").write_text('{"name": "my web app"}')
    assert_refused(invoke("build", small_checkpoint, "-o", web, *RTX), "not a bundle's")
    (web / "index.html").write_text("precious")
    assert_refused(invoke("build", small_checkpoint, "-o", web, *RTX), "index.html")
    bundle = copy(small_bundle, tmp_path / "bundle")
    (bundle / "video.mp4").write_text("precious")
    result = invoke("build", small_checkpoint, "-o", bundle, *RTX, "--frames", "2:3:4")
    assert_refused(result, "video.mp4", "not part of a bundle")
    assert (bundle / "video.mp4").exists()
    assert (web / "index.html").exists()


def test_a_linked_bundle_is_built_through_the_link(small_checkpoint: Path, small_bundle: Path, tmp_path: Path) -> None:
    real = copy(small_bundle, tmp_path / "real")
    link = tmp_path / "link"
    link.symlink_to(real)
    checkpoint = copy(small_checkpoint, tmp_path / "small_checkpoint")
    for sigma in (300.0, 400.0):
        edit(checkpoint / "scheduler" / "scheduler_config.json", sigma_max=sigma)
        assert set(stages_of(invoke("build", checkpoint, "-o", link, *RTX, "--json")).values()) == {"reused"}
    assert link.is_symlink()
    assert read_manifest(real).sampler.sigma_max == 400
    assert sorted(p.name for p in tmp_path.iterdir()) == [".real.lock", "link", "real", "small_checkpoint"]


@pytest.mark.slow
def test_a_killed_build_leaves_nothing_and_resumes(
    small_checkpoint: Path, small_bundle: Path, cache: Path, tmp_path: Path
) -> None:
    """Finished networks are reused from the interrupted build, and only the others are taken from the cache."""
    bundle = tmp_path / "bundle"
    process = start("build", small_checkpoint, "-o", bundle, *RTX)
    record = tmp_path / ".bundle.building" / "records" / "vae_encoder.onnx.json"
    deadline = time.monotonic() + 200
    while not record.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not bundle.exists()
    with pytest.raises(BundleError, match="no bundle"):
        Bundle.open(bundle)
    with pytest.raises(BundleError):
        Bundle.open(tmp_path / ".bundle.building")
    stages = stages_of(invoke("build", small_checkpoint, "-o", bundle, *RTX, "--cache", cache, "--json"))
    assert stages["image_encoder", "onnx"] == "reused"
    assert stages["vae_encoder", "onnx"] == "reused"
    assert stages["vae_decoder", "onnx"] == "cache"
    Bundle.open(bundle)
    assert not (tmp_path / ".bundle.building").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupts_end_with_their_code(
    number: signal.Signals, code: int, small_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    process = start("build", small_checkpoint, "-o", bundle, *RTX)
    while not (tmp_path / ".bundle.building").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    time.sleep(1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert not bundle.exists()


def exporters(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The exporting processes of a running build."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        found = [p for p in psutil.Process(process.pid).children() if "svd_trt.export.export_process" in p.cmdline()]
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(process.communicate())


def test_a_killed_exporter_is_an_error(small_checkpoint: Path, tmp_path: Path) -> None:
    """SIGKILL, as the kernel sends it when memory runs out: one line on standard error, and no bundle."""
    process = start("build", small_checkpoint, "-o", tmp_path / "bundle", *RTX, "-q")
    for exporter in exporters(process):
        exporter.kill()
    out, err = process.communicate(timeout=60)
    result = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    assert_refused(result, "exporting image_encoder failed", "memory ran out")
    assert not (tmp_path / "bundle").exists()


def test_the_exporter_ends_with_the_build(small_checkpoint: Path, tmp_path: Path) -> None:
    """Even if the build is killed."""
    process = start("build", small_checkpoint, "-o", tmp_path / "bundle", *RTX, "-q")
    found = exporters(process)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(found, timeout=30)
    assert not alive


def test_two_builds_of_one_bundle(small_checkpoint: Path, small_bundle: Path, tmp_path: Path) -> None:
    """The second waits for the first and then finds nothing to do."""
    bundle = tmp_path / "bundle"
    with Staging(bundle):
        process = start("build", small_checkpoint, "-o", bundle, *RTX)
        assert process.stderr is not None
        assert any(f"another build of {bundle} is running; waiting for it" in line for line in process.stderr)
        copy(small_bundle, bundle)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "up to date" in err
    Bundle.open(bundle)


def test_building_again_repairs_a_damaged_bundle(
    small_checkpoint: Path, small_bundle: Path, cache: Path, tmp_path: Path
) -> None:
    bundle = copy(small_bundle, tmp_path / "bundle")
    (bundle / "tensorrt-rtx" / "vae_encoder.plan").write_bytes(b"x")
    stages = stages_of(invoke("build", small_checkpoint, "-o", bundle, *RTX, "--cache", cache, "--json"))
    assert [stage for stage, how in stages.items() if how != "reused"] == [("vae_encoder", "tensorrt-rtx")]
    Bundle.open(bundle)


def test_death_between_the_last_stage_and_the_rename(
    small_checkpoint: Path, small_bundle: Path, tmp_path: Path
) -> None:
    """The bundle is complete but not yet at its place: nothing is made again."""
    copy(small_bundle, tmp_path / ".bundle.building")
    result = invoke("build", small_checkpoint, "-o", tmp_path / "bundle", *RTX, "--json")
    assert set(stages_of(result).values()) == {"reused"}
    Bundle.open(tmp_path / "bundle")


def test_death_between_the_two_renames(small_checkpoint: Path, small_bundle: Path, tmp_path: Path) -> None:
    """The old bundle was moved aside and the new one is not there: the next build puts it back."""
    copy(small_bundle, tmp_path / ".bundle.replaced")
    result = invoke("build", small_checkpoint, "-o", tmp_path / "bundle", *RTX)
    assert "up to date" in result.stderr
    Bundle.open(tmp_path / "bundle")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".bundle.lock", "bundle"]


def test_a_file_system_that_cannot_exchange_folders(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copy(small_bundle, tmp_path / "bundle")
    monkeypatch.setattr("svd_trt.engine.staging.swap", lambda *_: False)
    with Staging(bundle) as staging:
        for name in ("golden", "onnx", "tensorrt-rtx"):
            copy(small_bundle / name, staging.path / name)
        manifest = read_manifest(bundle)
        sampler = msgspec.structs.replace(manifest.sampler, sigma_max=300.0)
        staging.publish(msgspec.structs.replace(manifest, sampler=sampler))
    assert Bundle.open(bundle).manifest.sampler.sigma_max == 300
    assert sorted(p.name for p in tmp_path.iterdir()) == [".bundle.lock", "bundle"]


def test_fp16_variant_is_found_and_named(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    made = invoke("random-checkpoint", checkpoint, "--variant", "fp16")
    assert made.returncode == 0, made.stderr
    assert (checkpoint / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    from svd_trt.export.checkpoint_kinds import open_checkpoint

    source = open_checkpoint(str(checkpoint)).source
    assert source.variant is None  # as it was not asked for
    assert source.files["unet"] == ("unet/diffusion_pytorch_model.fp16.safetensors",)
    assert_refused(invoke("build", checkpoint, "-o", tmp_path / "b", "--variant", "bf16"), "no bf16", "of fp16")


def test_hub_cache_is_used_offline(
    run: Run, small_checkpoint: Path, small_bundle: Path, cache: Path, tmp_path: Path
) -> None:
    """A hub id is found in HF_HOME without a connection. This test runs the command as a process."""
    repo = tmp_path / "home" / "hub" / "models--someone--svd"
    commit = "0123456789abcdef0123456789abcdef01234567"
    copy(small_checkpoint, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    bundle = tmp_path / "bundle"
    environment = {"HF_HOME": str(tmp_path / "home"), "SVD_TRT_CACHE": str(cache)}
    result = run("build", "someone/svd", "-o", bundle, *SIZE, "--backend", "onnxruntime", "--json", env=environment)
    assert set(stages_of(result).values()) == {"cache"}
    source = read_manifest(bundle).source
    assert (source.model, source.commit) == ("someone/svd", commit)
    with VideoPipeline.open(bundle) as pipe:
        assert pipe.bundle.manifest.tensorrt is None
    missing = run("build", "someone/else", "-o", tmp_path / "x", env=environment)
    assert_refused(missing, "someone/else", "offline")


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, ["StableDiffusionPipeline"]),
        ("model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}, ["DDIMScheduler", "EulerDiscrete"]),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, ["prediction_type", "epsilon"]),
        ("scheduler/scheduler_config.json", {"use_exponential_sigmas": True}, ["use_karras_sigmas", "keep one"]),
        ("scheduler/scheduler_config.json", {"sigma_max": 0.001}, ["sigma_max", "set 0.002 and 700.0"]),
        ("unet/config.json", {"in_channels": 9}, ["in_channels", "9"]),
        ("unet/config.json", {"in_channels": False}, ["in_channels is false"]),
        ("unet/config.json", {"num_frames": None}, ["num_frames"]),
    ],
)
def test_other_checkpoints_are_refused(
    file: str, changes: dict[str, Any], words: list[str], small_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = copy(small_checkpoint, tmp_path / "checkpoint")
    edit(checkpoint / file, **changes)
    assert_refused(invoke("build", checkpoint, "-o", tmp_path / "bundle"), *words)
    assert not list(tmp_path.glob(".bundle*"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda c: (c / "unet" / "config.json").unlink(), ["unet/config.json"]),
        (lambda c: (c / "vae" / "config.json").write_text("{"), ["vae/config.json"]),
        (lambda c: (c / "unet" / "diffusion_pytorch_model.safetensors").unlink(), ["unet", "weights"]),
        (lambda c: (c / "model_index.json").unlink(), ["model_index.json", "diffusers format"]),
    ],
)
def test_incomplete_checkpoints_are_refused(
    damage: Any, words: list[str], small_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = copy(small_checkpoint, tmp_path / "checkpoint")
    damage(checkpoint)
    assert_refused(invoke("build", checkpoint, "-o", tmp_path / "bundle"), *words)


def test_truncated_weights_are_refused(small_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = copy(small_checkpoint, tmp_path / "checkpoint")
    weights = checkpoint / "image_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    result = invoke("build", checkpoint, "-o", tmp_path / "bundle", *SIZE, "-q")
    assert_refused(result, "image_encoder", "is cut off", "download or save it again")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--height", "100"], 1, ["multiples of 8"]),
        (["--height", "0"], 2, ["1 <= MIN"]),
        (["--height", "100000"], 1, ["4096"]),
        (["--frames", "9:5:2"], 2, ["MIN <= OPT <= MAX"]),
        (["--frames", "1:2:3"], 1, ["at least 2 frames"]),
        (["--frames", "many"], 2, ["MIN:OPT:MAX"]),
        (["--batch", "-1"], 2, ["1 <= MIN"]),
        (["--precision", "int8"], 2, ["fp16"]),
        (["--backend", "tensorrt"], 1, ["tensorrt"]),
    ],
)
def test_bad_options(options: list[str], code: int, words: list[str], small_checkpoint: Path, tmp_path: Path) -> None:
    assert_refused(invoke("build", small_checkpoint, "-o", tmp_path / "bundle", *options), *words, code=code)
    assert not list(tmp_path.glob("*bundle*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ff-chunks", "2", "--no-rewrites"], ["--ff-chunks", "--no-rewrites"]),
        (["--ff-chunks", "5", "--height", "32:64:64"], ["up to 4", "range"]),
        (["--config", "."], ["--config", "single file"]),
    ],
)
def test_options_that_contradict(options: list[str], words: list[str], small_checkpoint: Path, tmp_path: Path) -> None:
    assert_refused(invoke("build", small_checkpoint, "-o", tmp_path / "bundle", *options), *words)
    assert not list(tmp_path.glob("*bundle*"))


def test_random_presets(tmp_path: Path) -> None:
    assert_refused(invoke("build", "random:huge", "-o", tmp_path / "b"), "huge", "tiny, mid, svd, svd-xt")
    assert_refused(invoke("build", "random:svd@x", "-o", tmp_path / "b"), "seed", "random:svd@7")


def test_weights_damaged_under_a_whole_header(small_checkpoint: Path, tmp_path: Path) -> None:
    """The error is one line although the exporting process finds it, before the first network is exported."""
    checkpoint = copy(small_checkpoint, tmp_path / "checkpoint")
    edit(checkpoint / "unet" / "config.json", layers_per_block=2)
    result = invoke("build", checkpoint, "-o", tmp_path / "bundle", *SIZE, "-q")
    assert_refused(result, "unet", "lacks", "weights that SVD has")
    assert not (tmp_path / "bundle").exists()
    assert not list(tmp_path.rglob("*.onnx"))


def test_a_configuration_that_diffusers_does_not_know(small_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = copy(small_checkpoint, tmp_path / "checkpoint")
    edit(checkpoint / "unet" / "config.json", down_block_types=["Foo", "Foo"])
    with pytest.raises(CheckpointError, match=r"configuration of the unet.*Foo"):
        open_checkpoint(str(checkpoint)).check("unet")


@pytest.mark.parametrize(
    ("component", "changes", "words"),
    [
        ("vae", {"block_out_channels": []}, "a configuration is not SVD's: list index out of range"),
        ("unet", {"layers_per_block": 65535}, "layers_per_block of the unet is 65,535, and SVD has a few"),
        ("unet", {"layers_per_block": [2, 65535]}, "layers_per_block of the unet is 65,535"),
        ("image_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers of the image_encoder is 1,000,000,000"),
    ],
)
def test_configurations_with_no_layers_or_with_thousands(
    component: str, changes: dict[str, Any], words: str, small_checkpoint: Path, tmp_path: Path
) -> None:
    """The libraries would make every one of them, and hang."""
    checkpoint = copy(small_checkpoint, tmp_path / "checkpoint")
    edit(checkpoint / component / "config.json", **changes)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(checkpoint))


def test_too_little_memory_is_seen_at_once(tmp_path: Path) -> None:
    """Under a limit as batch systems set it; the message has both figures."""
    started = time.monotonic()
    limit = 6_000_000_000
    process = start(
        "build",
        "random:svd-xt",
        "-o",
        tmp_path / "bundle",
        *RTX,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    out, err = process.communicate(timeout=100)
    result = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    assert_refused(result, "needs about 7.", "GB are available", "--skip-checks")
    assert time.monotonic() - started < 60
    assert not (tmp_path / "bundle").exists()


def test_too_little_disk_is_seen_at_once(tmp_path: Path) -> None:
    """A petabyte of weights on this disk; finished networks need nothing."""
    many = {"unet": 10**15, "vae": 10**9, "image_encoder": 10**9}
    for work in (Work(["denoiser"], [], many, "fp32"), Work([], ["denoiser"], many, "fp16")):
        with pytest.raises(ResourceError, match=r"writes about \d{7}(\.\d+)? GB and .* GB free"):
            check_resources(tmp_path, work)
    check_resources(tmp_path, Work([], [], many, "fp16"))


def test_the_rewritten_network_and_missing_engines_are_what_counts() -> None:
    sizes = {"unet": 10**9, "vae": 10**8, "image_encoder": 10**8}
    whole = Work(["denoiser"], ["denoiser"], sizes, "fp16")
    assert memory_needed(whole) > memory_needed(Work(["denoiser"], [], sizes, "fp16"))
    assert memory_needed(whole) < memory_needed(replace(whole, rewrites=False))
    assert memory_needed(whole) < memory_needed(replace(whole, precision="fp32"))
    assert disk_needed(whole) == pytest.approx(2 * disk_needed(replace(whole, engines=[])))


@pytest.mark.slow
def test_random_checkpoint_sees_too_little_memory(tmp_path: Path) -> None:
    limit = 4_000_000_000
    process = start(
        "random-checkpoint",
        tmp_path / "svd",
        "--preset",
        "svd",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "GB of memory" in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "svd").exists()


def test_options_of_other_kinds_of_checkpoint_are_refused(tmp_path: Path) -> None:
    for options in (["--config", "x"], ["--variant", "fp16"], ["--revision", "main"]):
        assert_refused(invoke("build", "random:tiny", "-o", tmp_path / "b", *options), options[0], "works only with")
    assert_refused(invoke("build", tmp_path / "no.safetensors", "-o", tmp_path / "b"), "there is no file")
    assert_refused(invoke("build", "random:tiny@", "-o", tmp_path / "b"), "seed")


def test_a_single_file_that_does_not_tell_its_architecture(tmp_path: Path) -> None:
    """The refusal names the options, and the words of the file's name count only as wholes."""
    write_full_size_header(tmp_path / "nextgen.safetensors")
    result = invoke("build", tmp_path / "nextgen.safetensors", "-o", tmp_path / "b", *SIZE)
    assert_refused(result, "--config svd or --config svd-xt", "its name")
    assert "svd|svd-xt|FOLDER" in invoke("build", "--help").stdout


def test_bad_places(small_checkpoint: Path, tmp_path: Path) -> None:
    assert_refused(invoke("build", tmp_path / "none", "-o", tmp_path / "b"), "no checkpoint")
    assert_refused(invoke("build", "no such id", "-o", tmp_path / "b"), "owner/name")
    (tmp_path / "svd.safetensors").write_bytes(b"x")
    assert_refused(invoke("build", tmp_path / "svd.safetensors", "-o", tmp_path / "b"), "not a safetensors file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert_refused(invoke("build", small_checkpoint, "-o", tmp_path / "mine"), "thesis.txt", "not part of a bundle")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    assert_refused(invoke("build", small_checkpoint, "-o", tmp_path / "svd.safetensors" / "b"), "cannot write")
    assert_refused(invoke("build", small_checkpoint, "-o", "/proc/b"), "cannot write")
    assert_refused(invoke("build", small_checkpoint, "-o", "/"), "name a folder")
