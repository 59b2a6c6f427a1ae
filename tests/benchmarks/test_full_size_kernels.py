"""The record of full-size kernels: measuring, merging, and the tables of its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from svd_trt.benchmarks import full_size_kernels
from svd_trt.benchmarks.full_size_kernels import BEGIN, BUILDS, DECODER_CHUNKS, END, kernel_tables, main
from svd_trt.engine.kernel_summary import profile_summary
from svd_trt.engine.kernels import parse_kernels
from tests.engine.kernel_block import EXACT, SPEC, build_log, write_block

pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx", reason="TensorRT for RTX is not installed (svd-trt[rtx])")


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``svd-trt inspect --kernels --json`` says of a network, from a real build of a small one."""
    path = tmp_path_factory.mktemp("block") / "block.onnx"
    write_block(path)
    kernels = parse_kernels(build_log(path, EXACT, SPEC.ranges), SPEC, [(EXACT, 10**9), (SPEC.ranges, 2 * 10**9)])
    profiles = [
        profile_summary(profile, {"chunk": 4}, 3) | {"taken": index == 0}
        for index, profile in enumerate(kernels.profiles)
    ]
    fields = {"plan_bytes": 3 * 10**9, "weight_bytes": 10**9, "nodes": 20, "flops": 10**12, "profiles": profiles}
    decoder = fields | {"profiles": [profile_summary(kernels.profiles[1], {"chunk": 9}, 3) | {"taken": True}]}
    return {"denoiser": fields, "vae_decoder": fields, "image_encoder": decoder}


@pytest.fixture
def measured(networks: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Builds are replaced; the options of each are recorded."""
    calls: list[list[str]] = []

    def measure_build(model: str, options: list[str], work: Path | None, inspect: Any) -> dict[str, Any]:
        assert "--kernels" in inspect
        calls.append(options)
        cost = {
            "seconds": 100.0 + len(calls),
            "peak_rss_bytes": 7 * 10**9,
            "bundle_bytes": 1,
            "stages": [],
            "passes": 1,
        }
        return cost | {"options": options, "networks": networks}

    def measure_decoder(model: str, chunk: int, work: Path | None) -> dict[str, Any]:
        calls.append([f"decoder {chunk}"])
        return {"engine_seconds": 1.0, "networks": {"vae_decoder": networks["vae_decoder"]}}

    monkeypatch.setattr(full_size_kernels, "measure_build", measure_build)
    monkeypatch.setattr(full_size_kernels, "_measure_decoder", measure_decoder)
    return calls


def invoke(*arguments: str | Path) -> str:
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False).output


def test_single_variants_are_measured_again_and_merged(measured: list[list[str]], tmp_path: Path) -> None:
    record = tmp_path / "kernels.json"
    invoke("measure", "-o", record)
    assert measured == [*BUILDS.values(), *([f"decoder {chunk}"] for chunk in DECODER_CHUNKS)]
    first = json.loads(record.read_text())
    output = invoke("measure", "-o", record, "--variant", "default", "--variant", "decoder 8")
    assert measured[-2:] == [BUILDS["default"], ["decoder 8"]]
    assert "default: denoiser chunk 4: 12 kernels" in output
    second = json.loads(record.read_text())
    assert list(second["variants"]) == list(first["variants"])
    assert second["variants"]["plain"] == first["variants"]["plain"]
    assert second["variants"]["default"]["seconds"] > first["variants"]["4 profiles"]["seconds"]
    other = tmp_path / "other.json"
    invoke("measure", "-o", other, "--variant", "decoder 8")
    invoke("measure", "-o", other, "--variant", "default")
    assert list(json.loads(other.read_text())["variants"]) == ["default", "decoder 8"], "in the order of the tables"
    assert "measure all variants" in invoke("measure", "random:tiny", "-o", record, "--variant", "default")


def test_the_page_has_every_profile_kind_and_build(measured: list[list[str]], tmp_path: Path) -> None:
    record, page = tmp_path / "kernels.json", tmp_path / "kernels.md"
    invoke("measure", "-o", record)
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    invoke("page", page, record)
    text = page.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for variant in (*BUILDS, "decoder 1", "decoder 14"):
        assert any(row.startswith(f"| {variant} | chunk 4 | 12 |") for row in rows), variant
    assert "|  | chunk 1 to 8 | 17 |" in text
    for words in ("norm in pieces", "convolution", "`--no-exact`", "peak memory", "7 GB", "3 GB", "1 min 4"):
        assert words in text, words


def test_sizes_that_a_profile_lacks_are_dashes(networks: dict[str, Any]) -> None:
    lacking = networks["image_encoder"]
    assert lacking["profiles"][0]["bytes"] is None
    found = {
        "networks": {
            "denoiser": networks["denoiser"] | {"profiles": [*networks["denoiser"]["profiles"], *lacking["profiles"]]}
        }
    }
    assert "|  | chunk 1 to 8 | 17 | - | - | - | - | 2 |" in kernel_tables({"variants": {"default": found}})


def test_the_tables_of_the_page_are_those_of_the_record() -> None:
    record = ROOT / "benchmarks" / "results" / "kernels-full-size.json"
    text = (ROOT / "docs" / "kernels.md").read_text()
    assert kernel_tables(json.loads(record.read_text())) in text
