"""``svd-trt bench`` refuses what it cannot measure, and keeps completed rounds; see `tests.benchmarks` for the rest."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from svd_trt import Bundle
from svd_trt.benchmarks.results import read_result
from tests.cli.conftest import Run, invoke, start

SMALL = ["--num-frames", "2", "--height", "64", "--width", "64", "--num-inference-steps", "2", "--threads", "1"]


@pytest.mark.slow
def test_a_curve_is_measured(run: Run, dynamic_bundle: Bundle, checkpoint: Path, tmp_path: Path) -> None:
    given = ["--bundle", dynamic_bundle.path, "--model", checkpoint, "--contender", "svd-trt-onnxruntime"]
    found = run("bench", *given, *SMALL, "--rounds", "1", "--curve", "steps", "-o", tmp_path / "r.json", "--json")
    assert found.returncode == 0, found.stderr
    result = read_result(tmp_path / "r.json")
    assert "--rounds 1 --curve steps --json" in result.command
    assert json.loads(found.stdout)["contenders"][1]["psnr_db"] >= 50
    assert [(c.contender, [p.at for p in c.points]) for c in result.curves] == [
        ("diffusers-eager", [1, 2]),
        ("svd-trt-onnxruntime", [1, 2]),
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--preset", "huge"], 2, "'huge' is not one of"),
        (["--preset", "tiny", "--contender", "svd"], 1, "no contender is called 'svd'; choose from: diffusers-eager"),
        (["--preset", "tiny", "--rounds", "0"], 2, "--rounds"),
        (["--preset", "tiny", "--curve", "colour"], 2, "'colour' is not one of"),
        (["--preset", "tiny", "--height", "100"], 1, "multiples of 8"),
        (["--preset", "tiny", "--model", "x"], 2, "both name a model"),
        (["--preset", "tiny", "--bundle", "missing"], 1, "there is no bundle"),
        (["--model", "missing"], 1, "missing"),
        (["plot", "missing.json"], 1, "cannot read missing.json"),
        (["compare", "missing.json", "missing.json"], 1, "cannot read missing.json"),
        (["readme", "missing.json"], 2, "No such command 'readme'"),
    ],
)
def test_refusals(arguments: list[str], code: int, words: str, tmp_path: Path) -> None:
    measuring = arguments[0].startswith("-")
    found = invoke("bench", *arguments, *(("--cache", tmp_path) if measuring else ()))
    assert found.returncode == code, found.stderr
    assert words in found.stderr


def test_output_is_checked_before_the_work(tmp_path: Path) -> None:
    for option in ("-o", "--markdown"):
        found = invoke("bench", "--preset", "tiny", option, tmp_path / "missing" / "x")
        assert found.returncode == 1
        assert "there is no such folder" in found.stderr
        assert len(found.stderr.strip().splitlines()) == 1


def test_a_bundle_of_other_weights_is_refused(dynamic_bundle: Bundle) -> None:
    found = invoke("bench", "--bundle", dynamic_bundle.path, "--preset", "mid")
    assert found.returncode == 1
    assert "frames would not compare" in found.stderr
    found = invoke("bench", "--bundle", dynamic_bundle.path)
    assert found.returncode == 2
    assert "give --model" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--precision", "fp16"], "is fp32; leave out --precision"),
        (["--num-frames", "40"], "frames 40 is outside"),
        (["--height", "1024"], "height 1024 is outside"),
        (["--decode-chunk-size", "30"], "decode_chunk_size 30 is outside"),
    ],
)
def test_a_bundle_that_cannot_do_it(arguments: list[str], words: str, dynamic_bundle: Bundle, checkpoint: Path) -> None:
    found = invoke("bench", "--bundle", dynamic_bundle.path, "--model", checkpoint, *arguments)
    assert found.returncode == 1
    assert words in found.stderr


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = invoke("bench", "--preset", "tiny", "--cache", tmp_path / "file" / "cache")
    assert found.returncode == 1
    assert "choose another place with --cache" in found.stderr


@pytest.mark.slow
def test_interrupted(checkpoint: Path, tmp_path: Path) -> None:
    """Completed rounds are kept, and no process is left."""
    target = tmp_path / "result.json"
    process = start(
        "bench", "--model", checkpoint, "--contender", "diffusers-eager", *SMALL, "--rounds", "500", "-o", target
    )
    deadline = time.monotonic() + 120
    while not target.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"Interrupted. Completed rounds are in {target}" in err
    assert "Traceback" not in err
    assert read_result(target).contenders[0].rounds
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
