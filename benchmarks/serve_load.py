"""What serving costs beside `VideoPipeline`: ``python -m svd_trt.benchmarks.serve_load BUNDLE PICTURE -o RESULT.json``.

Rounds are interleaved: each makes one video with the pipeline, one with the pipeline and the files that the server
writes, and one by a request, each in the process that made those of the rounds before. A picture is drawn beside the
result.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import httpx
import matplotlib as mpl
import psutil
from matplotlib.figure import Figure

from svd_trt.benchmarks.machine import describe_machine
from svd_trt.errors import BenchmarkError
from svd_trt.runtime.pipeline import VideoPipeline
from svd_trt.runtime.video import BackgroundWriter, VideoWriter, open_writer

__all__ = ["measure_serving"]

_WORKLOADS: Mapping[str, Mapping[str, Any]] = {
    "2 frames, 1 step": {"num_frames": 2, "num_inference_steps": 1},
    "8 frames, 25 steps": {"num_frames": 8, "num_inference_steps": 25},
}
_WAYS = ("pipeline", "pipeline and files", "request")
_COLOURS = ("#9A9A9A", "#56B4E9", "#0072B2")  # Okabe and Ito's
_STARTS = 5
_ADDRESS = re.compile(r" at (http://[^;\s]+)")


def measure_serving(bundle: Path, picture: Path, rounds: int) -> dict[str, Any]:
    """Measure everything; seconds and bytes as plain data.

    Raises:
        BenchmarkError: the server did not start, or a video failed.
    """
    starts = []
    for _ in range(_STARTS):
        with _server(bundle) as (client, process, seconds):
            starts.append(seconds)
            idle = psutil.Process(process.pid).memory_info().rss
    with (
        VideoPipeline.open(bundle) as pipe,
        _server(bundle) as (client, process, _),
        tempfile.TemporaryDirectory() as name,
    ):
        opened = psutil.Process().memory_info().rss
        seconds_of: dict[str, dict[str, list[float]]] = {}
        for workload, arguments in _WORKLOADS.items():
            ways: dict[str, list[float]] = {way: [] for way in _WAYS}
            for number in range(rounds + 1):
                given = {**arguments, "seed": number}
                times = [_alone(pipe, picture, given), _filed(pipe, picture, given, Path(name))]
                times.append(_requested(client, picture, given))
                for way, seconds in zip(_WAYS, times, strict=True):
                    if number:  # the first round loads the networks
                        ways[way].append(seconds)
            seconds_of[workload] = ways
        memory = {
            "server, opened": idle,
            "server, after the videos": psutil.Process(process.pid).memory_info().rss,
            "this process, pipeline opened": opened,
            "this process, after the videos": psutil.Process().memory_info().rss,
        }
    overheads = {
        workload: {way: statistics.median(_differences(ways, way)) for way in _WAYS[1:]}
        for workload, ways in seconds_of.items()
    }
    return {
        "date": dt.date.today().isoformat(),
        "machine": describe_machine(),
        "rounds": rounds,
        "start_to_ready_s": starts,
        "seconds": seconds_of,
        "overhead_s": overheads,
        "memory_bytes": memory,
    }


def _differences(ways: Mapping[str, Sequence[float]], way: str) -> list[float]:
    """Seconds more than the pipeline alone, round by round."""
    return [more - alone for more, alone in zip(ways[way], ways["pipeline"], strict=True)]


def _alone(pipe: VideoPipeline, picture: Path, arguments: Mapping[str, Any]) -> float:
    began = time.perf_counter()
    for _ in pipe.stream(picture, **arguments):
        pass
    return time.perf_counter() - began


def _filed(pipe: VideoPipeline, picture: Path, arguments: Mapping[str, Any], folder: Path) -> float:
    began = time.perf_counter()
    stream = pipe.stream(picture, **arguments)
    settings, metadata = stream.parameters, stream.metadata

    def opened(suffix: str) -> VideoWriter:
        size = (settings.height, settings.width)
        return open_writer(folder / f"v{suffix}", height=size[0], width=size[1], fps=settings.fps, metadata=metadata)

    with ExitStack() as stack:
        writers = [stack.enter_context(BackgroundWriter(opened(suffix))) for suffix in (".mkv", ".mp4")]
        for frame in stream:
            for writer in writers:
                writer.write(frame[None])
    return time.perf_counter() - began


def _requested(client: httpx.Client, picture: Path, arguments: Mapping[str, Any]) -> float:
    """From the first byte of a request to the last of its video, by a client that waits for the events."""
    began = time.perf_counter()
    with picture.open("rb") as file:
        fields = {key: str(value) for key, value in arguments.items()}
        job = client.post("/v1/videos", files={"image": file}, data=fields).raise_for_status().json()
    with client.stream("GET", f"/v1/videos/{job['id']}/events") as events:
        last = events.read().decode().split("\nevent: ")[-1]
    ended = json.loads(last.partition("data: ")[2])
    if ended["status"] != "completed":
        raise BenchmarkError(f"a video of the server is {ended['status']}: {ended['error']}")
    client.get(f"/v1/videos/{job['id']}/content").raise_for_status()
    return time.perf_counter() - began


@contextmanager
def _server(bundle: Path) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes], float]]:
    """A server, a client of it, and the seconds from its start to its first answer of ``/readyz``."""
    with tempfile.TemporaryDirectory() as data:
        command = [sys.executable, "-m", "svd_trt.cli", "serve", str(bundle), "--port", "0", "--data", f"{data}/jobs"]
        log = Path(data) / "log"
        began = time.perf_counter()
        with log.open("wb") as said:
            process = subprocess.Popen(command, stderr=said)  # noqa: S603  (our own command)
        try:
            while not (found := _ADDRESS.search(log.read_text())):
                if process.poll() is not None:
                    raise BenchmarkError(f"the server did not start: {log.read_text()}")
                time.sleep(0.01)
            with httpx.Client(base_url=found[1], timeout=600) as client:
                client.get("/readyz").raise_for_status()
                yield client, process, time.perf_counter() - began
        finally:
            process.terminate()
            process.wait()


def _draw(result: Mapping[str, Any], path: Path) -> None:
    mpl.use("Agg")
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (workload, ways) in zip(figure.subplots(1, len(_WORKLOADS)), result["seconds"].items(), strict=True):
        for place, (way, colour) in enumerate(zip(_WAYS, _COLOURS, strict=True)):
            times = [1000 * seconds for seconds in ways[way]]
            axes.barh(place, statistics.median(times), color=colour)
            axes.plot(times, [place] * len(times), "k|", alpha=0.5)
        axes.set_yticks(range(len(_WAYS)), _WAYS)
        axes.invert_yaxis()
        axes.set_title(workload, loc="left", fontsize=10)
        axes.set_xlabel("ms a video: median and all rounds", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("picture", type=click.Path(path_type=Path))
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(1))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
def _main(bundle: Path, picture: Path, rounds: int, output: Path) -> None:
    result = measure_serving(bundle, picture, rounds)
    output.write_text(json.dumps(result, indent=1) + "\n")
    _draw(result, output.with_suffix(".png"))


if __name__ == "__main__":
    _main()
