"""``svd-trt inspect --kernels``: tables, JSON, comparison, plot and refusals."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import PIL.Image
import pytest
from rich.console import Console

from svd_trt import Bundle
from svd_trt.cli.kernels_report import ShownKernels, print_comparison, print_kernels
from svd_trt.engine.gpu_table import GPUS
from svd_trt.engine.kernels import (
    Kernel,
    KernelList,
    KernelTensor,
    ProfileKernels,
    kernel_costs,
    read_kernels,
    write_kernels,
)
from svd_trt.engine.manifest import FileEntry, Manifest, read_manifest, write_manifest
from svd_trt.engine.spec import NETWORKS, Range, network_specs
from tests.cli.conftest import Run, assert_refused, invoke


def kernels_of(bundle: Path, network: Any) -> Any:
    kernels = Bundle.open(bundle, verify=False).kernels(network)
    assert kernels is not None
    return kernels


def profiles(*arguments: str | Path) -> list[dict[str, Any]]:
    result = invoke("inspect", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)["networks"]["denoiser"]["profiles"]
    return found


def copy(bundle: Path, to: Path, **plan: Any) -> Path:
    """A copy of ``bundle`` whose plans have other fields in the manifest."""
    shutil.copytree(bundle, to)
    manifest = Bundle.open(bundle).manifest
    change = msgspec.structs.replace
    networks = {name: change(entry, plan=change(entry.plan, **plan)) for name, entry in manifest.networks.items()}
    write_manifest(change(manifest, networks=networks), to)
    return to


def keep_profile(bundle: Path, index: int) -> None:
    """Reduce the denoiser's list of kernels to one of its profiles."""
    path = bundle / "tensorrt-rtx" / "denoiser.kernels.json"
    listed = read_kernels(path)
    write_kernels(msgspec.structs.replace(listed, profiles=(listed.profiles[index],)), path)
    manifest, change = read_manifest(bundle), msgspec.structs.replace
    entry = manifest.networks["denoiser"]
    assert entry.plan is not None
    plan = change(entry.plan, kernels=FileEntry.of(bundle, path))
    write_manifest(change(manifest, networks=manifest.networks | {"denoiser": change(entry, plan=plan)}), bundle)


def test_tables(run: Run, small_bundle: Path) -> None:
    result = run("inspect", small_bundle, "--kernels", "--gpu", "RTX 4090", "--gpu", "4090", "--gpu", "l4")
    assert result.returncode == 0, result.stderr
    words = (
        "convolution",
        "product",
        "attention",
        "norm",
        "copy or layout",
        "pointwise",
        "fp32 spills",
        "activations",
        "share",
    )
    for word in (
        *NETWORKS,
        *words,
        "* branches 2, frames 3",
        "branches 1 to 2, frames 2 to 6",
        "RTX 4090",
        "L4",
        "least on paper",
    ):
        assert word in result.stdout, result.stdout
    assert "A model, not measured" in result.stdout
    assert result.stdout.count("RTX 4090") == len(NETWORKS), "a GPU that is named twice is shown once"
    assert max(len(line.rstrip()) for line in result.stdout.splitlines()) <= 80
    assert "…" not in result.stdout, "cut off"
    assert "not known" not in result.stdout, "every size is known"


def test_one_network(small_bundle: Path) -> None:
    result = invoke("inspect", small_bundle, "--kernels", "vae_decoder", "--chunk", "2")
    assert "vae_decoder at chunk 2" in result.stdout
    assert "* chunk 1 to 6" in result.stdout, "the range is taken, as the runtime does"
    assert "denoiser" not in result.stdout
    assert "model" not in result.stdout, "no GPU was named"


