"""A signal that arrives in code whose exceptions Python ignores is not lost."""

from __future__ import annotations

import signal
import subprocess
import sys

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
