"""Steps for tests of the probe, which run in its processes."""

from __future__ import annotations

import os
import signal
import time

from svd_trt.benchmarks.probe_steps import ProbeError, ProbeJob, Report, SkippedError


def passes(job: ProbeJob, report: Report, *, value: int) -> None:
    os.write(1, b"what a library prints is not an answer\n")
    report(first=value)
    report(second=job.dry_run)


def fails(job: ProbeJob, report: Report) -> None:
    report(first=1)
    raise ProbeError("it is wrong")


def breaks(job: ProbeJob, report: Report) -> None:
    raise RuntimeError("nobody expected it\nand more")


def skips(job: ProbeJob, report: Report) -> None:
    raise SkippedError("not here")


def crashes(job: ProbeJob, report: Report) -> None:
    report(first=1)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(job: ProbeJob, report: Report) -> None:
    report(first=1)
    time.sleep(600)
