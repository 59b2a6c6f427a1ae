"""From a checkpoint to a video with the two commands, then the video is read back and checked.

``make demo`` runs this. The checkpoint is the miniature of ``examples/tiny`` (the real weights are licensed): it was
trained on rockets that fly where their nose points. The picture is of one that it never saw.
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
    """Show and run one command; what it prints as JSON."""
    words = ["svd-trt", *map(str, arguments)]
    print(f"\n$ {shlex.join(words)}", flush=True)
    command = [sys.executable, "-m", "svd_trt.cli", *words[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout) if done.stdout else {}


def check(video: Path) -> None:
    """Read the file back: its frames, their size, their rate, and whether the rocket flies the way it points."""
    frames = iio.imread(video, plugin="pyav")
    meta = iio.immeta(video, plugin="pyav")
    expected = (FRAMES, SIDE, SIDE, 3)
    if frames.shape != expected or round(meta["fps"]) != FPS or meta["codec"] != "h264":
        sys.exit(f"{video}: read back {frames.shape} at {meta['fps']} fps in {meta['codec']}, not {expected} at {FPS}")
    print(f"\nread back {video}: {len(frames)} frames of {SIDE}x{SIDE} at {meta['fps']:g} fps, {meta['codec']}")
    bright = frames.max(-1) > 110  # the sky is darker than the rocket
    columns = [float(frame.nonzero()[1].mean()) for frame in bright]
    print(f"the rocket points right, and its middle goes from column {columns[0]:.1f} to {columns[-1]:.1f}")
    if columns[-1] - columns[0] < 4:
        sys.exit("the rocket hardly moved")


def main() -> None:
    """Build, infer, check, and say how long each stage took."""
    os.chdir(ROOT)  # so that the commands can be shown, and typed, with short paths
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
    print(f"all of it                          {time.perf_counter() - started:8.2f}")


if __name__ == "__main__":
    main()
