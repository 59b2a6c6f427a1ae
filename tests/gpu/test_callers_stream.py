"""Networks run on a stream of the caller's, and leave it alone at the end."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.engine.driver import Driver, load_driver
from svd_trt.errors import ArgumentError
from tests.gpu.conftest import Rig
from tests.gpu.test_pipeline import FAST, largest_difference
from tests.standin.cuda import StandInCuda


@contextmanager
def callers_stream(index: int = 0) -> Iterator[tuple[Driver, int]]:
    """A stream that this test made in the primary context of a GPU, as torch does."""
    driver = load_driver()
    gpu = driver.call("cuDeviceGet", index)
    driver.call("cuCtxSetCurrent", driver.call("cuDevicePrimaryCtxRetain", gpu))
    stream = driver.call("cuStreamCreate", int(driver.bindings.CUstream_flags.CU_STREAM_NON_BLOCKING))
    try:
        yield driver, int(stream)
    finally:
        driver.call("cuStreamDestroy", stream)
        driver.call("cuDevicePrimaryCtxRelease", gpu)


FORMS: dict[str, Callable[[int], Any]] = {
    "a number": lambda handle: handle,
    "numpy": lambda handle: np.uint64(handle),
    "torch": lambda handle: SimpleNamespace(cuda_stream=handle),
    "CuPy": lambda handle: SimpleNamespace(ptr=handle),
    "the protocol": lambda handle: SimpleNamespace(__cuda_stream__=lambda: (0, handle)),
}


@pytest.mark.parametrize("form", FORMS)
def test_networks_run_on_the_callers_stream(
    form: str, rig: Rig, dynamic_bundle: Bundle, dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    with callers_stream() as (driver, handle):
        with rig.open(dynamic_bundle, stream=FORMS[form](handle)) as pipe:
            assert pipe.device.compute.handle == handle  # type: ignore[attr-defined]
            frames = pipe(picture, **FAST).frames
            again = pipe(picture, **FAST).frames
        driver.call("cuStreamSynchronize", driver.bindings.CUstream(handle))  # it still exists
    assert largest_difference(frames, dynamic_pipe(picture, **FAST).frames) <= (0 if rig.cuda else 2)
    np.testing.assert_array_equal(again, frames)


def test_the_callers_object_is_kept_as_long_as_the_pipeline(standin: Rig, dynamic_bundle: Bundle) -> None:
    """It may destroy its stream when nothing refers to it."""

    class TheirStream:
        def __init__(self, handle: int) -> None:
            self.ptr = handle

    with callers_stream() as (_, handle):
        theirs = TheirStream(handle)
        alive = weakref.ref(theirs)
        with standin.open(dynamic_bundle, stream=theirs):
            del theirs
            gc.collect()
            assert alive() is not None
        gc.collect()
        assert alive() is None


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (0, "the default stream, whose work cannot be captured"),
        (2, "the default stream of each thread"),
        (SimpleNamespace(cuda_stream=0), "such as torch.cuda.Stream"),
        ("main", "must be a CUDA stream or its handle, not 'main'"),
        (-5, "must be a CUDA stream"),
        (True, "must be a CUDA stream"),
        (1.0, "must be a CUDA stream"),
        (SimpleNamespace(), "must be a CUDA stream"),
    ],
)
def test_what_is_no_stream_is_refused(stream: Any, message: str, rig: Rig, dynamic_bundle: Bundle) -> None:
    with pytest.raises(ArgumentError, match=message):
        rig.open(dynamic_bundle, stream=stream)


def test_a_stream_of_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, dynamic_bundle: Bundle) -> None:
    rig = Rig(monkeypatch, StandInCuda(devices=2))
    with callers_stream(1) as (_, handle):
        with pytest.raises(ArgumentError, match=r"not of the primary context of .* cuda:0; name its GPU with device="):
            rig.open(dynamic_bundle, device="cuda:0", stream=handle)
        rig.open(dynamic_bundle, device="cuda:1", stream=handle).close()
    rig.check()


def test_the_cpu_has_no_streams(dynamic_bundle: Bundle) -> None:
    with pytest.raises(ArgumentError, match="stream is for a GPU, and this pipeline runs on the CPU"):
        VideoPipeline.open(dynamic_bundle, device="cpu", stream=7)
