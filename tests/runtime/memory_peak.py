"""How much more memory some code needs, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys

_MEASURE = """
import sys

def resident(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

setup, code = sys.argv[1:]
exec(setup)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # sets the peak to what is resident now; without it, what setup needed would hide the rest
before = resident("VmRSS:")
exec(code)
print(resident("VmHWM:") - before)
"""


def peak_of(setup: str, code: str) -> int:
    """Bytes by which the peak of ``code`` is above what is resident after ``setup``.

    The process is new, so that it has no memory that was freed before and would be used again. ``ru_maxrss`` is no
    measure: it never goes down, and a child begins with its parent's.
    """
    measured = subprocess.run([sys.executable, "-c", _MEASURE, setup, code], capture_output=True, text=True, check=True)
    return int(measured.stdout.splitlines()[-1])
