"""A signal that arrives in code whose exceptions Python ignores is not lost."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

LOST = """
import os, signal, sys, time
from svd_trt.cli.signals import end_by_exceptions
end_by_exceptions()
class Ended:
    def __del__(self):
        os.kill(os.getpid(), NUMBER)
        for _ in range(1000): pass
try:
    Ended()
    time.sleep(60)
    print("lost")
finally:
    print("tidy")
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, -signal.SIGINT)],  # Python ends by SIGINT itself
)
def test_a_signal_in_a_finalizer_ends_the_process(number: signal.Signals, code: int) -> None:
    source = LOST.replace("NUMBER", str(int(number)))
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (code, "tidy\n")
    assert "Exception ignored" not in done.stderr


def test_other_exceptions_of_finalizers_are_still_shown() -> None:
    source = LOST.replace("os.kill(os.getpid(), NUMBER)", "raise ValueError('a defect')").replace(
        "sleep(60)", "sleep(0)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (0, "lost\ntidy\n")
    assert "ValueError: a defect" in done.stderr


IMPORTED = """
import builtins, os, signal, sys
from svd_trt.cli.main import main
from svd_trt.engine import tensorrt_import
from svd_trt.errors import BackendError

def find(*_, **__):
    try:
        os.kill(os.getpid(), NUMBER)
        for _ in range(1000): pass
    except BaseException:
        raise BackendError("TensorRT for RTX is installed but does not load: initialization failed") from None

tensorrt_import.find_tensorrt = find
main(["build", "random:tiny", "-o", sys.argv[1], "--backend", "tensorrt-rtx"])
"""


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 143, ""), (signal.SIGHUP, 129, ""), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_that_an_import_turned_into_an_error(
    number: signal.Signals, code: int, said: str, tmp_path: Path
) -> None:
    """The bindings of TensorRT, written in C++, answer any exception in their initialisation with an ImportError."""
    source = IMPORTED.replace("NUMBER", str(int(number)))
    command = [sys.executable, "-c", source, tmp_path / "bundle"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == code, done.stderr
    assert "initialization failed" not in done.stderr
    assert said in done.stderr
