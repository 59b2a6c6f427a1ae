"""Work in a process of its own, for what takes gigabytes, cannot be interrupted, or may crash.

Parent and child exchange lines: requests on the child's standard input, answers on its standard output. The parent
opens a `ChildProcess`, the child calls `connect_to_parent`. A child lives as long as its standard input is open, so it
also ends when its parent is killed.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import svd_trt.version

__all__ = ["FREE_MEMORY_EARLY", "Answer", "ChildProcess", "connect_to_parent", "describe_exit", "environment"]

Answer = Callable[[bytes], None]
"""Sends one line, which holds no line break itself, to the parent."""

FREE_MEMORY_EARLY = {"MALLOC_MMAP_THRESHOLD_": os.environ.get("MALLOC_MMAP_THRESHOLD_", "1048576")}
"""Environment in which glibc returns blocks of more than 1 MB to the system as soon as they are freed.

By default glibc keeps blocks of up to 32 MB, which is faster for programs that allocate them often. A build loads
and frees gigabytes of weights; a benchmark has to run with the user's own settings.
"""

_CHUNK = 65536


class ChildProcess:
    """``python -m MODULE`` in a process of its own; leaving the ``with`` block kills it.

    Args:
        module: calls `connect_to_parent`.
        variables: environment variables to set, beside those of this process.
        log: a file that the child's standard error is appended to; by default it is that of this process.
        own_session: make the child the leader of a new session. The processes that it starts are killed with it, and
            Ctrl-C reaches the parent alone.
    """

    def __init__(
        self,
        module: str,
        variables: Mapping[str, str] | None = None,
        *,
        log: Path | None = None,
        own_session: bool = False,
    ) -> None:
        self._log = log
        self._own_session = own_session
        self._received = b""
        with contextlib.ExitStack() as opened:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(  # noqa: S603  (our own interpreter and module)
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if log is None else opened.enter_context(log.open("ab")),
                env=environment() | dict(variables or {}),
                start_new_session=own_session,
                bufsize=0,
            )

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def send(self, line: bytes) -> None:
        """Send a request. A child that has ended is noticed by the next `receive`."""
        assert self._process.stdin is not None
        rest = memoryview(line + b"\n")
        with contextlib.suppress(BrokenPipeError):
            while rest:
                rest = rest[os.write(self._process.stdin.fileno(), rest) :]

    def receive(self, timeout: float | None = None) -> bytes | None:
        """The next line of the child's answers, without its line break; None when the child has ended.

        Raises:
            TimeoutError: no line came within ``timeout`` seconds.
        """
        assert self._process.stdout is not None
        answers = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(answers)
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._received:
            left = None if deadline is None else max(deadline - time.monotonic(), 0) * 1000
            if not poll.poll(left):
                raise TimeoutError(f"no answer within {timeout:g} s")
            chunk = os.read(answers, _CHUNK)
            if not chunk:
                return None
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        return line

    def describe_exit(self, what: str) -> str:
        """Why the child, which is called ``what``, has ended, with the last line that it wrote to its log."""
        reason = describe_exit(self._process.wait(), what)
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log else []
        return f"{reason}: {lines[-1]}" if lines else reason

    def kill(self) -> None:
        """End the child at once; in a session of its own, with all that it started."""
        if self._own_session:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def describe_exit(code: int, what: str) -> str:
    """Why a child that did not answer has ended with the exit code ``code``."""
    if code == -signal.SIGKILL:
        return f"{what} was killed, most likely because memory ran out; close other programs or use a larger machine"
    if code < 0:
        return f"{what} crashed ({signal.Signals(-code).name})"
    return f"{what}'s process ended with code {code}"


def connect_to_parent() -> tuple[Iterator[bytes], Answer]:
    """The child's side: the parent's requests, an endless iterator, and the function that sends answers.

    From here on the process ends as soon as its standard input does. Standard output is redirected to standard error,
    so that nothing that a library prints mixes with the answers.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is handled, and reported, by the parent
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def answer(line: bytes) -> None:
        rest = memoryview(line + b"\n")
        try:
            while rest:
                rest = rest[os.write(answers, rest) :]
        except BrokenPipeError:
            _end()

    # A thread reads, so that the end of the input is seen while the main thread works.
    threading.Thread(target=_read_requests, args=(requests.put,), daemon=True).start()
    return iter(requests.get, None), answer


def _read_requests(put: Callable[[bytes], Any]) -> None:
    rest = b""
    while chunk := os.read(sys.stdin.fileno(), _CHUNK):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            put(line)
    _end()


def _end() -> None:
    """End this process without clean-up, and those that it started if it leads its process group."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def environment() -> dict[str, str]:
    """The variables of this process, with a search path that finds this svd_trt first."""
    here = str(Path(svd_trt.version.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"PYTHONPATH": path}
