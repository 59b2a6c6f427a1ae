"""Too little memory and closed streams are one line each; ``make test-faults`` has the whole of it."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from svd_trt.cli.main import cli
from svd_trt.errors import BackendError
from svd_trt.runtime.cpu_device import run_bound
from tests.cli.conftest import assert_refused, invoke


def fail_with(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "main", fail)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ImportError("libav.so.2: failed to map segment from shared object"),
        ImportError("Exception caught: std::bad_alloc"),
        RuntimeError("can't start new thread"),
    ],
)
def test_memory_that_runs_out_in_a_command(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, error)
    assert_refused(invoke("inspect", "bundle"), "memory ran out; close other programs, or raise the limit (ulimit -v)")


def test_files_that_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, OSError(errno.EMFILE, "Too many open files", "difflib.py"))
    assert_refused(
        invoke("inspect", "bundle"), "too many open files; close other programs, or raise the limit (ulimit -n)"
    )


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "x"), ImportError("No module named 'x'"), RuntimeError("a defect")]
)
def test_defects_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, error)
    with pytest.raises(type(error), match=re.escape(str(error))):
        invoke("inspect", "bundle")


def test_memory_that_runs_out_in_a_network() -> None:
    class Session:
        def run_with_iobinding(self, *_: Any) -> None:
            raise RuntimeError("Error in execution: std::bad_alloc")

    with pytest.raises(BackendError, match="failed in denoiser: memory ran out; close other programs, or raise"):
        run_bound(Session(), None, None, "denoiser")


@pytest.mark.parametrize(("closed", "code"), [(">&-", 1), ("2>&- <&-", 0)])
def test_streams_that_are_closed(closed: str, code: int, small_bundle: Path, tmp_path: Path) -> None:
    """A result that cannot be printed is a failure; no file gets the number of a closed stream."""
    command = f"{sys.executable} -m svd_trt.cli inspect {small_bundle} --json {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    said = "svd-trt: cannot write to standard output: Bad file descriptor\n" if code else ""
    assert (done.returncode, done.stderr) == (code, said)
