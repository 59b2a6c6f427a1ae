"""NVTX ranges, as a tool sees them: a library that NVTX loads writes down what begins and ends in each thread."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("nvtx", reason="the extra profile is not installed")

GENERATE = """
import hashlib, sys
from svd_trt import VideoPipeline
sizes = {"num_inference_steps": 3, "num_frames": 5, "decode_chunk_size": 2}
with VideoPipeline.open(sys.argv[1], device="cpu") as pipe:
    frames = pipe(sys.argv[2], seed=1, output_type="np", **sizes).frames
print(hashlib.sha256(frames.tobytes()).hexdigest())
"""
WITHOUT_NVTX = "import sys; sys.modules['nvtx'] = None  # importing it fails\n"


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile the tool with")
    library = tmp_path_factory.mktemp("nvtx") / "listener.so"
    source = Path(__file__).with_name("nvtx_listener.cpp")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", source, "-o", library], check=True)
    return library


def generate(code: str, bundle: Path, picture: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, bundle, picture],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def ranges_by_thread(log: Path) -> list[list[str]]:
    """The ranges of each thread in the order in which they began, as ``outer/inner``. All of them have ended."""
    begun: dict[str, list[str]] = defaultdict(list)
    open_: dict[str, list[str]] = defaultdict(list)
    for line in log.read_text().splitlines():
        thread, sign, domain, name = line.split(" ", 3)
        assert domain == "svd-trt"
        if sign == "+":
            open_[thread].append(name)
            begun[thread].append("/".join(open_[thread]))
        else:
            open_[thread].pop()
    assert not any(open_.values())
    return sorted(begun.values())


def test_a_tool_sees_stages_steps_and_chunks_and_the_frames_stay_the_same(
    listener: Path, small_bundle: Path, picture_file: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    tool = {"NVTX_INJECTION64_PATH": str(listener), "NVTX_LOG": str(log)}
    traced = generate(GENERATE, small_bundle, picture_file, **tool)
    decode = ["decode", "decode/frames 0 to 1", "decode/frames 2 to 3", "decode/frames 4 to 4"]
    stages = ["encode", "denoise", "denoise/step 0", "denoise/step 1", "denoise/step 2"]
    assert ranges_by_thread(log) == [decode, stages]
    log.unlink()
    assert generate(WITHOUT_NVTX + GENERATE, small_bundle, picture_file, **tool) == traced
    assert not log.exists()
