"""Chunked decode on the CPU: order, overlap, back-pressure, failures and cancellation."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from svd_trt import Bundle
from svd_trt.errors import BackendError
from svd_trt.runtime.cpu_device import CpuBuffer, CpuDevice, CpuSession
from svd_trt.runtime.decode import SLOTS, ChunkedDecode
from svd_trt.runtime.device import Buffer, download, upload

TIMEOUT_S = 30.0


class CountingDevice(CpuDevice):
    """A CPU device that counts the bytes of its allocations and the buffers that are not closed."""

    def __init__(self) -> None:
        self.made = 0
        self.live = 0

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike, name: str) -> CpuBuffer:
        buffer = super().empty(shape, dtype, name)
        self.made += buffer.array.nbytes
        self.live += 1
        released = buffer.close

        def close() -> None:
            released()
            self.live -= 1
            buffer.close = released  # type: ignore[method-assign]

        buffer.close = close  # type: ignore[method-assign]
        return buffer


class Gated:
    """The real decoder behind a gate. It counts the runs that began. Each run waits at the gate."""

    def __init__(self, session: CpuSession, *, open_gate: bool = True) -> None:
        self._session = session
        self.spec = session.spec
        self.begun = 0
        self.cancelled = threading.Event()
        self.gate = threading.Semaphore(1000 if open_gate else 0)
        self.fail_at: int | None = None

    def enqueue(self, tensors: Mapping[str, Buffer]) -> None:
        self.begun += 1
        while not self.gate.acquire(timeout=0.05):
            if self.cancelled.is_set():
                raise BackendError("cancelled")
        if self.begun - 1 == self.fail_at:
            raise BackendError("this chunk cannot be decoded")
        self._session.enqueue(tensors)

    def cancel(self) -> None:
        self.cancelled.set()

    def close(self) -> None: ...

    def __enter__(self) -> Gated:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def decoder(small_bundle: Path) -> Iterator[CpuSession]:
    with CpuDevice().open(Bundle.open(small_bundle), "vae_decoder") as session:
        yield session


@pytest.fixture
def device() -> CountingDevice:
    return CountingDevice()


def latents_of(frames: int) -> Any:
    return np.random.default_rng(0).standard_normal((frames, 4, 16, 16)).astype(np.float32)


def pipeline(
    device: CpuDevice,
    session: Any,
    chunks: Sequence[int],
    open_decoder: Callable[[threading.Event], AbstractContextManager[Any]] | None = None,
    on_chunk: Callable[[float], object] = lambda seconds: None,
) -> ChunkedDecode:
    decoder = open_decoder or (lambda stop: nullcontext(session))
    return ChunkedDecode(device, decoder, latents_of(sum(chunks)), chunks, (32, 32), on_chunk)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.01)


def finished(decode: ChunkedDecode) -> bool:
    return decode._ended.is_set()


@pytest.mark.parametrize("chunks", [[1], [3], [2, 2, 1], [1] * 7, [3, 3, 3, 2]])
def test_frames_come_in_order(chunks: list[int], device: CountingDevice, decoder: CpuSession) -> None:
    seconds: list[float] = []
    with pipeline(device, decoder, chunks, on_chunk=seconds.append) as decode:
        found = list(decode)
    assert [len(chunk) for chunk in found] == chunks
    assert len(seconds) == len(chunks)
    assert min(seconds) > 0
    done = 0
    for chunk in found:
        alone = latents_of(sum(chunks))[done : done + len(chunk)]
        with upload(device, alone, "latents") as given, device.empty(chunk.shape, np.uint8, "frames") as frames:
            decoder.enqueue({"latents": given, "frames": frames})
            np.testing.assert_array_equal(chunk, download(device, frames))
        done += len(chunk)
    assert device.live == 0


def test_yielded_chunks_are_not_overwritten(device: CountingDevice, decoder: CpuSession) -> None:
    with pipeline(device, decoder, [1] * 6) as decode:
        first = next(decode)
        kept = first.copy()
        rest = list(decode)
    np.testing.assert_array_equal(first, kept)
    assert all((chunk != kept).any() for chunk in rest)


def test_the_decode_runs_ahead_by_a_limited_number_of_chunks(device: CountingDevice, decoder: CpuSession) -> None:
    gated = Gated(decoder)
    with pipeline(device, gated, [1] * 9) as decode:
        wait_until(lambda: gated.begun == SLOTS)  # before the first frame is requested
        next(decode)
        wait_until(lambda: gated.begun == SLOTS + 1)
        time.sleep(0.2)
        assert gated.begun == SLOTS + 1, "more chunks were decoded than there are slots"
        assert len(list(decode)) == 8


def test_memory_does_not_grow_with_the_number_of_frames(device: CountingDevice, decoder: CpuSession) -> None:
    made = []
    for count in (3, 30):
        before = device.made
        with pipeline(device, decoder, [1] * count) as decode:
            assert len(list(decode)) == count
        made.append(device.made - before)
    assert made[0] == made[1]


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_failed_chunk_raises_after_the_chunks_before_it(at: int, device: CountingDevice, decoder: CpuSession) -> None:
    gated = Gated(decoder)
    gated.fail_at = at
    decode = pipeline(device, gated, [1] * 6)
    for _ in range(at):
        next(decode)
    with pytest.raises(BackendError, match="cannot be decoded"):
        next(decode)
    with pytest.raises(StopIteration):
        next(decode)
    assert finished(decode)
    assert device.live == 0


def test_a_network_that_does_not_load_raises_at_the_first_chunk(device: CountingDevice, decoder: CpuSession) -> None:
    @contextmanager
    def open_decoder(stop: threading.Event) -> Iterator[Any]:
        raise BackendError("it does not load")
        yield

    with (
        pipeline(device, decoder, [1, 1], open_decoder=open_decoder) as decode,
        pytest.raises(BackendError, match="does not load"),
    ):
        next(decode)
    assert device.live == 0


def test_a_failed_allocation_leaks_nothing(decoder: CpuSession) -> None:
    class Full(CountingDevice):
        def empty(self, shape: Sequence[int], dtype: npt.DTypeLike, name: str) -> CpuBuffer:
            if self.live == 5:
                raise BackendError("full")
            return super().empty(shape, dtype, name)

    device = Full()
    threads = threading.active_count()
    with pytest.raises(BackendError, match="full"):
        pipeline(device, decoder, [1, 1, 1])
    assert device.live == 0
    assert threading.active_count() == threads


def test_an_exception_in_on_chunk_ends_the_decode(device: CountingDevice, decoder: CpuSession) -> None:
    def refuse(seconds: float) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"), pipeline(device, decoder, [1] * 5, on_chunk=refuse) as decode:
        next(decode)
    assert finished(decode)
    assert device.live == 0


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_close_ends_the_decode_early(taken: int, device: CountingDevice, decoder: CpuSession) -> None:
    decode = pipeline(device, decoder, [1] * 8)
    for _ in range(taken):
        next(decode)
    decode.close()
    decode.close()
    assert finished(decode)
    assert device.live == 0
    with pytest.raises(StopIteration):
        next(decode)


def test_close_cancels_the_current_run(device: CountingDevice, decoder: CpuSession) -> None:
    gated = Gated(decoder, open_gate=False)
    decode = pipeline(device, gated, [1] * 3)
    wait_until(lambda: gated.begun == 1)
    decode.close()
    assert gated.cancelled.is_set()
    assert finished(decode)
    assert device.live == 0


def test_onnxruntime_can_be_cancelled_from_another_thread(small_bundle: Path) -> None:
    """A cancel before a run has no effect on it. A full-size chunk takes minutes on a CPU, so cancelling matters."""
    device = CpuDevice()
    with (
        device.open(Bundle.open(small_bundle), "vae_decoder") as session,
        upload(device, latents_of(1), "latents") as given,
        device.empty((1, 32, 32, 3), np.uint8, "frames") as frames,
    ):
        session.cancel()
        session.enqueue({"latents": given, "frames": frames})
        original = session._worker.submit

        def submit(*call: Any) -> Any:
            session.cancel()  # after the options of the run are made and before it runs
            return original(*call)

        session._worker.submit = submit  # type: ignore[method-assign, assignment]
        with pytest.raises(BackendError, match="vae_decoder"):
            session.enqueue({"latents": given, "frames": frames})


def test_abort_raises_its_reason_at_the_next_chunk(device: CountingDevice, decoder: CpuSession) -> None:
    decode = pipeline(device, decoder, [1] * 5)
    next(decode)
    decode.abort(BackendError("the pipeline was closed"))
    with pytest.raises(BackendError, match="was closed"):
        next(decode)
    assert device.live == 0


def test_close_wakes_a_thread_that_waits_for_a_chunk(device: CountingDevice, decoder: CpuSession) -> None:
    gated = Gated(decoder, open_gate=False)
    decode = pipeline(device, gated, [1] * 3)
    ended = threading.Event()

    def take() -> None:
        assert list(decode) == []
        ended.set()

    waiting = threading.Thread(target=take)
    waiting.start()
    wait_until(lambda: gated.begun == 1)
    decode.close()
    assert ended.wait(TIMEOUT_S)
    waiting.join()


def test_ctrl_c_while_waiting_for_a_chunk_ends_the_decode(device: CountingDevice, decoder: CpuSession) -> None:
    gated = Gated(decoder, open_gate=False)

    def interrupt() -> None:
        wait_until(lambda: gated.begun == 1)
        time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    decode = pipeline(device, gated, [1] * 3)
    thread.start()
    with pytest.raises(KeyboardInterrupt), decode:
        next(decode)
    thread.join()
    assert finished(decode)
    assert device.live == 0


def test_an_abandoned_decode_ends(device: CountingDevice, decoder: CpuSession) -> None:
    """For example, a loop over a stream was left by ``break``."""

    def frames() -> Iterator[Any]:
        with pipeline(device, decoder, [1] * 9) as decode:
            yield from decode

    for _ in frames():
        break
    gc.collect()
    assert device.live == 0


def test_an_interrupted_close_can_be_repeated(device: CountingDevice, decoder: CpuSession) -> None:
    """Ctrl-C while `close` waits for a long chunk: memory that the chunk uses is freed only by the next `close`."""
    gated = Gated(decoder, open_gate=False)
    gated.cancel = lambda: None  # type: ignore[method-assign]  # like a device that cannot cancel
    decode = pipeline(device, gated, [1] * 3)
    wait_until(lambda: gated.begun == 1)

    def interrupt() -> None:
        wait_until(decode._stop.is_set)
        time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        decode.close()
    thread.join()
    assert device.live > 0
    gated.gate.release(10)
    decode.close()
    assert device.live == 0


def test_closing_a_failed_decode_cancels_no_other_run(device: CountingDevice, decoder: CpuSession) -> None:
    gated = Gated(decoder)
    gated.fail_at = 0
    decode = pipeline(device, gated, [1] * 3)
    wait_until(lambda: finished(decode))
    decode.close()
    assert not gated.cancelled.is_set()


def test_a_failed_thread_start_leaks_nothing(
    device: CountingDevice, decoder: CpuSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="start new thread"):
        pipeline(device, decoder, [1] * 3)
    assert device.live == 0
