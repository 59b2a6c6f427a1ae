"""Processes of contenders, seen from the harness."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from svd_trt.benchmarks.protocol import Job, Made, Ready, Reply, Request
from svd_trt.engine.child_process import describe_exit, environment

__all__ = ["ContenderError", "Worker"]


class ContenderError(Exception):
    """A contender failed; the message is a line."""


class Worker:
    """One contender, loaded in a process of its own; use it in a ``with``.

    It is killed, with what it started itself, where it gives no answer within ``timeout`` seconds.

    Attributes:
        ready: what loading took.
        started_s: from the process's start until it was loaded.
    """

    def __init__(self, job: Job, log: Path, *, timeout: float = 3600.0) -> None:
        threads = str(job.threads)
        pools = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        # A cache of an earlier run would hide what compiling costs.
        fresh = {"TORCHINDUCTOR_CACHE_DIR": str(log.with_suffix(".inductor"))}
        started = time.perf_counter()
        self._log, self._timeout = log, timeout
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "svd_trt.benchmarks.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment() | pools | fresh,
                start_new_session=True,  # compilers that it starts end with it; Ctrl-C is the harness's to handle
            )
        try:
            ready = self._ask(msgspec.json.encode(job)).ready
            assert ready is not None
        except BaseException:
            self.kill()
            raise
        self.ready: Ready = ready
        self.started_s = time.perf_counter() - started

    def make(self, output: Path, frames: Path | None = None) -> Made:
        """One video.

        Raises:
            ContenderError: the contender failed, or its process died.
        """
        request = Request(os.fspath(output), None if frames is None else os.fspath(frames))
        made = self._ask(msgspec.json.encode(request)).made
        assert made is not None
        return made

    def _ask(self, line: bytes) -> Reply:
        pipe, answers = self._process.stdin, self._process.stdout
        assert pipe is not None
        assert answers is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._end_group()

        timer = threading.Timer(self._timeout, give_up)
        timer.start()
        try:
            pipe.write(line + b"\n")
            pipe.flush()
            answer = answers.readline()
        except BrokenPipeError:
            answer = b""
        finally:
            timer.cancel()
        if late.is_set():
            raise ContenderError(f"no answer within {self._timeout:g} s; --timeout gives it longer")
        if not answer:
            raise ContenderError(describe_exit(self._process.wait(), "it") + self._last_words())
        reply = msgspec.json.decode(answer, type=Reply)
        if reply.error is not None:
            raise ContenderError(reply.error)
        return reply

    def _last_words(self) -> str:
        """The last line that it wrote; the file itself goes when the run ends."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def kill(self) -> None:
        """End the process at once, and those that it started."""
        self._end_group()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # what was still to be written to it
                    continue

    def _end_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # it leads its group

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
