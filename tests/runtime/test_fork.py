"""A process forked from one with an open pipeline says what is wrong, harms nothing, and may open its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PARENT = """
import gc, hashlib, os, sys, threading, time
from svd_trt import SvdTrtError, VideoPipeline

def digest(frames):
    return hashlib.sha256(b"".join(frame.tobytes() for frame in frames)).hexdigest()

FAST = {"num_inference_steps": 2, "num_frames": 4, "seed": 1, "decode_chunk_size": 1, "resize_mode": "stretch"}
bundle, picture = sys.argv[1:]
pipe = VideoPipeline.open(bundle, device="cpu")
expected = digest(pipe.stream(picture, **FAST))
stream = pipe.stream(picture, **FAST)
first = next(stream)
"""
REFUSED = """
def refuse(call):
    try:
        call()
    except SvdTrtError as error:
        print(f"refused: {error}", flush=True)
    else:
        os._exit(3)
"""
WAIT = """
def wait(child):
    _, status = os.waitpid(child, 0)
    assert status == 0, status
"""
CASES = {
    "between two frames": """
spare = VideoPipeline.open(bundle, device="cpu")
spare(picture, **FAST)
time.sleep(1)  # ONNX Runtime's threads have stopped spinning, so freeing a network would wait for them
child = os.fork()
if child == 0:
    del spare
    gc.collect()
    sys.exit(0)
wait(child)

child = os.fork()
if child == 0:
    for call in (lambda: pipe(picture, **FAST), lambda: next(stream), lambda: pipe.stream(picture, **FAST),
                 pipe.release, lambda: pipe.executor.load("denoiser"), lambda: pipe.plan(None)):
        refuse(call)
    pipe.cancel()
    stream.cancel()
    stream.close()
    pipe.close()
    del stream, pipe, call
    gc.collect()
    sys.exit(0)  # with all of the interpreter's clean-up
wait(child)

child = os.fork()
if child == 0:
    with VideoPipeline.open(bundle, device="cpu") as own:
        assert digest(own.stream(picture, **FAST)) == expected
    sys.exit(0)
wait(child)

import multiprocessing
process = multiprocessing.get_context("fork").Process(target=refuse, args=(lambda: pipe(picture, **FAST),))
process.start()
process.join()
assert process.exitcode == 0, process.exitcode
""",
    "while another thread makes a video": """
started = threading.Event()
endless = FAST | {"num_inference_steps": 1000}
def make():
    try:
        pipe(picture, progress=lambda stage, done, total: done and stage == "denoise" and started.set(), **endless)
    except SvdTrtError:
        print("cancelled", flush=True)
thread = threading.Thread(target=make)
thread.start()
started.wait()
child = os.fork()
if child == 0:
    refuse(lambda: pipe(picture, **FAST))
    stream.close()
    pipe.close()
    sys.exit(0)
wait(child)
pipe.executor._runs.discard(stream._cancellation)
pipe.cancel()
thread.join()
""",
}
END = """
assert digest([first, *stream]) == expected, "the parent's stream goes on"
print("parent done")
"""


@pytest.mark.parametrize(("case", "refusals"), [*zip(CASES, (7, 1), strict=True)])
def test_a_forked_process(case: str, refusals: int, small_bundle: Path, picture_file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARENT + REFUSED + WAIT + CASES[case] + END, small_bundle, picture_file],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.endswith("parent done\n")
    refused = [line for line in done.stdout.splitlines() if line.startswith("refused")]
    assert len(refused) == refusals
    for line in refused:
        assert "this pipeline was opened in process" in line
        assert "multiprocessing.get_context('spawn')" in line
