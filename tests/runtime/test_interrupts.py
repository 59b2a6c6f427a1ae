"""Ctrl-C, once or twice, before and after the wait for the thread in which ONNX Runtime computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
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
    """A function that decodes the same latents each time, into memory that it has set to zero."""
    device = CpuDevice()
    latents = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
    with upload(device, latents, "latents") as given, device.empty((1, 32, 32, 3), np.uint8, "frames") as frames:

        def decode() -> np.ndarray[Any, Any]:
            frames.array[...] = 0
            session.enqueue({"latents": given, "frames": frames})
            return frames.array.copy()

        yield decode


def interrupt_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, after: bool, times: int) -> None:
    """Make the first ``times`` calls of ``owner.name`` raise KeyboardInterrupt, before or after their work."""
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


@pytest.mark.parametrize("after", [False, True], ids=["before the result", "after the result"])
@pytest.mark.parametrize("times", [1, 2])
def test_runs_after_an_interrupted_wait_get_their_own_frames(
    times: int, after: bool, session: CpuSession, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs after an interrupt get their own complete frames, not those of the interrupted run."""
    expected = run()
    interrupt_calls(monkeypatch, Future, "result", after=after, times=times)
    with pytest.raises(KeyboardInterrupt):
        run()
    for _ in range(3):
        np.testing.assert_array_equal(run(), expected)


def test_a_run_works_after_an_interrupted_submit(
    session: CpuSession, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run()
    interrupt_calls(monkeypatch, cpu_device._Worker, "submit", after=False, times=1)
    with pytest.raises(KeyboardInterrupt):
        run()
    np.testing.assert_array_equal(run(), expected)


def test_an_interrupt_waits_for_the_network(session: CpuSession, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller gets control back only when the network no longer writes to the buffers."""
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
    interrupt_calls(monkeypatch, Future, "result", after=False, times=1)
    threading.Timer(0.2, gate.set).start()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert ended.is_set()


def test_usable_processors_are_those_of_the_affinity(session: CpuSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5, 6})
    assert cpu_device.usable_processors() == 3
