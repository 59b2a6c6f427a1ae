"""Work in a process of its own: what is heavy, cannot be interrupted, or may die of its own.

The parent hands the work over as one line on standard input and gets answers, a line each, from standard output. It
keeps standard input open; its end tells the child that nobody waits any more. Both sides are here.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import svd_trt.version

__all__ = ["Answer", "describe_exit", "environment", "run_child", "serve"]

Answer = Callable[[bytes], None]


def run_child(module: str, job: bytes, handle: Callable[[bytes], bool]) -> int | None:
    """Run ``python -m module`` on ``job``, which holds no line break, and hand each line of its answers to ``handle``.

    Returns None once ``handle`` has returned True, which says that the work is done, or the exit code of a child that
    ended before. Any exception meanwhile, Ctrl-C among them, kills the child at once.
    """
    command = [sys.executable, "-m", module]
    with subprocess.Popen(  # noqa: S603  (our own interpreter and module)
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_thrifty(), bufsize=0
    ) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it died at once; what it left behind says more
                _write_all(process.stdin, job + b"\n")
            with io.BufferedReader(process.stdout) as lines:  # type: ignore[type-var]  # a raw pipe, with bufsize=0
                if any(handle(line) for line in lines):
                    return None
            return process.wait()
        except BaseException:
            process.kill()  # leaving the block waits for it
            raise


def describe_exit(code: int, what: str) -> str:
    """Why a child that did not answer is gone."""
    if code == -signal.SIGKILL:
        return f"{what} was killed, most likely because memory ran out; close other programs or use a larger machine"
    if code < 0:
        return f"{what} crashed ({signal.Signals(-code).name})"
    return f"{what}'s process ended with code {code}"


def serve(work: Callable[[bytes, Answer], None]) -> None:
    """The child's side: read the job, run ``work(job, answer)``, and end when the parent does.

    Ctrl-C reaches the whole process group; the parent speaks for both, and this process just ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Whatever libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(line: bytes) -> None:
        try:
            answers.write(line + b"\n")
        except BrokenPipeError:
            os._exit(1)  # nobody waits any more

    job = sys.stdin.buffer.readline()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(job, answer)


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _write_all(pipe: object, data: bytes) -> None:
    assert isinstance(pipe, io.RawIOBase)
    view = memoryview(data)
    while view:
        view = view[pipe.write(view) or 0 :]


def environment() -> dict[str, str]:
    """Ours, with this svd_trt found first wherever it was imported from."""
    here = str(Path(svd_trt.version.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"PYTHONPATH": path}


def _thrifty() -> dict[str, str]:
    """The same, with blocks given back to the system when they are let go: weights come and go in a build.

    By default glibc comes to keep blocks of up to 32 MB for later, which makes whoever allocates often faster.
    """
    return {"MALLOC_MMAP_THRESHOLD_": "1048576"} | environment()
