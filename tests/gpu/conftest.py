"""The GPUs that the tests run on: the stand-in and, if the machine has one, a real GPU.

The stand-in computes on the CPU and checks every driver call. Most tests run on both. `test_cuda_calls` looks into the
stand-in, and `test_device` records figures of a real GPU.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cuda.bindings.nvrtc
import cuda.bindings.runtime  # noqa: F401  # torch imports these with the real driver, so they come first
import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.engine.driver import list_gpus, load_driver
from svd_trt.errors import SvdTrtError
from tests.standin.cuda import StandInCuda
from tests.standin.tensorrt import StandInTensorRT


class Rig:
    """A machine with a GPU. ``cuda`` is the stand-in for the driver, or None if the GPU is real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cuda: StandInCuda | None) -> None:
        self._monkeypatch = monkeypatch
        self.cuda = cuda
        self.trt: StandInTensorRT | None = None
        if cuda is not None:
            self.use(cuda)

    def use(self, cuda: StandInCuda) -> None:
        """Make imports of the driver give ``cuda``."""
        self.cuda, self.trt = cuda, None
        self._monkeypatch.setitem(sys.modules, "cuda.bindings.driver", cuda)

    def open(self, bundle: Bundle, **options: Any) -> VideoPipeline:
        """Open a pipeline on the GPU."""
        self.install(bundle)
        return VideoPipeline.open(bundle, **({"device": "cuda"} | options))

    def install(self, bundle: Bundle, **options: Any) -> None:
        """Make imports of the TensorRT that built ``bundle`` give a stand-in for it."""
        if self.cuda is None or (self.trt is not None and self.trt.bundle is bundle and not options):
            return
        assert bundle.manifest.tensorrt is not None
        name = options.pop("tensorrt", bundle.manifest.tensorrt.name)
        self.trt = StandInTensorRT(self.cuda, bundle, tensorrt=name, **options)
        self._monkeypatch.setitem(sys.modules, name.replace("-", "_"), self.trt)

    def used(self) -> int:
        """Bytes of device memory in use by all processes."""
        if self.cuda is not None:
            return self.cuda.bytes_in_use
        driver = load_driver()
        handle = driver.call("cuDevicePrimaryCtxRetain", driver.call("cuDeviceGet", 0))
        driver.call("cuCtxSetCurrent", handle)
        free, total = driver.call("cuMemGetInfo")
        driver.call("cuDevicePrimaryCtxRelease", driver.call("cuDeviceGet", 0))
        return int(total) - int(free)

    @contextmanager
    def watching(self) -> Iterator[Callable[[], int]]:
        """Sample the memory in use a thousand times a second. The result gives the peak in bytes so far."""
        seen = [self.used()]
        done = threading.Event()

        def look() -> None:
            while not done.wait(0.001):
                seen.append(self.used())

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield lambda: max(seen)
        finally:
            done.set()
            thread.join()

    def check(self) -> None:
        """Check that the stand-in has no leaks and recorded no mistakes."""
        if self.cuda is not None:
            self.cuda.assert_clean()


def why_no_gpu() -> str | None:
    """The reason why tests of a real GPU cannot run here, or None if they can."""
    try:
        return None if list_gpus(load_driver()) else "the driver shows no GPU"
    except SvdTrtError as error:
        return str(error)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of a real GPU if there is none, before bundles are built for them."""
    if any(item.get_closest_marker("gpu") for item in items) and (reason := why_no_gpu()) is not None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shared: Path) -> None:
    """Keep the kernels that TensorRT for RTX compiles apart from the user's cache.

    Tests of the stand-in look into the cache, so each has its own. A real GPU compiles for seconds each time a bundle
    is opened, so its tests share one.
    """
    real = request.node.get_closest_marker("gpu") is not None
    monkeypatch.setenv("XDG_CACHE_HOME", str((shared if real else tmp_path) / "cache"))


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """The stand-in, and a real GPU. The test fails if it leaves something on the stand-in."""
    if request.param == "gpu":
        yield Rig(monkeypatch, None)
        return
    rig = Rig(monkeypatch, StandInCuda())
    yield rig
    rig.check()


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """The stand-in alone, for situations that a test cannot bring about on a real GPU."""
    rig = Rig(monkeypatch, StandInCuda())
    yield rig
    rig.check()
