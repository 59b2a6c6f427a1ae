"""Helpers for tests that call the stand-in directly."""

from __future__ import annotations

from typing import Any

from cuda.bindings import driver

from tests.standin.cuda import StandInCuda

__all__ = ["NON_BLOCKING", "SIZE", "THREAD_LOCAL", "ok", "status", "with_context"]

NON_BLOCKING = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
THREAD_LOCAL = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
SIZE = 1024


def ok(answer: tuple[Any, ...]) -> Any:
    """The results of a call of the driver that must have succeeded."""
    status, *results = answer
    assert status == driver.CUresult.CUDA_SUCCESS, status
    return results[0] if len(results) == 1 else tuple(results)


def status(answer: tuple[Any, ...]) -> str:
    return str(answer[0].name)


def with_context(**options: Any) -> StandInCuda:
    cuda = StandInCuda(**options)
    ok(cuda.cuInit(0))
    ok(cuda.cuCtxSetCurrent(ok(cuda.cuDevicePrimaryCtxRetain(ok(cuda.cuDeviceGet(0))))))
    return cuda
