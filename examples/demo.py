"""From a checkpoint to a video with the two commands, then the video is read back and checked.

``make demo`` runs this. The checkpoint has random weights (the real ones are licensed), so the video is noise; what
is shown is that every part of the way works on this machine, GPU or not.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np

HERE = Path(__file__).parent
OUT = HERE.parent / "demo"
FRAMES, HEIGHT, WIDTH, FPS = 14, 144, 256, 7


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
    """Read the file back: its frames, their size and their rate."""
    frames = iio.imread(video, plugin="pyav")
    meta = iio.immeta(video, plugin="pyav")
    expected = (FRAMES, HEIGHT, WIDTH, 3)
    if frames.shape != expected or round(meta["fps"]) != FPS or meta["codec"] != "h264":
        sys.exit(f"{video}: read back {frames.shape} at {meta['fps']} fps in {meta['codec']}, not {expected} at {FPS}")
    print(f"\nread back {video}: {len(frames)} frames of {WIDTH}x{HEIGHT} at {meta['fps']:g} fps, {meta['codec']}")
    print(f"mean change from frame to frame: {np.abs(np.diff(frames.astype(float), axis=0)).mean():.1f} of 255")


def main() -> None:
    """Make the checkpoint, build, infer, check."""
    started = time.perf_counter()
    OUT.mkdir(exist_ok=True)
    checkpoint, bundle, video = OUT / "checkpoint", OUT / "bundle", OUT / "video.mp4"
    if not checkpoint.exists():
        svd_trt("random-checkpoint", checkpoint)
    size = ("--height", str(HEIGHT), "--width", str(WIDTH))
    built = svd_trt("build", checkpoint, "-o", bundle, *size, "--json")
    made = svd_trt("infer", bundle, HERE / "picture.png", "-o", video, "--fps", str(FPS), "--seed", "42", "--json")
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
