"""Make a video from a checkpoint with ``svd-trt build`` and ``svd-trt infer``, and check the video.

``make demo`` runs this. The checkpoint is the miniature of ``examples/tiny``, because the real weights need a licence.
It was trained on rockets that fly in the direction of their nose. The picture shows a rocket that was not in training.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import imageio.v3 as iio

ROOT = Path(__file__).parent.parent
CHECKPOINT = Path("examples/tiny/checkpoint")
PICTURE = Path("examples/tiny/picture.png")
OUT = Path("demo")
FRAMES, SIDE, FPS = 8, 32, 7


def svd_trt(*arguments: str | Path) -> dict[str, Any]:
    """Print and run one command. Returns the JSON that it prints; exits with its status if it fails."""
    words = ["svd-trt", *map(str, arguments)]
    print(f"\n$ {shlex.join(words)}", flush=True)
    command = [sys.executable, "-m", "svd_trt.cli", *words[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout) if done.stdout else {}


def check(video: Path) -> None:
    """Read the video. Check its frames, rate and codec, and that the rocket flies in the direction of its nose."""
    frames = iio.imread(video, plugin="pyav")
    meta = iio.immeta(video, plugin="pyav")
    expected = (FRAMES, SIDE, SIDE, 3)
    if frames.shape != expected or round(meta["fps"]) != FPS or meta["codec"] != "h264":
        sys.exit(f"{video} has {frames.shape} at {meta['fps']} fps in {meta['codec']}, not {expected} at {FPS} in h264")
    print(f"\n{video} has {len(frames)} frames of {SIDE}x{SIDE} at {meta['fps']:g} fps, {meta['codec']}")
    bright = frames.max(-1) > 110  # the sky is darker than the rocket
    columns = [float(frame.nonzero()[1].mean()) for frame in bright]
    print(f"the rocket points to the right, and its centre moves from column {columns[0]:.1f} to {columns[-1]:.1f}")
    if columns[-1] - columns[0] < 4:
        sys.exit("the rocket hardly moved")


def main() -> None:
    """Build a bundle, make two videos, check one, and print the seconds of each stage."""
    os.chdir(ROOT)  # so that the printed commands have short paths
    started = time.perf_counter()
    OUT.mkdir(exist_ok=True)
    bundle, video = OUT / "bundle", OUT / "rocket.mp4"
    built = svd_trt("build", CHECKPOINT, "-o", bundle, "--height", str(SIDE), "--width", str(SIDE), "--json")
    options = ["--motion-bucket-id", "200", "--fps", str(FPS), "--seed", "42"]
    made = svd_trt("infer", bundle, PICTURE, "-o", video, *options, "--json")
    svd_trt("infer", bundle, PICTURE, "-o", OUT / "rocket.gif", *options, "-q")
    check(video)
    print("\nstage                              seconds")
    for stage in built["stages"]:
        note = " (reused)" if stage["reused"] else ""
        print(f"build  {stage['network']:<14} {stage['kind']:<12} {stage['seconds']:8.2f}{note}")
    for name, value in made["timings_s"].items():
        if not isinstance(value, list):
            print(f"infer  {name:<27} {value:8.2f}")
    print(f"total                              {time.perf_counter() - started:8.2f}")


if __name__ == "__main__":
    main()
