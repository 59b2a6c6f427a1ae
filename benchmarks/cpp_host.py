"""Start to first frame and memory of the C++ runtime and of Python, measured in turns by reading their standard output.

``python -m svd_trt.benchmarks.cpp_host BUNDLE SVD_TRT_CLI -o benchmarks/results/cpp-host.json``
"""

from __future__ import annotations

import datetime as dt
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import PIL.Image

from svd_trt.benchmarks.machine import describe_machine
from svd_trt.engine.bundle import Bundle

__all__ = ["measure_hosts"]

_STEPS = 5


def measure_hosts(bundle: Path, program: Path, rounds: int) -> dict[str, Any]:
    """Medians of ``rounds`` rounds for each host: seconds to the first frame, to the end, of processors; peak bytes."""
    manifest = Bundle.open(bundle, verify=False).manifest
    height, width = manifest.ranges.height.opt, manifest.ranges.width.opt
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, "picture.ppm")
        PIL.Image.linear_gradient("L").convert("RGB").save(picture)
        arguments = [str(bundle), str(picture), "-o", "-", "--format", "raw", "--quiet"]
        arguments += ["--num-inference-steps", str(_STEPS), "--seed", "42"]
        hosts = {"C++": [str(program)], "Python": [sys.executable, "-m", "svd_trt.cli", "infer"]}
        runs: dict[str, list[tuple[float, float, float, int]]] = {name: [] for name in hosts}
        for _ in range(rounds + 1):  # the first one fills the system's file cache
            for name, command in hosts.items():
                runs[name].append(_run([*command, *arguments], height * width * 3))
    names = ("first_frame_s", "total_s", "processor_s", "peak_bytes")
    measured = {
        name: {key: statistics.median(column) for key, column in zip(names, zip(*rows[1:], strict=True), strict=True)}
        for name, rows in runs.items()
    }
    return {
        "date": dt.date.today().isoformat(),
        "machine": describe_machine(),
        "size": [height, width],
        "steps": _STEPS,
        "precision": manifest.precision,
        "rounds": rounds,
        "hosts": measured,
    }


def _run(command: list[str], frame_bytes: int) -> tuple[float, float, float, int]:
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: S603
    assert process.stdout is not None
    got = 0
    first = 0.0
    while data := os.read(process.stdout.fileno(), 1 << 16):
        got += len(data)
        if not first and got >= frame_bytes:
            first = time.perf_counter() - started
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if process.returncode != 0:
        raise click.ClickException(f"{command[0]} failed")
    # Other load on the machine delays the frames, but adds little to the processors' time.
    return first, time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("program", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
def _main(bundle: Path, program: Path, output: Path, rounds: int) -> None:
    """Measure PROGRAM, which is svd_trt_cli, and Python with BUNDLE."""
    output.write_text(json.dumps(measure_hosts(bundle, program, rounds), indent=1) + "\n")


if __name__ == "__main__":
    _main()
