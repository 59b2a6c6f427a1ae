"""A child process for the tests: repeats what it is sent, and does what a few words ask for."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from svd_trt.engine.child_process import connect_to_parent


def main() -> None:
    requests, answer = connect_to_parent()
    for line in requests:
        if line == b"sleep":
            time.sleep(600)
        elif line == b"fail":
            sys.stderr.write("first words\nlast words\n")
            sys.exit(3)
        elif line == b"start another":
            answer(str(subprocess.Popen(["sleep", "600"]).pid).encode())
        elif line == b"variable":
            answer(os.environ.get("SVD_TRT_TEST_VARIABLE", "").encode())
        else:
            sys.stdout.write("noise that a library prints\n")
            answer(line)


if __name__ == "__main__":
    main()
