"""Running the real command, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """Start ``svd-trt`` with ``arguments``; output is captured as text unless ``options`` say otherwise."""
    command = [sys.executable, "-m", "svd_trt.cli", *map(str, arguments)]
    defaults: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"} | options.pop("env", {})
    return subprocess.Popen(command, env=environment, **(defaults | options))


@pytest.fixture
def run() -> Run:
    """``run("infer", ...)`` waits for the command and returns its exit code and output."""

    def call(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        process = start(*arguments, **options)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return call
