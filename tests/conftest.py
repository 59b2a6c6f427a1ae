"""Checkpoints and bundles that are built once for all test processes."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import PIL.Image
import pytest
from filelock import FileLock, Timeout

from svd_trt import BuildOptions, Bundle, VideoPipeline, build_bundle
from svd_trt.engine.spec import Range
from svd_trt.export.fidelity import draw_picture

# Two test processes share two cores, so idle threads that spin in one would slow the other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# With the developer's cache, builds that the tests check would be skipped.
os.environ.pop("SVD_TRT_CACHE", None)

# The backend that builds the engines of all bundles here; `make gpu-test BACKEND=tensorrt` sets another one.
BACKEND: Any = os.environ.get("SVD_TRT_TEST_BACKEND", "tensorrt-rtx")

TINY = Path(__file__).parent.parent / "examples" / "tiny"

DYNAMIC = BuildOptions(
    height=Range(40, 72, 136),
    width=Range(48, 96, 160),
    frames=Range(2, 4, 9),
    decode_chunk=Range(1, 4, 9),
    batch=Range(1, 1, 2),
    ff_chunks=1,  # fewer nodes, which export faster; the small bundle has the default
    precision="fp32",
    backend=BACKEND,
)
SMALL = BuildOptions(height=32, width=32, frames="2:3:6", decode_chunk="1:3:6", backend=BACKEND)

Once: TypeAlias = Callable[[str, Callable[[Path], object]], Path]

# Tests that use one of these fixtures export networks and build engines.
_BUNDLES = {"dynamic_bundle", "tiny_bundle", "shallow_bundle", "small_bundle", "cache"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need networks or engines, which `make test-fast` leaves out, and run them last.

    Of two test processes the first begins with the tests that need no bundle, while the second builds the dynamic one.
    """

    def rank(item: pytest.Item) -> int:
        fixtures = set(getattr(item, "fixturenames", ()))
        return 2 if "dynamic_bundle" in fixtures else bool(_BUNDLES & fixtures)

    for item in items:
        if rank(item):
            item.add_marker(pytest.mark.bundles)
    items.sort(key=rank)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all test processes of this run share."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def once(shared: Path) -> Once:
    """``once(name, make)``: the path ``name``. The first process that requests it calls ``make``."""

    def get(name: str, make: Callable[[Path], object]) -> Path:
        path = shared / name
        with FileLock(shared / f"{name}.once"):
            if not path.exists():
                make(path)
        return path

    return get


@pytest.fixture(scope="session")
def cache(pytestconfig: pytest.Config) -> Path:
    """Networks and engines of earlier runs; ``pytest --cache-clear`` removes them."""
    return pytestconfig.cache.mkdir("networks")


