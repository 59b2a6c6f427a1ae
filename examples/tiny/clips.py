"""Writes true clips of held-out scenes to a file of numpy, for `svd-trt bench quality --clips`.

    python examples/tiny/clips.py --clips 50 -o clips.npz

Clip i is of the i-th held-out seed. The file has `frames`, uint8 [N,8,32,32,3], and `fps` and `motion_bucket_id`, [N].
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import world

NUM_FRAMES = 8
SIZE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=50)
    parser.add_argument("-o", "--output", type=Path, default=Path("clips.npz"))
    options = parser.parse_args()
    scenes = [world.make_scene(seed, NUM_FRAMES) for seed in world.held_out_seeds(options.clips)]
    np.savez_compressed(
        options.output,
        frames=np.stack([world.draw_clip(scene, NUM_FRAMES, SIZE, SIZE) for scene in scenes]),
        fps=np.array([scene.fps for scene in scenes]),
        motion_bucket_id=np.array([scene.motion_bucket_id for scene in scenes]),
    )


if __name__ == "__main__":
    main()
