"""Cancelling from a signal handler, which may interrupt a call that cancels."""

from __future__ import annotations

import subprocess
import sys

_SCRIPT = """
import signal, time
from svd_trt.errors import CancelledError
from svd_trt.runtime.cancellation import Cancellation

current = Cancellation()
signal.signal(signal.SIGALRM, lambda *_: current.cancel(CancelledError("by a signal")))
signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)
end = time.monotonic() + 2
while time.monotonic() < end:
    current = Cancellation()
    current.cancel(CancelledError("by a call"))
    assert current.event.is_set()
signal.setitimer(signal.ITIMER_REAL, 0)
print("done")
"""


def test_a_signal_handler_may_cancel_while_its_own_thread_cancels() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "done\n"
