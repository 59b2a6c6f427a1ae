"""Checkpoints and bundles that are built once for all test processes."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from filelock import FileLock

from svd_trt import BuildOptions, Bundle, VideoPipeline, build_bundle
from svd_trt.engine.spec import Range
from svd_trt.export.fidelity import draw_picture

# Two test processes share two cores, so idle threads that spin in one would slow the other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# With the developer's cache, builds that the tests check would be skipped.
os.environ.pop("SVD_TRT_CACHE", None)

# The backend that builds the engines of all bundles here; `make gpu-test BACKEND=tensorrt` sets another one.
BACKEND: Any = os.environ.get("SVD_TRT_TEST_BACKEND", "tensorrt-rtx")

_EVERYTHING = 1000  # with fewer tests, a run is a selection and may not need the bundles

TINY = Path(__file__).parent.parent / "examples" / "tiny"

DYNAMIC = BuildOptions(
    height=Range(40, 72, 136),
    width=Range(48, 96, 160),
    frames=Range(2, 4, 9),
    decode_chunk=Range(1, 4, 9),
    batch=Range(1, 1, 2),
    precision="fp32",
    backend=BACKEND,
)
FIXED = BuildOptions(
    height=Range.parse("72"),
    width=Range.parse("96"),
    frames=Range(2, 4, 6),
    decode_chunk=Range(1, 3, 6),
    precision="fp16",
    backend=BACKEND,
)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all test processes of this run share."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def once(shared: Path) -> Callable[[str, Callable[[Path], object]], Path]:
    """``once(name, make)``: the path ``name``. The first process that requests it calls ``make``."""

    def get(name: str, make: Callable[[Path], object]) -> Path:
        path = shared / name
        with FileLock(shared / f"{name}.once"):
            if not path.exists():
                make(path)
        return path

    return get


@pytest.fixture(scope="session")
def cache(shared: Path) -> Path:
    """The cache of networks and engines for all bundles. SVD_TRT_TEST_CACHE names one that later runs reuse."""
    return Path(os.environ.get("SVD_TRT_TEST_CACHE") or shared / "cache")


@pytest.fixture(scope="session")
def checkpoint(once: Any) -> Path:
    """A small SVD checkpoint with random weights, in diffusers format."""
    from svd_trt.export.random_checkpoint import write_random_checkpoint

    return once("checkpoint", write_random_checkpoint)


@pytest.fixture(scope="session")
def small_checkpoint(once: Any) -> Path:
    """A checkpoint whose networks export in seconds, for tests of the build and not of numbers."""
    from svd_trt.export.presets import PRESETS, Preset
    from svd_trt.export.random_checkpoint import write_random_checkpoint

    smallest = Preset(
        summary="for tests",
        parameters={},
        unet_channels=(32, 32),
        unet_heads=(2, 2),
        layers_per_block=1,
        vae_channels=(32, 32),
        vae_layers_per_block=1,
        embed_dim=32,
        clip_layers=1,
        clip_heads=2,
        clip_patch=32,
        clip_intermediate=32,
        clip_hidden=32,
        clip_activation="quick_gelu",
        addition_time_embed_dim=32,
        num_frames=3,
        sample_size=16,
    )

    def make(path: Path) -> None:
        PRESETS["smallest"] = smallest
        try:
            write_random_checkpoint(path, "smallest")
        finally:
            del PRESETS["smallest"]

    return once("small_checkpoint", make)


@pytest.fixture(scope="session")
def dynamic_bundle(once: Any, checkpoint: Path, cache: Path) -> Bundle:
    """An fp32 bundle with dynamic frames, chunks, sizes and batch."""
    return Bundle.open(once("dynamic", lambda path: build_bundle(checkpoint, path, replace(DYNAMIC, cache=cache))))


@pytest.fixture(scope="session")
def fixed_bundle(once: Any, checkpoint: Path, cache: Path) -> Bundle:
    """An fp16 bundle of one size with dynamic frames and chunks."""
    return Bundle.open(once("fixed", lambda path: build_bundle(checkpoint, path, replace(FIXED, cache=cache))))


@pytest.fixture(scope="session", autouse=True)
def _built_ahead(request: pytest.FixtureRequest, worker_id: str) -> None:
    """Build two bundles at once in a full run, in which both processes would need the dynamic bundle first."""
    if worker_id == "gw1" and len(request.session.items) > _EVERYTHING:
        request.getfixturevalue("fixed_bundle")


@pytest.fixture(scope="session")
def small_bundle(once: Any, small_checkpoint: Path, cache: Path) -> Path:
    """A bundle that builds quickly; tests copy and damage it."""
    options = BuildOptions(height=32, width=32, backend=BACKEND, cache=cache)
    return once("small", lambda path: build_bundle(small_checkpoint, path, options))


@pytest.fixture(scope="session")
def tiny_bundle(once: Any, cache: Path) -> Callable[[str], Bundle]:
    """``tiny_bundle(precision)``: the trained miniature of examples/tiny, 2 to 8 frames of 32x32."""

    def get(precision: Any) -> Bundle:
        options = BuildOptions(height=32, width=32, frames="2:8:8", precision=precision, backend=BACKEND, cache=cache)
        return Bundle.open(once(f"tiny-{precision}", lambda path: build_bundle(TINY / "checkpoint", path, options)))

    return get


@pytest.fixture(scope="session")
def dynamic_pipe(dynamic_bundle: Bundle) -> Iterator[VideoPipeline]:
    with VideoPipeline.open(dynamic_bundle) as pipe:
        yield pipe


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Any:
    """The pipeline of diffusers with the same checkpoint, in fp32 on the CPU."""
    import torch
    from diffusers import StableVideoDiffusionPipeline

    torch.set_num_threads(1)
    pipe = StableVideoDiffusionPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def picture() -> PIL.Image.Image:
    """Coloured blocks over a gradient: detail at several scales, 192x144."""
    return draw_picture(144, 192)


@pytest.fixture(scope="session")
def picture_file(shared: Path, picture: PIL.Image.Image, once: Any) -> Path:
    return once("picture.png", picture.save)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record",
        metavar="FILE",
        help="Write the figures of the tests as JSON. {gpu} is replaced by the name of the GPU.",
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print every figure that a test recorded, so that the log shows how close the numbers are."""
    rows = [
        (report.nodeid.split("::", 1)[1], name, value)
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
    ]
    if rows:
        terminalreporter.section("measured")
        for test, name, value in rows:
            with contextlib.suppress(TypeError, ValueError):
                value = f"{float(value):.3g}"
            terminalreporter.write_line(f"{name:>22} {value:>10}  {test}")
    if (record := terminalreporter.config.getoption("--record")) is not None:
        write_record(record, rows, terminalreporter.stats)


def write_record(name: str, rows: list[tuple[str, str, Any]], stats: dict[str, Any]) -> None:
    from svd_trt.benchmarks.machine import describe_machine

    machine = describe_machine()
    gpu = "-".join(machine["gpu"][0].partition(",")[0].lower().split()) if machine["gpu"] else "none"
    path = Path(name.format(gpu=gpu))
    outcomes = {name: len(stats.get(name, [])) for name in ("passed", "failed", "skipped")}
    measured = [{"test": test, "name": name, "value": value} for test, name, value in rows]
    content = {
        "date": dt.date.today().isoformat(),
        "machine": machine,
        "outcomes": outcomes,
        "failed": [report.nodeid for report in stats.get("failed", [])],
        "tests": sorted(report.nodeid for report in stats.get("passed", [])),
        "measured": measured,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
