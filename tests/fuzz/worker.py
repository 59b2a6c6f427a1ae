"""One kind of fuzzing in a process of its own: ``python -m tests.fuzz.worker KIND COUNT SEED BUNDLE CHECKPOINT``.

Each input must be taken, or refused with one line. A process of its own has a limit of its own: an allocation of more
than 1 GB fails, and an input that takes longer than a minute ends the process with its traceback.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, settings

from svd_trt.errors import SvdTrtError
from tests.fuzz.kinds import KINDS

LIMIT_BYTES = 1 << 30
HANG_S = 60


def take_or_refuse(call: Callable[[], object]) -> None:
    """Run ``call``, which may refuse its input in one line that does not come from a lack of memory."""
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    try:
        call()
    except SvdTrtError as error:
        check_refusal(error)
    finally:
        faulthandler.cancel_dump_traceback_later()


def check_refusal(refusal: SvdTrtError) -> None:
    """One line, and not for want of memory."""
    assert len(str(refusal).splitlines()) == 1, f"not one line: {refusal}"
    seen: BaseException | None = refusal
    while seen is not None:
        assert not isinstance(seen, MemoryError), "more than 1 GB before a refusal"
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def main(kind: str, count: str, seed: str, bundle: str, checkpoint: str) -> None:
    """Try ``count`` inputs, and print how many were tried and how long the slowest took."""
    warnings.simplefilter("ignore")
    tried, slowest = 0, 0.0
    last = Path(tempfile.gettempdir()) / "last-input.txt"  # for a process that hangs or crashes
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        strategy, attempt = KINDS[kind](Path(bundle), Path(checkpoint))

        @hypothesis.seed(int(seed))
        @settings(
            max_examples=int(count),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.explicit, Phase.generate, Phase.shrink),
            print_blob=False,
        )
        @hypothesis.given(strategy)
        def one(value: object) -> None:
            nonlocal tried, slowest
            tried += 1
            last.write_text(repr(value)[:20_000])
            started = time.perf_counter()
            take_or_refuse(lambda: attempt(value))
            slowest = max(slowest, time.perf_counter() - started)

        # Of memory that is written to: mapping a file of gigabytes to read its header takes none.
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + LIMIT_BYTES, resource.RLIM_INFINITY))
        one()
        os.chdir("/")
    sys.stdout.write(f"{tried} {slowest}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