def write_checkpoint(path: Path, unet: tuple[int, ...], vae: tuple[int, ...], frames: int, seed: int = 0) -> None:
    """Write a random checkpoint with the channels of each level of the UNet and of the VAE, one layer a level."""
    from svd_trt.export.presets import PRESETS
    from svd_trt.export.random_checkpoint import write_random_checkpoint

    changes: dict[str, Any] = {
        "parameters": {},
        "unet_channels": unet,
        "unet_heads": tuple(channels // 16 for channels in unet),
        "vae_channels": vae,
        "num_frames": frames,
    }
    PRESETS["for tests"] = replace(PRESETS["tiny"], **changes)
    try:
        write_random_checkpoint(path, "for tests", seed)
    finally:
        del PRESETS["for tests"]


@pytest.fixture(scope="session")
def checkpoint(once: Once) -> Path:
    """A checkpoint with random weights. Its UNet has two levels, and its VAE four, as published."""
    return once("checkpoint", lambda path: write_checkpoint(path, (32, 64), (32,) * 4, 14))


@pytest.fixture(scope="session")
def other_checkpoint(once: Once) -> Path:
    """The same architecture as ``checkpoint`` with other weights."""
    return once("other_checkpoint", lambda path: write_checkpoint(path, (32, 64), (32,) * 4, 14, seed=7))


@pytest.fixture(scope="session")
def small_checkpoint(once: Once) -> Path:
    """A checkpoint whose networks export fastest, for tests of the build and not of numbers."""
    return once("small_checkpoint", lambda path: write_checkpoint(path, (32, 32), (32, 32), 3))


@pytest.fixture(scope="session")
def tiny_checkpoint(once: Once) -> Path:
    """The preset ``tiny`` in files. Its UNet has three levels."""
    from svd_trt.export.random_checkpoint import write_random_checkpoint

    return once("tiny_checkpoint", write_random_checkpoint)


def build_dynamic(once: Once, cache: Path, checkpoint: Path) -> Path:
    """Build an fp32 bundle of ``checkpoint`` with dynamic frames, chunks, sizes and batch."""
    return once("dynamic", lambda path: build_bundle(checkpoint, path, replace(DYNAMIC, cache=cache)))


def build_tiny(once: Once, cache: Path, precision: Any, backend: Any = "onnxruntime") -> Path:
    """Build the trained miniature of examples/tiny: 2 to 8 frames of 32x32."""
    options = BuildOptions(height=32, width=32, frames="2:8:8", precision=precision, backend=backend, cache=cache)
    return once(f"tiny-{precision}-{backend}", lambda path: build_bundle(TINY / "checkpoint", path, options))


def build_shallow(once: Once, cache: Path, small_checkpoint: Path) -> Path:
    """Build the small bundle with shallow steps; all but its denoisers are those of `build_small`."""
    options = replace(SMALL, shallow_steps=True, cache=cache)
    return once("shallow", lambda path: build_bundle(small_checkpoint, path, options))


def build_small(once: Once, cache: Path, small_checkpoint: Path) -> Path:
    """Build the bundle that builds fastest: fp16, one size, dynamic frames and chunks."""
    return once("small", lambda path: build_bundle(small_checkpoint, path, replace(SMALL, cache=cache)))


@pytest.fixture(scope="session")
def dynamic_bundle(once: Once, cache: Path, checkpoint: Path) -> Bundle:
    """An fp32 bundle with dynamic frames, chunks, sizes and batch. Its networks have all kinds of layers of SVD."""
    return Bundle.open(build_dynamic(once, cache, checkpoint))


@pytest.fixture(scope="session")
def tiny_bundle(once: Once, cache: Path) -> Bundle:
    """The trained miniature in fp16, for a CPU: 2 to 8 frames of 32x32. It has all kinds of layers of SVD."""
    return Bundle.open(build_tiny(once, cache, "fp16"))


@pytest.fixture(scope="session")
def shallow_bundle(once: Once, cache: Path, small_checkpoint: Path) -> Bundle:
    """The small bundle with a shallow denoiser: fp16, 2 to 6 frames of 32x32."""
    return Bundle.open(build_shallow(once, cache, small_checkpoint))


@pytest.fixture(scope="session")
def small_bundle(once: Once, cache: Path, small_checkpoint: Path) -> Path:
    """The bundle that builds fastest: fp16, 2 to 6 frames of 32x32. Tests copy and damage it."""
    return build_small(once, cache, small_checkpoint)


@pytest.fixture(scope="session", autouse=True)
def _built_in_parallel(request: pytest.FixtureRequest, worker_id: str) -> None:
    """Build the bundles that the tests will use, each in one process, before one process has to wait for the other."""
    if worker_id == "master":
        return
    used = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    shared, cache = request.getfixturevalue("shared"), request.getfixturevalue("cache")

    def once(name: str, make: Callable[[Path], object]) -> Path:
        """Skip what the other process is building."""
        with contextlib.suppress(Timeout), FileLock(shared / f"{name}.once", timeout=0):
            if not (shared / name).exists():
                make(shared / name)
        return shared / name

    builds = {
        "dynamic_bundle": lambda: build_dynamic(once, cache, request.getfixturevalue("checkpoint")),
        "tiny_bundle": lambda: build_tiny(once, cache, "fp16"),
        "shallow_bundle": lambda: build_shallow(once, cache, request.getfixturevalue("small_checkpoint")),
        "small_bundle": lambda: build_small(once, cache, request.getfixturevalue("small_checkpoint")),
    }
    # The first process starts with the last one, which is done first, because its tests come first.
    for name in reversed(builds) if worker_id == "gw0" else builds:
        if name in used:
            builds[name]()


@pytest.fixture(scope="session")
def dynamic_pipe(dynamic_bundle: Bundle) -> Iterator[VideoPipeline]:
    with VideoPipeline.open(dynamic_bundle) as pipe:
        yield pipe


def load_diffusers(checkpoint: Path, **options: Any) -> Any:
    """Load the pipeline of diffusers on the CPU, without progress bars, by diffusers' own code."""
    import torch
    from diffusers import StableVideoDiffusionPipeline

    torch.set_num_threads(1)
    pipe = StableVideoDiffusionPipeline.from_pretrained(checkpoint, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Any:
    """The pipeline of diffusers with the same checkpoint, in fp32."""
    return load_diffusers(checkpoint)


@pytest.fixture(scope="session")
def small_reference(small_checkpoint: Path) -> Any:
    """The pipeline of diffusers with the small checkpoint, in fp32."""
    return load_diffusers(small_checkpoint)


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