def test_json(small_bundle: Path) -> None:
    exact, span = profiles(small_bundle, "--kernels", "denoiser", "--gpu", "L4", "--top", "3")
    listed = kernels_of(small_bundle, "denoiser")
    assert exact["ranges"]["frames"] == {"min": 3, "opt": 3, "max": 3}
    assert span["ranges"]["frames"]["max"] == 6
    assert [exact["taken"], span["taken"]] == [True, False]
    for found, profile in zip((exact, span), listed.profiles, strict=True):
        costs = kernel_costs(profile, {"branches": 2, "frames": 3})
        assert found["sizes"] == {"branches": 2, "frames": 3}
        assert found["kernels"] == len(costs) == sum(kind["kernels"] for kind in found["by_kind"].values())
        assert found["bytes"]["read"] == sum(c.read for c in costs) > 0
        assert found["flops"] == sum(c.flops for c in costs)
        assert found["activation_bytes"] == profile.activation_bytes > 0
        assert found["unknown"] == 0
        assert len(found["heaviest"]) == 3
        (model,) = found["roofline"]
        assert model["seconds"] >= max(model["memory_seconds"], model["arithmetic_seconds"]) > 0
        assert model["measured"] is False
    whole = json.loads(invoke("inspect", small_bundle, "--kernels", "--json").stdout)
    assert all(whole["networks"][name]["profiles"] for name in NETWORKS)
    assert whole["ranges"]["frames"]["max"] == 6, "beside what inspect shows without --kernels"


def test_arithmetic_is_that_of_the_graph(small_bundle: Path) -> None:
    """Kernels have the operations that are counted from the ONNX graph, except for constants that were folded."""
    for name in NETWORKS:
        entry = Bundle.open(small_bundle).network(name)
        profile = kernels_of(small_bundle, name).profiles[-1]
        flops = sum(c.flops for c in kernel_costs(profile, {s: r.max for s, r in entry.spec.ranges.items()}))
        assert flops == pytest.approx(entry.flops, rel=0.001), name


def test_a_range_at_the_exact_sizes_moves_about_as_much(small_bundle: Path) -> None:
    exact, span = profiles(small_bundle, "--kernels", "denoiser")
    for figure in ("read", "written"):
        assert span["bytes"][figure] == pytest.approx(exact["bytes"][figure], rel=0.15), "fused otherwise"
    assert span["flops"] == exact["flops"]


def test_sizes_outside_a_profile_have_no_figures(small_bundle: Path) -> None:
    exact, span = profiles(small_bundle, "--kernels", "denoiser", "--frames", "6")
    assert (exact["sizes"], exact["bytes"]) == (None, None)
    assert span["taken"]
    assert span["sizes"] == {"branches": 2, "frames": 6}
    (_, less) = profiles(small_bundle, "--kernels", "denoiser", "--frames", "2")
    assert span["bytes"]["read"] > 2 * less["bytes"]["read"]


