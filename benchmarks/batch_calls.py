"""Videos a second when a call makes one video, and when it makes several, measured in turns.

``python -m svd_trt.benchmarks.batch_calls BUNDLE -o benchmarks/results/batch-calls.json``
"""

from __future__ import annotations

import datetime as dt
import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from svd_trt.benchmarks.machine import describe_machine
from svd_trt.export.fidelity import draw_picture
from svd_trt.runtime.pipeline import VideoPipeline

__all__ = ["measure_batches"]


def measure_batches(bundle: Path, rounds: int, steps: int = 25) -> dict[str, Any]:
    """Time as many videos as the bundle makes together, in one call and in a call for each.

    ``videos_per_second`` are medians of ``rounds`` rounds; ``ratio`` is the median of each round's own, and
    ``processor_ratio`` that of the processors' time, which other load on the machine changes less; ``levels`` is the
    largest difference of a frame, of 255.
    """
    with VideoPipeline.open(bundle) as pipe:
        manifest = pipe.bundle.manifest
        most = manifest.ranges.batch.max
        size = (manifest.ranges.height.opt, manifest.ranges.width.opt)
        pictures = [draw_picture(*size).rotate(90 * number) for number in range(most)]
        seeds = list(range(most))
        options: Any = {"num_inference_steps": steps, "output_type": "np"}
        alone_s: list[tuple[float, float]] = []
        together_s: list[tuple[float, float]] = []
        levels = 0
        for _ in range(rounds + 1):  # the first one loads the networks
            clocks = [_clocks()]
            alone = [pipe(pictures[seed], seed=seed, **options).frames[0] for seed in seeds]
            clocks.append(_clocks())
            together = pipe(pictures, seed=seeds, **options)
            clocks.append(_clocks())
            alone_s.append((clocks[1][0] - clocks[0][0], clocks[1][1] - clocks[0][1]))
            together_s.append((clocks[2][0] - clocks[1][0], clocks[2][1] - clocks[1][1]))
            levels = max(levels, int(np.abs(np.stack(alone).astype(int) - together.frames).max()))
    pairs = list(zip(alone_s, together_s, strict=True))[1:]
    return {
        "date": dt.date.today().isoformat(),
        "machine": describe_machine(),
        "backend": together.backend,
        "precision": manifest.precision,
        "size": size,
        "frames": together.parameters.num_frames,
        "steps": together.parameters.num_inference_steps,
        "rounds": rounds,
        "videos_per_second": {
            "1": round(most / statistics.median(alone[0] for alone, _ in pairs), 4),
            str(most): round(most / statistics.median(both[0] for _, both in pairs), 4),
        },
        "ratio": round(statistics.median(alone[0] / both[0] for alone, both in pairs), 3),
        "processor_ratio": round(statistics.median(alone[1] / both[1] for alone, both in pairs), 3),
        "levels": levels,
    }


def _clocks() -> tuple[float, float]:
    """Seconds of the wall clock, and of this process on all processors."""
    return time.perf_counter(), time.process_time()


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True)
def _main(bundle: Path, output: Path, rounds: int) -> None:
    """Measure BUNDLE, which was built for several videos together."""
    output.write_text(json.dumps(measure_batches(bundle, rounds), indent=1) + "\n")


if __name__ == "__main__":
    _main()
