"""The runtime with the lowest versions of its dependencies that pyproject.toml allows, in an environment of its own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from packaging.requirements import Requirement
from packaging.version import Version

from svd_trt import VideoPipeline
from svd_trt.runtime.video import FORMATS, STREAMS
from tests.runtime.test_linked_bundle import link_as_a_hub_cache

ROOT = Path(__file__).parent.parent.parent
CONSTRAINTS = Path(__file__).with_name("constraints.txt")
FAST = ("--num-inference-steps", "2", "--num-frames", "3", "--seed", "7")


def lowest() -> dict[str, Version]:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    return {name: Version(version) for name, version in (line.split("==") for line in lines)}


def test_the_versions_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {}
    for requirement in map(Requirement, project["dependencies"]):
        (bound,) = [one.version for one in requirement.specifier if one.operator == ">="]
        bounds[requirement.name] = Version(bound)
    assert lowest() == bounds


@pytest.fixture(scope="module")
def python(pytestconfig: pytest.Config) -> Path:
    """The interpreter of an environment that has the runtime's dependencies and nothing else; kept for the next run."""
    key = hashlib.sha256(CONSTRAINTS.read_bytes() + sys.version.encode()).hexdigest()[:16]
    folder = pytestconfig.cache.mkdir("lowest") / key
    found = folder / "bin" / "python"
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            venv.create(folder, with_pip=True, clear=True)
            pins = [f"{name}=={version}" for name, version in lowest().items()]
            environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_CONSTRAINT")}
            subprocess.run([found, "-m", "pip", "install", "-q", *pins], check=True, env=environment)
            (folder / "complete").touch()
    return found


def infer(python: Path, bundle: Path, picture: Path, out: Path | str, *options: str) -> Any:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "error"}
    command = [python, "-m", "svd_trt", "infer", bundle, picture, "-o", out, *FAST, *options]
    return subprocess.run(command, env=environment, capture_output=True, check=False)


@pytest.mark.slow
def test_frames_are_those_of_the_tested_versions_in_and_outside_a_cache_of_links(
    python: Path, small_bundle: Path, picture_file: Path, tmp_path: Path
) -> None:
    with VideoPipeline.open(small_bundle) as pipe:
        theirs = pipe(picture_file, num_inference_steps=2, num_frames=3, seed=7, output_type="np").frames[0]
    assert theirs.std() > 5, "flat frames would match any others"
    linked = link_as_a_hub_cache(small_bundle, tmp_path / "cache")
    for name, bundle in {"bundle": small_bundle, "linked": linked}.items():
        out = tmp_path / f"{name}.npy"
        done = infer(python, bundle, picture_file, out, "--json")
        assert (done.returncode, b"Warning" in done.stderr) == (0, False), done.stderr
        assert np.abs(np.load(out).astype(int) - theirs).max() <= 2


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_is_written(
    suffix: str, python: Path, small_bundle: Path, picture_file: Path, tmp_path: Path
) -> None:
    """Standard output in each of its formats, too."""
    if suffix == "-":
        for stream in STREAMS:
            done = infer(python, small_bundle, picture_file, "-", "--format", stream)
            assert done.returncode == 0, done.stderr
            assert len(done.stdout) > 1000
        return
    out = tmp_path / ("frames" if suffix == "/" else f"video{suffix}")
    done = infer(python, small_bundle, picture_file, out)
    assert done.returncode == 0, done.stderr
    assert out.exists()