def test_comparison_and_plot(small_bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "kernels.png"
    result = invoke("inspect", small_bundle, "--kernels", "denoiser", "--compare", small_bundle, "--plot", picture)
    assert result.returncode == 0, result.stderr
    rows = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert rows["all"].rstrip().endswith("+0.0%")
    assert f"wrote {picture}" in result.stderr
    assert "product" in rows
    with PIL.Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width > 900
        assert image.height > 300
        assert len(image.convert("L").getcolors(256) or ()) > 10, "something is drawn"
    whole = tmp_path / "whole.png"
    assert invoke("inspect", small_bundle, "--kernels", "--plot", whole).returncode == 0
    with PIL.Image.open(whole) as taller:
        assert taller.height > image.height, "a panel for each network"
    compared = json.loads(invoke("inspect", small_bundle, "--kernels", "--compare", small_bundle, "--json").stdout)
    assert compared["compared"]["networks"]["denoiser"] == {"profiles": compared["networks"]["denoiser"]["profiles"]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kernels", "unet"], f"choose one of: {', '.join(NETWORKS)}"),
        (["--kernels", "--gpu", "GTX 1080"], f"choose one of: {', '.join(gpu.name for gpu in GPUS)}"),
        (["--kernels", "--frames", "7"], "frames 7 is outside what this bundle was built for (2 to 6)"),
        (["--kernels", "--chunk", "9"], "build one with another --decode-chunk"),
        (["--kernels", "--height", "64"], "height 64 is outside"),
        (["--kernels", "--compare", "nowhere"], "there is no bundle at nowhere"),
        (["--kernels", "--plot", "/proc/kernels.png"], "cannot write /proc/kernels.png"),
        (["--kernels", "--plot", "kernels.svg"], "--plot writes a PNG"),
        (["--kernels", "--plot", "nowhere/kernels.png"], "nowhere does not exist; create it first"),
        (["--kernels", "denoiser", "--chunk", "2"], "denoiser has no size chunk; it is a size of vae_decoder"),
        (["--kernels", "denoiser,vae_decoder"], "is a list; name one of image_encoder"),
    ],
)
def test_refusals(arguments: list[str], words: str, small_bundle: Path) -> None:
    result = invoke("inspect", small_bundle, *arguments)
    assert result.returncode == 1
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--frames", "3"], "--frames is for --kernels"),
        (["--gpu", "L4"], "--gpu is for --kernels"),
        (["--kernels", "--num-frames", "3"], "--num-frames is for --vram-budget, and --frames for --kernels"),
        (["--kernels", "--vram-budget", "8GB"], "show different things"),
        (["--top", "3"], "--top is for --kernels"),
        (["--trtexec", "denoiser", "--json"], "leave out --json, --kernels and --vram-budget"),
        (["--trtexec", "denoiser", "--kernels"], "leave out --json, --kernels and --vram-budget"),
        (["--trtexec", "denoiser", "--vram-budget", "8GB"], "leave out --json, --kernels and --vram-budget"),
        (["--kernels", "--branches", "3"], "3 is not in the range 1<=x<=2"),
        (["--kernels", "--plot", "-"], "--plot writes a file, and not to standard output"),
        (["--kernels", "--compare", "other", "--gpu", "L4"], "--gpu with --compare is for --json"),
        (["--kernels", "--compare", "other", "--top", "3"], "--top with --compare is for --json"),
    ],
)
def test_options_that_do_not_fit_are_usage_errors(arguments: list[str], words: str, small_bundle: Path) -> None:
    result = invoke("inspect", small_bundle, *arguments)
    assert result.returncode == 2
    assert words in result.stderr


def test_a_size_that_no_profile_holds(small_bundle: Path, tmp_path: Path) -> None:
    bundle = copy(small_bundle, tmp_path / "bundle")
    keep_profile(bundle, 0)
    result = invoke("inspect", bundle, "--kernels", "denoiser", "--frames", "6")
    assert result.returncode == 1
    words = f"no profile of denoiser in {bundle} holds frames 6; its profiles are: branches 2, frames 3"
    assert words in result.stderr


def test_sizes_that_are_not_given_are_those_of_the_first_profile(small_bundle: Path) -> None:
    result = invoke("inspect", small_bundle, "--kernels", "denoiser", "--branches", "1", "--top", "0")
    assert "denoiser at branches 1, frames 3" in result.stdout
    assert "heaviest" not in result.stdout


def test_a_comparison_says_what_is_before_and_after_and_which_profiles(small_bundle: Path, tmp_path: Path) -> None:
    other = copy(small_bundle, tmp_path / small_bundle.name)
    keep_profile(other, 1)
    result = invoke("inspect", small_bundle, "--kernels", "denoiser", "--compare", other, "--plot", tmp_path / "k.png")
    assert result.returncode == 0, result.stderr
    for word in (
        f"before  {other}",
        f"after   {small_bundle}",
        "before  branches 2, frames 3: range, branches 1 to 2, frames 2 to 6",
        "after   branches 2, frames 3: exact",
        "Only one of the profiles is exact",
        "bytes before",
    ):
        assert word in result.stdout, result.stdout


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ({"frames": Range(2, 2, 2)}, "was built for frames 2; give a size that both have, such as --frames 2"),
        (
            {"height": Range(64, 64, 64)},
            "is shown at height 32, and {other} was built for height 64; no size is common",
        ),
    ],
)
def test_a_comparison_is_at_sizes_that_both_have(
    ranges: dict[str, Range], words: str, small_bundle: Path, tmp_path: Path
) -> None:
    other = copy(small_bundle, tmp_path / "other")
    manifest, change = Bundle.open(other, verify=False).manifest, msgspec.structs.replace
    changed = change(manifest.ranges, **ranges)
    specs = network_specs(manifest.model, changed)
    networks = {}
    for name, entry in manifest.networks.items():
        assert entry.plan is not None
        own = specs[name].ranges
        profiles = tuple(change(p, ranges={s: p.ranges.get(s, own[s]) for s in own}) for p in entry.plan.profiles)
        networks[name] = change(entry, spec=specs[name], plan=change(entry.plan, profiles=profiles))
    write_manifest(change(manifest, ranges=changed, networks=networks), other)
    result = invoke("inspect", small_bundle, "--kernels", "--compare", other)
    assert_refused(result, words.format(other=other), str(small_bundle))


