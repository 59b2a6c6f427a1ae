"""The format of bundles as docs/bundle.md promises it to programs that do not import this package."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from svd_trt import Bundle, build_bundle
from svd_trt.cli.main import cli
from svd_trt.engine.bundle_schema import bundle_schema
from svd_trt.engine.manifest import CHECKSUM_NAME, SCHEMA_VERSION, read_manifest, write_manifest
from svd_trt.engine.spec import Range
from svd_trt.errors import BundleError
from svd_trt.runtime.golden import check_golden, short_video
from svd_trt.runtime.parameters import Parameters
from tests.conftest import SMALL

DOCS = Path(__file__).parents[2] / "docs"
SCHEMA: dict[str, Any] = json.loads((DOCS / "bundle.schema.json").read_text())


def test_the_schema_of_the_documents_is_that_of_the_structures() -> None:
    """If this fails: python -m svd_trt.engine.bundle_schema docs/bundle.schema.json."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(msgspec.json.encode(bundle_schema())) == SCHEMA


@pytest.mark.parametrize("name", ["small_bundle", "tiny_bundle", "dynamic_bundle"])
def test_bundles_follow_the_schema(name: str, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue(name)
    path = bundle if isinstance(bundle, Path) else bundle.path
    manifest = json.loads((path / "manifest.json").read_bytes())
    jsonschema.Draft202012Validator(SCHEMA).validate(manifest)
    assert manifest["schema_version"] == SCHEMA_VERSION
    del manifest["host"]["noise"]
    with pytest.raises(jsonschema.ValidationError, match="noise"):
        jsonschema.Draft202012Validator(SCHEMA).validate(manifest)


def test_integrity_needs_no_python(small_bundle: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", CHECKSUM_NAME], cwd=small_bundle, check=True)
    manifest = json.loads((small_bundle / "manifest.json").read_bytes())
    found = [entry for entry in _objects(manifest) if {"path", "size", "sha256"} <= entry.keys()]
    assert {entry["path"] for entry in found} == {
        path.relative_to(small_bundle).as_posix()
        for path in small_bundle.rglob("*")
        if path.is_file() and not path.name.startswith("manifest.json")
    }
    for entry in found:
        content = (small_bundle / entry["path"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["size"], entry["sha256"])


def _objects(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [value, *(found for item in value.values() for found in _objects(item))]
    return [found for item in value for found in _objects(item)] if isinstance(value, list) else []


def test_symbols_are_data(dynamic_bundle: Bundle) -> None:
    """Every symbolic axis of the graphs is described, with its divisor, its multiple and its range."""
    manifest = json.loads((dynamic_bundle.path / "manifest.json").read_bytes())
    divisors = set()
    for network in manifest["networks"].values():
        graph = onnx.load(dynamic_bundle.path / network["onnx"]["graph"]["path"], load_external_data=False).graph
        written = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
        for tensor in network["spec"]["inputs"]:
            for axis, in_graph in zip(tensor["shape"], written[tensor["name"]], strict=True):
                if isinstance(axis, int):
                    assert axis == in_graph
                    continue
                symbol, divisor = axis["symbol"], axis["divisor"]
                divisors.add((symbol, divisor))
                assert in_graph in (symbol, f"{symbol}//{divisor}")
                described = manifest["host"]["symbols"][symbol]
                limits = network["spec"]["ranges"][symbol]
                assert described["meaning"]
                assert described["multiple"] % divisor == 0
                assert limits["min"] % described["multiple"] == limits["max"] % described["multiple"] == 0
    assert ("height", 8) in divisors
    assert ("width", 1) in divisors


def test_arguments_have_the_limits_of_the_bundle(small_bundle: Path) -> None:
    arguments = json.loads((small_bundle / "manifest.json").read_bytes())["host"]["arguments"]
    assert list(arguments) == list(Parameters.fields())
    assert arguments["num_frames"] | {"help": ""} == {
        "kind": "integer",
        "default": 3,
        "min": 2,
        "max": 6,
        "choices": [],
        "help": "",
    }
    assert (arguments["height"]["min"], arguments["height"]["max"]) == (32, 32)
    assert arguments["max_guidance_scale"]["default"] == 3.0
    assert arguments["seed"]["default"] is None
    assert arguments["sampler"]["choices"] == ["euler", "unic", "dpmpp-2m", "ab2", "lcm"]
    assert arguments["sampler"]["default"] == "euler"
    assert arguments["num_inference_steps"]["default"] == 25


def test_the_noise_of_a_bundle(tiny_bundle: Bundle, dynamic_bundle: Bundle) -> None:
    half, full = (bundle.manifest.host.noise for bundle in (tiny_bundle, dynamic_bundle))
    assert [(draw.name, draw.dtype) for draw in half.draws] == [("image_noise", "float32"), ("latents", "float16")]
    assert [draw.dtype for draw in full.draws] == ["float32", "float32"]
    assert half.initial_scale == "sqrt(sigma^2 + 1)"


def test_golden_values_hold_here(dynamic_bundle: Bundle, small_bundle: Path) -> None:
    for bundle in (dynamic_bundle, Bundle.open(small_bundle)):
        checks = check_golden(bundle)
        assert [check.name for check in checks if not check.passed] == []
        assert len(checks) == 6


@pytest.mark.parametrize(
    ("part", "name"),
    [("pixels", "image encoder's input"), ("image", "VAE encoder's input")],
)
def test_a_wrong_golden_value_is_noticed(small_bundle: Path, tmp_path: Path, part: str, name: str) -> None:
    bundle = _with_values(small_bundle, tmp_path, lambda values: _add(values[part]["samples"], 5, 1e-3))
    assert [check.name for check in check_golden(bundle) if not check.passed] == [name]


def test_values_of_other_seeds_and_steps_are_compared_with_those(small_bundle: Path, tmp_path: Path) -> None:
    """A newer version may write other ones. A list without values compares nothing, so it does not pass."""

    def change(values: Any) -> None:
        values["noise"] = values["noise"][1:]
        values["schedules"] = values["schedules"][::-1]
        values["image"]["samples"] = []

    bundle = _with_values(small_bundle, tmp_path, change)
    assert [check.name for check in check_golden(bundle) if not check.passed] == ["VAE encoder's input"]


def test_recorded_frames_of_another_size_are_a_damaged_bundle(small_bundle: Path, tmp_path: Path) -> None:
    bundle = _with_values(small_bundle, tmp_path, lambda values: values["video"].update(shape=[3, 32, 32, 3]))
    with pytest.raises(BundleError, match=r"frames\.rgb cannot be read"):
        check_golden(bundle)


def test_a_wrong_golden_video_fails_the_self_test(small_bundle: Path, tmp_path: Path) -> None:
    bundle = _with_values(small_bundle, tmp_path, lambda values: values["video"]["arguments"].update(seed=1))
    result = CliRunner().invoke(cli, ["inspect", str(bundle.path), "--self-test"])
    assert "frames of a video" in str(result.exception)
    outcomes = [line.split()[-1] for line in result.output.splitlines()[1:]]
    assert outcomes == ["ok"] * 5 + ["DIFFERS"]
    assert result.exit_code == 1


def test_the_self_test_as_json(small_bundle: Path) -> None:
    result = CliRunner().invoke(cli, ["inspect", str(small_bundle), "--self-test", "--json"])
    assert result.exit_code == 0, result.output
    checks = json.loads(result.stdout)["checks"]
    assert {check["name"] for check in checks} >= {"noise", "schedule", "frames of a video"}
    assert all(check["passed"] for check in checks)


def test_golden_frames_are_a_video(small_bundle: Path) -> None:
    values = json.loads((small_bundle / "golden" / "values.json").read_bytes())
    frames = np.frombuffer((small_bundle / "golden" / "frames.rgb").read_bytes(), np.uint8)
    assert frames.reshape(values["video"]["shape"]).std() > 1
    assert values["video"]["shape"] == [2, 32, 32, 3]


def test_golden_frames_of_one_decode_chunk(small_bundle: Path) -> None:
    """A bundle whose only chunk is 4 cannot decode 2 frames; its shortest video has 4."""
    manifest = read_manifest(small_bundle)
    four = Range(4, 4, 4)
    fixed = msgspec.structs.replace(manifest, ranges=msgspec.structs.replace(manifest.ranges, chunk=four))
    assert short_video(manifest) == short_video(fixed) | {"num_frames": 2, "decode_chunk_size": 2}  # type: ignore[operator]
    assert short_video(fixed)["num_frames"] == short_video(fixed)["decode_chunk_size"] == 4  # type: ignore[index]
    never = msgspec.structs.replace(manifest, ranges=msgspec.structs.replace(manifest.ranges, chunk=Range(7, 7, 7)))
    assert short_video(never) is None


def test_golden_frames_are_added_to_a_bundle_without_them(small_checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    options = replace(SMALL, cache=cache, golden_frames=False)
    first = build_bundle(small_checkpoint, tmp_path / "bundle", options)
    assert first.bundle.manifest.golden is not None
    assert first.bundle.manifest.golden.frames is None
    assert build_bundle(small_checkpoint, tmp_path / "bundle", options).up_to_date
    second = build_bundle(small_checkpoint, tmp_path / "bundle", replace(options, golden_frames=True))
    assert second.bundle.manifest.golden is not None
    assert second.bundle.manifest.golden.frames is not None
    assert all(stage.reused for stage in second.stages)


def _add(values: list[float], index: int, amount: float) -> None:
    values[index] += amount


def _with_values(source: Path, folder: Path, change: Any) -> Bundle:
    """A copy of a bundle with other golden values, whose hashes are right."""
    from svd_trt.engine.manifest import FileEntry

    path = folder / "bundle"
    shutil.copytree(source, path)
    file = path / "golden" / "values.json"
    values = json.loads(file.read_bytes())
    change(values)
    file.write_text(json.dumps(values))
    manifest = read_manifest(path)
    assert manifest.golden is not None
    golden = msgspec.structs.replace(manifest.golden, values=FileEntry.of(path, file))
    write_manifest(msgspec.structs.replace(manifest, golden=golden), path)
    return Bundle.open(path)
