"""The machine's rate at a large matrix product, an upper bound for what any contender can reach."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec

from svd_trt.benchmarks.measuring import pin_threads
from svd_trt.benchmarks.results import Peak
from svd_trt.engine.child_process import ChildProcess, connect_to_parent

__all__ = ["measure_peak"]

_REPEATS = 6
_LONG_ENOUGH = 0.05  # seconds; shorter products end before all processors are at work
_LARGEST = 16384


class _Request(msgspec.Struct, frozen=True):
    precision: str
    threads: int
    gpu: bool


def measure_peak(precision: str, threads: int, log: Path, *, gpu: bool) -> Peak | None:
    """Time the product in a process of its own with as many threads as a contender has; the best of six.

    None if it failed: the other figures of the run are valid without it.
    """
    with ChildProcess("svd_trt.benchmarks.peak", {"OMP_NUM_THREADS": str(threads)}, log=log) as child:
        child.send(msgspec.json.encode(_Request(precision, threads, gpu)))
        answer = child.receive()
    return None if answer is None else msgspec.json.decode(answer, type=Peak)


def _main() -> None:
    requests, answer = connect_to_parent()
    request = msgspec.json.decode(next(requests), type=_Request)
    pin_threads(request.threads)
    answer(msgspec.json.encode(_measure(request)))


def _measure(request: _Request) -> Peak:
    import torch

    torch.set_num_threads(request.threads)
    device = "cuda" if request.gpu else "cpu"
    size = 8192 if request.gpu else 2048
    half = request.precision == "fp16" and request.gpu
    dtype = torch.float16 if half else torch.float32
    while True:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        best = min(_time_product(a, b, gpu=request.gpu) for _ in range(_REPEATS))
        if best >= _LONG_ENOUGH or size >= _LARGEST:
            return Peak("fp16" if half else "fp32", size, 2 * size**3 / best)
        size *= 2


def _time_product(a: Any, b: Any, *, gpu: bool) -> float:
    import torch

    started = time.perf_counter()
    _ = a @ b
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    _main()
