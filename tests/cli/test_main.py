"""The entry point: other names for it, and readers that go away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import ENVIRONMENT, start


@pytest.mark.parametrize("module", ["svd_trt", "svd_trt.cli"])
def test_the_package_is_the_command(module: str) -> None:
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("svd-trt, version ")


FAST = ("--num-inference-steps", "1", "--num-frames", "2")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("inspect", "BUNDLE"),
        ("inspect", "BUNDLE", "--json"),
        ("infer", "BUNDLE", "PICTURE", "-o", "-", "-q", *FAST),
        ("infer", "BUNDLE", "PICTURE", "-o", "OUT", "-q", "--json", *FAST),
    ],
    ids=lambda arguments: " ".join(arguments[:4]),
)
def test_a_reader_that_goes_away_ends_the_command_quietly(
    arguments: tuple[str, ...], small_bundle: Path, picture_file: Path, tmp_path: Path
) -> None:
    """As ``svd-trt inspect BUNDLE | head -1``; here it is gone from the start, so that the order is always the same."""
    paths = {"BUNDLE": str(small_bundle), "PICTURE": str(picture_file), "OUT": str(tmp_path / "o.npy")}
    read, write = os.pipe()
    os.close(read)
    process = start(*(paths.get(argument, argument) for argument in arguments), stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=120)
    assert err == ""
    assert process.returncode == 128 + 13
    assert (tmp_path / "o.npy").exists() == ("OUT" in arguments), "a video is kept if only its description was not read"


def test_head(small_bundle: Path) -> None:
    """In a real shell, which reports what each side of the pipe ended with."""
    command = f"{sys.executable} -m svd_trt inspect '{small_bundle}' | head -1; echo ${{PIPESTATUS[1]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, env=os.environ | ENVIRONMENT
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[1:] == ["0"]
