"""Ctrl-C while ONNX Runtime computes in its thread: at every point where it can arrive, and more than once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svd_trt import Bundle
from svd_trt.runtime import cpu_device
from svd_trt.runtime.cpu_device import CpuDevice, CpuSession
from svd_trt.runtime.device import upload

Run = Callable[[], np.ndarray[Any, Any]]


@pytest.fixture
def session(small_bundle: Path) -> Iterator[CpuSession]:
    with CpuDevice().open(Bundle.open(small_bundle), "vae_decoder") as session:
        yield session


@pytest.fixture
def run(session: CpuSession) -> Iterator[Run]:
    """Decodes the same latents each time, into memory that was zeroed."""
    device = CpuDevice()
    latents = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
    with upload(device, latents, "latents") as given, device.empty((1, 32, 32, 3), np.uint8, "frames") as frames:

        def decode() -> np.ndarray[Any, Any]:
            frames.array[...] = 0
            session.enqueue({"latents": given, "frames": frames})
            return frames.array.copy()

        yield decode


def interrupting(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, after: bool, times: int) -> None:
    """Have ``owner.name`` raise KeyboardInterrupt, before or after it did its work, the first so many times."""
    inner = getattr(owner, name)
    left = [times]

    def interrupted(*arguments: Any) -> Any:
        if not left[0]:
            return inner(*arguments)
        left[0] -= 1
        if after:
            inner(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("after", [False, True], ids=["before waiting", "with the answer in hand"])
@pytest.mark.parametrize("times", [1, 2])
def test_interrupted_while_waiting(
    times: int, after: bool, session: CpuSession, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run gets its own answer, not the one that was left behind, and all of its frames."""
    expected = run()
    interrupting(monkeypatch, Future, "result", after=after, times=times)
    with pytest.raises(KeyboardInterrupt):
        run()
    for _ in range(3):
        np.testing.assert_array_equal(run(), expected)


def test_interrupted_before_anything_was_handed_over(
    session: CpuSession, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run()
    interrupting(monkeypatch, ThreadPoolExecutor, "submit", after=False, times=1)
    with pytest.raises(KeyboardInterrupt):
        run()
    np.testing.assert_array_equal(run(), expected)


def test_interruption_waits_for_the_network(session: CpuSession, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buffers are the caller's again only when nothing writes to them any more."""
    ended = threading.Event()
    gate = threading.Event()
    inner = cpu_device.run_bound

    def slow(*arguments: Any) -> None:
        assert gate.wait(60)
        try:
            inner(*arguments)
        finally:
            ended.set()

    monkeypatch.setattr(cpu_device, "run_bound", slow)
    interrupting(monkeypatch, Future, "result", after=False, times=1)
    threading.Timer(0.2, gate.set).start()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert ended.is_set()


def test_as_many_threads_as_processors_we_may_use(session: CpuSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5, 6})
    assert cpu_device.usable_processors() == 3
