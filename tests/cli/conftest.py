"""Running the real command, in this process or in one of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from svd_trt.cli.main import main

Run = Callable[..., subprocess.CompletedProcess[str]]

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


class _Main(click.Command):
    """The entry point with its exit codes, which `CliRunner` would pass by if it ran the command group."""

    def main(self, args: Any = None, **_: Any) -> Any:
        main(args)


def invoke(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``svd-trt`` with ``arguments`` in this process; an unexpected exception is raised."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    hook = sys.unraisablehook
    try:
        found = CliRunner(env=ENVIRONMENT).invoke(_Main("svd-trt"), list(map(str, arguments)), catch_exceptions=False)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
    return subprocess.CompletedProcess(arguments, found.exit_code, found.stdout, found.stderr)


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """Start ``svd-trt`` with ``arguments``; output is captured as text unless ``options`` say otherwise."""
    command = [sys.executable, "-m", "svd_trt.cli", *map(str, arguments)]
    defaults: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | ENVIRONMENT | options.pop("env", {})
    return subprocess.Popen(command, env=environment, **(defaults | options))


@pytest.fixture
def run() -> Run:
    """``run("infer", ...)`` waits for the command and returns its exit code and output."""

    def call(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        process = start(*arguments, **options)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return call


def assert_refused(result: Any, *words: str, code: int = 1) -> None:
    """One line on standard error that has all ``words``, and the exit code."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert "Traceback" not in result.stderr
    if code == 1:
        assert len(lines) == 1, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
