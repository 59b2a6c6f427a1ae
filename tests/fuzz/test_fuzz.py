"""Ten thousand damaged inputs: each is taken or refused in one line, within a minute and within 1 GB of memory."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.fuzz

COUNTS = {
    "manifests": 2000,
    "safetensors": 1500,
    "single files": 800,
    "pickles": 500,
    "configurations": 1000,
    "pictures": 2500,
    "kernel lists": 700,
    "results": 500,
    "videos": 500,
    "command lines": 1500,
}


@pytest.fixture(scope="session")
def seed() -> int:
    """The seed of all inputs; the variable SVD_TRT_TEST_SEED repeats a run."""
    return int(os.environ.get("SVD_TRT_TEST_SEED") or secrets.randbelow(1 << 32))


def test_there_are_ten_thousand() -> None:
    assert sum(COUNTS.values()) >= 10_000


@pytest.mark.parametrize("kind", COUNTS)
def test_damaged_inputs(
    kind: str, seed: int, small_bundle: Path, small_checkpoint: Path, tmp_path: Path, record_property: Any
) -> None:
    command = [sys.executable, "-m", "tests.fuzz.worker", kind, COUNTS[kind], seed, small_bundle, small_checkpoint]
    environment = os.environ | {"TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    last = (tmp_path / "last-input.txt").read_text() if done.returncode else ""
    assert done.returncode == 0, f"SVD_TRT_TEST_SEED={seed}\n{done.stdout[-3000:]}\n{done.stderr[-12000:]}\n{last}"
    tried, slowest = done.stdout.split()[-2:]
    record_property("seed", seed)
    record_property(f"inputs_{kind.replace(' ', '_')}", int(tried))
    record_property("slowest_s", float(slowest))
    assert int(tried) >= COUNTS[kind]