def test_the_option_before_the_bundle_is_explained() -> None:
    result = invoke("inspect", "--kernels", "some/bundle")
    assert_refused(result, "write: inspect some/bundle --kernels", code=2)
    result = invoke("inspect", "--kernels", "some/bundle", "denoiser")
    assert_refused(result, "write: inspect some/bundle --kernels denoiser", code=2)
    assert_refused(invoke("inspect", "--kernels"), "Missing argument 'BUNDLE'", code=2)


def test_figures_are_whole_on_a_terminal_of_80_columns() -> None:
    tensors = (
        KernelTensor("in", "Half", (99_400_000,), (1,)),
        KernelTensor("wide", "Float", (99_400_000,), (1,)),
    )
    kernel = Kernel("k" * 90, "kgen", "shape arithmetic", (0, 1), (0,), (1,), "99400000000", ("node" * 20,) * 12)
    span = Range(200, 800, 1000)
    ranges = dict.fromkeys(("batch", "branches", "frames", "height", "width"), span)
    profile = ProfileKernels(ranges, 999_400_000_000, tensors, (kernel,) * 1234)
    one = ShownKernels(KernelList("denoiser", (profile,)), 0, dict.fromkeys(ranges, 1000))
    text = io.StringIO()
    console = Console(width=80, file=text, highlight=False, markup=False, soft_wrap=True)
    print_kernels(console, [one], [GPUS[0]], 3)
    print_comparison(console, "a", [one], "b", [one])
    lines = text.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines if "denoiser at" not in line and ": range" not in line)
    for line in lines:
        if "…" in line:
            name, figures = line.split("…")
            assert name.startswith(("shape", "node")), line
            assert len(figures.split()) > 5, line
    assert any(line.startswith("shape arith") and "100.0%" in line for line in lines)
    assert "1234" in text.getvalue()


def test_a_damaged_list_is_a_damaged_bundle(small_bundle: Path, tmp_path: Path) -> None:
    bundle = copy(small_bundle, tmp_path / "bundle")
    path = bundle / "tensorrt-rtx" / "denoiser.kernels.json"
    path.write_bytes(b"{" * path.stat().st_size)
    result = invoke("inspect", bundle, "--kernels")
    assert result.returncode == 1
    assert "denoiser.kernels.json was altered since it was built" in result.stderr
    assert "to repair it, run `svd-trt build " in result.stderr
    path.unlink()
    assert "denoiser.kernels.json is missing" in invoke("inspect", bundle, "--kernels").stderr


def test_bundles_without_lists_say_what_to_do(small_bundle: Path, tmp_path: Path) -> None:
    bundle = copy(small_bundle, tmp_path / "unlisted", kernels=None)
    result = invoke("inspect", bundle, "--kernels")
    assert result.returncode == 1
    assert "listed no kernels" in result.stderr
    assert "--backend tensorrt-rtx" in result.stderr
    manifest: Manifest = Bundle.open(bundle).manifest
    networks = {name: msgspec.structs.replace(entry, plan=None) for name, entry in manifest.networks.items()}
    write_manifest(msgspec.structs.replace(manifest, networks=networks, tensorrt=None), bundle)
    result = invoke("inspect", bundle, "--kernels")
    assert result.returncode == 1
    assert "has no engines, so no kernels; svd-trt build --backend tensorrt-rtx adds them" in result.stderr


def test_a_gpu_that_is_not_served_is_named(small_bundle: Path) -> None:
    result = invoke("inspect", small_bundle, "--kernels", "vae_decoder", "--gpu", "H100 SXM")
    assert result.returncode == 0, result.stderr
    assert "TensorRT for RTX does not serve the H100 SXM" in result.stdout
