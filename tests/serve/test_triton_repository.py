"""What ``svd-trt triton`` writes, and what it never replaces."""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from svd_trt import ArgumentError, Bundle, OutputError
from svd_trt.engine.manifest import Manifest
from svd_trt.engine.temporary_files import hidden_sibling
from svd_trt.serve.triton.triton_config import Gpus, ModelOptions, config_text
from svd_trt.serve.triton.triton_repository import WrittenModel, write_model
from svd_trt.serve.triton.triton_tensors import read_request
from tests.cli.conftest import assert_refused, invoke

TEXTS = {"config.pbtxt", "client.py", "1/model.py"}


def config_of(text: str) -> Any:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def written(model: Path) -> set[str]:
    return {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file() and "bundle" not in path.parts}


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_triton_reads_the_configuration(small_bundle: Path, tmp_path: Path) -> None:
    result = invoke("triton", small_bundle, "-o", tmp_path / "models", "--name", "xt-1", "--max-queue", "5", "-q")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    config = config_of((tmp_path / "models/xt-1/config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("xt-1", "python", 0)
    assert config.model_transaction_policy.decoupled
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 5
    arguments = Bundle.open(small_bundle).manifest.host.arguments
    inputs = {tensor.name: tensor for tensor in config.input}
    assert set(inputs) == {"image", "image_file", *arguments} - {"num_videos_per_prompt"}
    assert all(tensor.optional for tensor in inputs.values())
    kinds = {name: model_config_pb2.DataType.Name(tensor.data_type) for name, tensor in inputs.items()}
    assert kinds["image"] == "TYPE_UINT8"
    assert list(inputs["image"].dims) == [-1, -1, -1]
    assert kinds["seed"] == "TYPE_UINT64", "seeds go up to 2^64 - 1"
    assert (kinds["num_frames"], kinds["noise_aug_strength"], kinds["schedule"]) == (
        "TYPE_INT64",
        "TYPE_FP64",
        "TYPE_STRING",
    )
    assert (kinds["sigmas"], list(inputs["sigmas"].dims)) == ("TYPE_FP64", [-1])
    assert {t.name: list(t.dims) for t in config.output} == {
        "frame": [-1, -1, 3],
        "index": [1],
        "total": [1],
        "details": [1],
    }


ENGINES = "the bundle has no engines"


@pytest.mark.parametrize(
    ("engines", "gpus", "provider", "kind", "indexes"),
    [
        (True, "auto", None, "KIND_AUTO", []),
        (True, "none", None, "KIND_CPU", []),
        (True, (0, 2), None, "KIND_GPU", [0, 2]),
        (False, "auto", None, "KIND_CPU", []),
        (False, "auto", "cuda", "KIND_AUTO", []),
        (False, (1,), "tensorrt", "KIND_GPU", [1]),
    ],
)
def test_instances_run_where_the_bundle_can(
    engines: bool, gpus: Gpus, provider: Any, kind: str, indexes: list[int], small_bundle: Path
) -> None:
    manifest = _manifest(small_bundle, engines)
    options = ModelOptions(gpus, instances=3, provider=provider, vram_budget=8_000_000_000)
    config = config_of(config_text("m", manifest, options))
    (group,) = config.instance_group
    assert type(group).Kind.Name(group.kind) == kind
    assert (list(group.gpus), group.count) == (indexes, 3)
    assert config.parameters["vram_budget"].string_value == "8000000000"
    assert config.parameters["provider"].string_value == (provider or "")


def test_gpus_that_cannot_run_the_bundle_are_refused(small_bundle: Path) -> None:
    with pytest.raises(ArgumentError, match="no engines to run on a GPU; leave --gpus out"):
        config_text("m", _manifest(small_bundle, engines=False), ModelOptions((0,)))


def _manifest(bundle: Path, engines: bool) -> Manifest:
    manifest = Bundle.open(bundle, verify=False).manifest
    return manifest if engines else msgspec.structs.replace(manifest, tensorrt=None)


def test_the_bundle_is_linked_or_copied(small_bundle: Path, tmp_path: Path) -> None:
    linked = invoke("triton", small_bundle, "-o", tmp_path / "models", "--name", "linked")
    copied = invoke("triton", small_bundle, "-o", tmp_path / "models", "--name", "copied", "--copy")
    assert f"and a link to {small_bundle.resolve()}" in linked.stdout
    assert "and a copy of the bundle" in copied.stdout
    for name in ("linked", "copied"):
        model = tmp_path / "models" / name
        assert written(model) == TEXTS
        assert (model / "1/bundle").is_symlink() == (name == "linked")
        assert Bundle.open(model / "1/bundle", verify=True).manifest == Bundle.open(small_bundle).manifest
    assert {path.name for path in tmp_path.iterdir()} == {"models"}


def test_the_commands_name_what_was_written(small_bundle: Path, tmp_path: Path) -> None:
    """A container sees the bundle at the place that the link leads to; a folder with a blank is one word."""
    models = tmp_path / "my models"
    linked = _commands(invoke("triton", small_bundle, "-o", models, "--name", "m").stdout)
    volumes = [linked["docker run"][i + 1] for i, word in enumerate(linked["docker run"]) if word == "-v"]
    assert volumes == [f"{models}:/models:ro", f"{small_bundle.resolve()}:{small_bundle.resolve()}:ro"]
    assert linked["python -m"][3:5] == ["--model-repository", str(models)]
    assert Path(linked["python " + str(models / "m/client.py")][1]).is_file()
    copied = _commands(invoke("triton", small_bundle, "-o", models, "--name", "m", "--copy").stdout)
    assert copied["docker run"].count("-v") == 1


def _commands(output: str) -> dict[str, list[str]]:
    lines = output.replace("\\\n", "").splitlines()[1:]
    return {" ".join(words[:2]): words for words in (shlex.split(line, comments=True) for line in lines) if words}


def test_the_example_is_for_its_model(small_bundle: Path, tmp_path: Path) -> None:
    model = write_model(small_bundle, tmp_path, name="xt-8gb")
    assigned = {
        ast.unparse(node.targets[0]): ast.unparse(node.value)
        for node in ast.parse((model.path / "client.py").read_text()).body
        if isinstance(node, ast.Assign)
    }
    assert assigned["MODEL"] == "'xt-8gb'"
    asked = subprocess.run(
        [sys.executable, model.path / "client.py", "no-such.png", "--server", "localhost:1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 1
    assert "Traceback" not in asked.stderr
    assert "localhost:1" in asked.stderr or "connect" in asked.stderr


def test_a_second_run_brings_the_model_up_to_date_and_leaves_others(small_bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "models/other"
    other.mkdir(parents=True)
    (other / "config.pbtxt").write_text("mine")
    arguments = ("triton", small_bundle, "-o", tmp_path / "models", "--name", "m")
    assert invoke(*arguments, "--copy").stdout.startswith("wrote ")
    (tmp_path / "models/m/1/__pycache__").mkdir()  # as Triton's process leaves it
    assert invoke(*arguments, "--max-queue", "7").stdout.startswith("brought up to date ")
    model = tmp_path / "models/m"
    assert config_of((model / "config.pbtxt").read_text()).dynamic_batching.default_queue_policy.max_queue_size == 7
    assert (model / "1/bundle").is_symlink()
    assert Bundle.open(small_bundle), "a link was removed, not what it leads to"
    invoke(*arguments, "--copy")
    assert Bundle.open(small_bundle), "a link was removed, not what it leads to"
    assert content(other) == {"config.pbtxt": b"mine"}
    assert {path.name for path in tmp_path.iterdir()} == {"models"}


def test_a_file_system_that_cannot_exchange_folders(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svd_trt.engine.swap.swap", lambda one, other: False)
    write_model(small_bundle, tmp_path / "models", name="m")
    again = write_model(small_bundle, tmp_path / "models", name="m", options=ModelOptions(max_queue=9))
    assert again.replaced
    assert "max_queue_size: 9" in (again.path / "config.pbtxt").read_text()
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["m"]


@pytest.mark.parametrize("file", sorted(TEXTS))
def test_what_was_changed_by_hand_stays(file: str, small_bundle: Path, tmp_path: Path) -> None:
    model = write_model(small_bundle, tmp_path, name="m").path
    with (model / file).open("a") as changed:
        changed.write("# mine\n")
    before = content(model)
    assert_refused(invoke("triton", small_bundle, "-o", tmp_path, "--name", "m"), file, "was changed after", "--name")
    assert content(model) == before


@pytest.mark.parametrize("file", ["labels.txt", "2/model.py", "1/weights.bin"])
def test_what_the_command_did_not_write_stays(file: str, small_bundle: Path, tmp_path: Path) -> None:
    model = write_model(small_bundle, tmp_path, name="m").path
    (model / file).parent.mkdir(exist_ok=True)
    (model / file).write_text("mine")
    before = content(model)
    assert_refused(invoke("triton", small_bundle, "-o", tmp_path, "--name", "m"), "was not written by", "--name")
    assert content(model) == before


def test_another_thing_in_the_place_of_the_model_stays(small_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(small_bundle)
    for name in ("file", "link"):
        assert_refused(invoke("triton", small_bundle, "-o", tmp_path, "--name", name), "is not a model that")
    assert (tmp_path / "file").read_text() == "mine"
    assert_refused(invoke("triton", small_bundle, "-o", tmp_path / "file"), "cannot write", "choose another -o")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{bundle}", "-o", "{bundle}/models"], "is inside the bundle"),
        (["{bundle}", "-o", "{bundle}/.."], "every folder is a model"),
        (["{bundle}", "-o", "models", "--name", "a/b"], "'a/b' cannot be the name of a Triton model"),
        (["{bundle}", "-o", "models", "--name", ""], "'' cannot be the name"),
        (["nothing", "-o", "models"], "nothing"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], words: str, small_bundle: Path, tmp_path: Path) -> None:
    given = [word.format(bundle=small_bundle) for word in arguments]
    given[2] = os.path.join(tmp_path, given[2])  # noqa: PTH118
    assert_refused(invoke("triton", *given), words)
    assert not (tmp_path / "models").exists()
    assert not list(small_bundle.glob(".svd-trt-*"))


@pytest.mark.parametrize("gpus", ["", "a", "0,", "-1", "0,1000"])
def test_gpus_are_numbers(gpus: str, small_bundle: Path, tmp_path: Path) -> None:
    assert_refused(invoke("triton", small_bundle, "-o", tmp_path, "--gpus", gpus), "such as 0,1", code=2)


def test_a_copy_that_fails_leaves_what_was_there(small_bundle: Path, tmp_path: Path) -> None:
    """The process may not write files of over 20 blocks, as if the disk were full."""
    write_model(small_bundle, tmp_path / "models", name="m")
    before = content(tmp_path / "models")
    arguments = ["triton", str(small_bundle), "-o", "models", "--name", "m", "--copy", "-q"]
    command = [sys.executable, "-m", "svd_trt.cli", *arguments]
    limited = ["sh", "-c", f"ulimit -f 20; exec {shlex.join(command)}"]
    done = subprocess.run(limited, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert_refused(done, "cannot write models: File too large")
    assert content(tmp_path / "models") == before
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_the_next_run_removes_what_a_killed_one_left(small_bundle: Path, tmp_path: Path) -> None:
    left = hidden_sibling(tmp_path / "models", "")
    (left / "1").mkdir(parents=True)
    (left / "1/model.py").write_text("half")
    write_model(small_bundle, tmp_path / "models", name="m")
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_the_model_takes_the_name_of_the_folder(small_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "svd-xt").symlink_to(small_bundle)
    model = write_model(tmp_path / "svd-xt", tmp_path / "models")
    assert model == WrittenModel("svd-xt", tmp_path / "models", small_bundle.resolve(), copied=False, replaced=False)
    (tmp_path / "my bundle").symlink_to(small_bundle)
    assert_refused(invoke("triton", tmp_path / "my bundle", "-o", tmp_path / "models"), "'my bundle'", "with --name")


def test_tensors_become_arguments() -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    picture, values = read_request(
        {
            "image": pixels,
            "seed": np.array([2**64 - 1], np.uint64),
            "noise_aug_strength": np.array([0.02]),
            "sigmas": np.array([700.0, 1, 0]),
            "quality": np.array([b"fast"], np.object_),
        }
    )
    assert picture is pixels
    assert values == {"seed": 2**64 - 1, "noise_aug_strength": 0.02, "sigmas": [700.0, 1.0, 0.0], "quality": "fast"}
    assert [type(value) for value in values.values()] == [int, float, list, str]
    assert read_request({"image_file": np.array([b"\x89PNG"], np.object_)}) == (b"\x89PNG", {})


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "no picture was given"),
        ({"image": np.zeros(1), "image_file": np.array([b""], np.object_)}, "two pictures were given"),
        ({"image": np.zeros(1), "quality": np.array([b"\xff"], np.object_)}, "quality must be text in UTF-8"),
    ],
)
def test_requests_that_cannot_be_read(tensors: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        read_request(tensors)


def test_the_server_of_the_wheel_needs_the_wheel() -> None:
    command = [sys.executable, "-m", "svd_trt.serve.triton.triton_wheel"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_refused(done, "nvidia-pytriton is not installed: pip install")


def test_errors_of_the_system_are_said(small_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(OutputError, match="cannot write"):
        write_model(small_bundle, tmp_path / "models" / "deeper")
