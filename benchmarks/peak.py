"""What the machine can do at most: its rate at a large matrix product, ``python -m svd_trt.benchmarks.peak``."""

from __future__ import annotations

import json
import subprocess
import sys
import time

from svd_trt.benchmarks.schema import Peak
from svd_trt.benchmarks.worker import pin
from svd_trt.engine.child_process import environment

__all__ = ["measure_peak"]

_REPEATS = 5
_LONG_ENOUGH = 0.05  # seconds; what is shorter is over before all processors are at work
_LARGEST = 16384


def measure_peak(precision: str, threads: int, *, gpu: bool) -> Peak | None:
    """Time the product in a process of its own, with the threads that the contenders have; the best of six.

    None where it failed: the rest of the run is worth having.
    """
    command = [sys.executable, "-m", "svd_trt.benchmarks.peak", precision, str(threads), str(int(gpu))]
    threads_too = environment() | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=threads_too)  # noqa: S603
    if done.returncode:
        return None
    return Peak(**json.loads(done.stdout))


def _main() -> None:
    import torch

    precision, threads, gpu = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1"
    pin(threads)
    torch.set_num_threads(threads)
    device = "cuda" if gpu else "cpu"
    size = 8192 if gpu else 2048
    dtype = torch.float16 if precision == "fp16" and gpu else torch.float32
    while True:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        best = min(_time(a, b, gpu=gpu) for _ in range(_REPEATS + 1))
        if best >= _LONG_ENOUGH or size >= _LARGEST:
            break
        size *= 2
    named = "fp16" if dtype == torch.float16 else "fp32"
    print(json.dumps({"precision": named, "size": size, "flops_per_s": 2 * size**3 / best}))  # noqa: T201


def _time(a: object, b: object, *, gpu: bool) -> float:
    import torch

    assert isinstance(a, torch.Tensor)
    assert isinstance(b, torch.Tensor)
    started = time.perf_counter()
    _ = a @ b
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    _main()
