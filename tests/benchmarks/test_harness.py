"""The harness on real contenders, small ones: what it writes, what it survives. No time is asserted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svd_trt import Bundle
from svd_trt.benchmarks.contenders import CONTENDERS, choose
from svd_trt.benchmarks.results import read_result
from svd_trt.benchmarks.schema import STAGES
from svd_trt.benchmarks.subject import make_subject, with_flops
from svd_trt.errors import ArgumentError

SMALL = ["--num-frames", "2", "--height", "64", "--width", "64", "--num-inference-steps", "2", "--threads", "1"]


def bench(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "svd_trt.cli", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}))


@pytest.mark.xdist_group("dynamic")
def test_a_run_on_a_bundle(dynamic_bundle: Bundle, checkpoint: Path, tmp_path: Path) -> None:
    """Baseline, ours, one that cannot run here and one that is broken; every figure that a CPU can give."""
    file, page = tmp_path / "r.json", tmp_path / "r.md"
    which = ["svd-trt-onnxruntime", "svd-trt-tensorrt-rtx", "openvino"]
    asked = [part for name in which for part in ("--contender", name)]
    done = bench(
        *("--model", str(checkpoint), "--bundle", str(dynamic_bundle.path), *SMALL, *asked, "--rounds", "2"),
        *("--curve", "steps", "-o", str(file), "--markdown", str(page), "--cache", str(tmp_path / "cache")),
        env={"PYTHONPATH": str(broken_openvino(tmp_path))},
    )
    assert done.returncode == 0, done.stderr
    result = read_result(file)
    eager, ours, rtx, openvino = result.contenders
    assert [c.name for c in result.contenders] == ["diffusers-eager", *which]
    assert rtx.skipped == "needs an NVIDIA GPU" or rtx.total_s is not None
    assert "broken on purpose" in (openvino.skipped or "")
    assert eager.psnr_db == 200
    assert ours.psnr_db is not None
    assert ours.psnr_db >= 50
    assert ours.fidelity is not None
    assert len(ours.fidelity.psnr_db) == 2
    for one in (eager, ours):
        assert set(one.stages) == set(STAGES)
        assert [r.round for r in one.rounds] == [0, 1]
        assert all(len(r.steps) == 2 for r in one.rounds)
        assert one.total_s is not None
        assert one.stages["denoise"].median < one.total_s.median
        assert one.peak_rss is not None
        assert one.peak_rss > 10**7
        assert None not in (one.import_s, one.load_s, one.startup_s, one.warmup_s)
    assert eager.ratio_to_eager is not None
    assert eager.ratio_to_eager.low == eager.ratio_to_eager.high == 1
    assert ours.host_overhead_s is not None
    assert {c.contender for c in result.curves} == {"diffusers-eager", "svd-trt-onnxruntime"}
    assert [p.at for p in result.curves[0].points] == [1, 2]
    assert "svd-trt-onnxruntime" in done.stdout
    assert "| svd-trt-onnxruntime |" in page.read_text()
    assert result.machine["commit"]


def broken_openvino(folder: Path) -> Path:
    """A module of that name that is found first and fails."""
    package = folder / "broken" / "openvino"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('broken on purpose')\n")
    return package.parent


def test_ctrl_c_ends_it_and_its_children(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "svd_trt.cli", "bench", "--model", str(checkpoint), *SMALL]
    process = subprocess.Popen(
        [*command, "--contender", "diffusers-eager", "--rounds", "1000", "-o", str(tmp_path / "r.json")],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # pytest may run without it
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "r.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"the rounds that are complete are in" in errors
    assert read_result(tmp_path / "r.json").contenders[0].rounds
    assert json.loads((tmp_path / "r.json").read_text())["schema"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--contender", "magic"], 1, "choose from: diffusers-eager"),
        (["--height", "100"], 1, "multiples of 64"),
        (["-o", "missing/folder/r.json"], 1, "no such folder"),
        (["--model", "nowhere/at-all"], 1, "nowhere/at-all"),
        (["--preset", "tiny", "--model", "x"], 2, "both name a model"),
        (["plot", "missing.json"], 1, "cannot read"),
        (["compare", "missing.json", "missing.json"], 1, "cannot read"),
    ],
)
def test_mistakes_are_refused_at_once(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    done = bench(*arguments, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_baseline_always_takes_part() -> None:
    assert [e.name for e in choose(["openvino"])] == ["diffusers-eager", "openvino"]
    assert choose([]) == list(CONTENDERS)
    with pytest.raises(ArgumentError, match="no contender"):
        choose(["diffusers"])


def subject(**more: Any) -> Any:
    asked: dict[str, Any] = dict.fromkeys(("frames", "height", "width", "steps", "decode_chunk_size"))
    return make_subject("random:mid", seed=0, precision="fp32", **asked | more)


def test_arithmetic_is_counted() -> None:
    """Twice the frames are twice the decoding, and a bit more than twice the step where frames attend to each other."""
    one, two = (with_flops(subject(frames=n)) for n in (4, 8))
    assert two.step_flops == pytest.approx(2.0925e11, rel=1e-3)
    assert two.decode_flops == pytest.approx(2 * one.decode_flops)
    assert np.isclose(two.step_flops, 2 * one.step_flops, rtol=0.02)
