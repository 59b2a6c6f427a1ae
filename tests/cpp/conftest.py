"""The C++ runtime, built once for all test processes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]


def build(name: str, sanitize: str = "") -> Path:
    """Bring ``build/cpp/NAME`` up to date with ``make cpp``; its folder."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", "--no-print-directory", "cpp", f"CPP_BUILD={name}", f"SANITIZE={sanitize}"]
    (ROOT / "build").mkdir(exist_ok=True)
    with FileLock(ROOT / "build" / "cpp.lock"):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return ROOT / "build" / "cpp" / name


@pytest.fixture(scope="session")
def cpp() -> Path:
    """The folder with the library, the examples and the tests."""
    return build("release")
