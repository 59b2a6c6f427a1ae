"""A GPU to test on: the stand-in, which computes on the CPU and checks every call, and a real one where there is one.

The same tests run on both. What only one of them can show has its own tests: `test_leaf` looks into the stand-in,
and `test_device` into the GPU.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cuda.bindings.nvrtc
import cuda.bindings.runtime  # noqa: F401  # torch imports these, and needs the real driver beneath them
import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.engine.driver import list_gpus, load_driver
from svd_trt.errors import SvdTrtError
from tests.standin.cuda import StandInCuda
from tests.standin.tensorrt import StandInTensorRT


class Rig:
    """A machine with a GPU. ``cuda`` is the stand-in for its driver, None where it is real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cuda: StandInCuda | None) -> None:
        self._monkeypatch = monkeypatch
        self.cuda = cuda
        self.trt: StandInTensorRT | None = None
        if cuda is not None:
            self.use(cuda)

    def use(self, cuda: StandInCuda) -> None:
        """Have ``cuda`` imported in the driver's place."""
        self.cuda, self.trt = cuda, None
        self._monkeypatch.setitem(sys.modules, "cuda.bindings.driver", cuda)

    def open(self, bundle: Bundle, **options: Any) -> VideoPipeline:
        """A pipeline on the GPU."""
        self.install(bundle)
        return VideoPipeline.open(bundle, **({"device": "cuda"} | options))

    def install(self, bundle: Bundle, **options: Any) -> None:
        """Have the stand-in for the TensorRT that built ``bundle`` imported in its place."""
        if self.cuda is None or (self.trt is not None and self.trt.bundle is bundle and not options):
            return
        assert bundle.manifest.tensorrt is not None
        name = options.pop("tensorrt", bundle.manifest.tensorrt.name)
        self.trt = StandInTensorRT(self.cuda, bundle, tensorrt=name, **options)
        self._monkeypatch.setitem(sys.modules, name.replace("-", "_"), self.trt)

    def used(self) -> int:
        """Bytes of device memory in use by everyone."""
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
        """The most bytes in use while the block runs, looked at a thousand times a second."""
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
        """Nothing is left, and no rule was broken."""
        if self.cuda is not None:
            self.cuda.assert_clean()


def why_no_gpu() -> str | None:
    """Why tests of a real GPU cannot run here; None where they can."""
    try:
        return None if list_gpus(load_driver()) else "the driver shows no GPU"
    except SvdTrtError as error:
        return str(error)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, before bundles are built for it."""
    if any(item.get_closest_marker("gpu") for item in items) and (reason := why_no_gpu()) is not None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kernels that TensorRT for RTX compiles are kept apart from the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Both kinds, one after the other; the stand-in must be left clean."""
    if request.param == "gpu":
        yield Rig(monkeypatch, None)
        return
    rig = Rig(monkeypatch, StandInCuda())
    yield rig
    rig.check()


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """The stand-in alone, for what a real GPU cannot be made to do."""
    rig = Rig(monkeypatch, StandInCuda())
    yield rig
    rig.check()
