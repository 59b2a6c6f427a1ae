"""Chunked decode on the CPU: order, overlap, back-pressure, failures in any stage, cancellation."""

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

pytestmark = pytest.mark.xdist_group("small")

PATIENCE = 30.0


class CountingDevice(CpuDevice):
    """The CPU, and how much memory it was asked for and has not got back."""

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
    """The real decoder behind a gate: how many runs were begun, and leave for each of them to go on."""

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
    hold: Callable[[threading.Event], AbstractContextManager[Any]] | None = None,
    on_chunk: Callable[[float], object] = lambda seconds: None,
) -> ChunkedDecode:
    decoder = hold or (lambda stop: nullcontext(session))
    return ChunkedDecode(device, decoder, latents_of(sum(chunks)), chunks, (32, 32), on_chunk)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
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


def test_chunks_that_were_handed_out_stay_as_they_are(device: CountingDevice, decoder: CpuSession) -> None:
    with pipeline(device, decoder, [1] * 6) as decode:
        first = next(decode)
        kept = first.copy()
        rest = list(decode)
    np.testing.assert_array_equal(first, kept)
    assert all((chunk != kept).any() for chunk in rest)


def test_later_chunks_are_decoded_meanwhile_but_not_all(device: CountingDevice, decoder: CpuSession) -> None:
    gated = Gated(decoder)
    with pipeline(device, gated, [1] * 9) as decode:
        until(lambda: gated.begun == SLOTS)  # nobody has asked for a frame yet
        next(decode)
        until(lambda: gated.begun == SLOTS + 1)
        time.sleep(0.2)
        assert gated.begun == SLOTS + 1, "more than there is room for"
        assert len(list(decode)) == 8


def test_memory_does_not_grow_with_frames(device: CountingDevice, decoder: CpuSession) -> None:
    made = []
    for count in (3, 30):
        before = device.made
        with pipeline(device, decoder, [1] * count) as decode:
            assert len(list(decode)) == count
        made.append(device.made - before)
    assert made[0] == made[1]


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_failure_to_decode_comes_after_the_chunks_before_it(
    at: int, device: CountingDevice, decoder: CpuSession
) -> None:
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


def test_a_network_that_does_not_load(device: CountingDevice, decoder: CpuSession) -> None:
    @contextmanager
    def hold(stop: threading.Event) -> Iterator[Any]:
        raise BackendError("it does not load")
        yield

    with pipeline(device, decoder, [1, 1], hold=hold) as decode, pytest.raises(BackendError, match="does not load"):
        next(decode)
    assert device.live == 0


def test_memory_that_cannot_be_had(decoder: CpuSession) -> None:
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


def test_a_failure_of_whoever_takes_the_frames(device: CountingDevice, decoder: CpuSession) -> None:
    def refuse(seconds: float) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"), pipeline(device, decoder, [1] * 5, on_chunk=refuse) as decode:
        next(decode)
    assert finished(decode)
    assert device.live == 0


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_early_abandonment(taken: int, device: CountingDevice, decoder: CpuSession) -> None:
    decode = pipeline(device, decoder, [1] * 8)
    for _ in range(taken):
        next(decode)
    decode.close()
    decode.close()
    assert finished(decode)
    assert device.live == 0
    with pytest.raises(StopIteration):
        next(decode)


def test_abandonment_ends_the_run_that_is_under_way(device: CountingDevice, decoder: CpuSession) -> None:
    gated = Gated(decoder, open_gate=False)
    decode = pipeline(device, gated, [1] * 3)
    until(lambda: gated.begun == 1)
    decode.close()
    assert gated.cancelled.is_set()
    assert finished(decode)
    assert device.live == 0


def test_onnxruntime_can_be_cancelled_from_another_thread(small_bundle: Path) -> None:
    """A chunk of a full-size decoder takes minutes on a CPU; a run that is not under way takes no harm."""
    device = CpuDevice()
    with (
        device.open(Bundle.open(small_bundle), "vae_decoder") as session,
        upload(device, latents_of(1), "latents") as given,
        device.empty((1, 32, 32, 3), np.uint8, "frames") as frames,
    ):
        session.cancel()
        session.enqueue({"latents": given, "frames": frames})
        original = session._thread.submit

        def submit(*call: Any) -> Any:
            session.cancel()  # between the making of its options and its run
            return original(*call)

        session._thread.submit = submit  # type: ignore[method-assign, assignment]
        with pytest.raises(BackendError, match="vae_decoder"):
            session.enqueue({"latents": given, "frames": frames})


def test_abandoning_for_a_reason(device: CountingDevice, decoder: CpuSession) -> None:
    decode = pipeline(device, decoder, [1] * 5)
    next(decode)
    decode.abort(BackendError("the pipeline was closed"))
    with pytest.raises(BackendError, match="was closed"):
        next(decode)
    assert device.live == 0


def test_closing_wakes_whoever_waits_for_a_chunk(device: CountingDevice, decoder: CpuSession) -> None:
    gated = Gated(decoder, open_gate=False)
    decode = pipeline(device, gated, [1] * 3)
    ended = threading.Event()

    def take() -> None:
        assert list(decode) == []
        ended.set()

    waiting = threading.Thread(target=take)
    waiting.start()
    until(lambda: gated.begun == 1)
    decode.close()
    assert ended.wait(PATIENCE)
    waiting.join()


def test_ctrl_c_while_waiting_for_a_chunk(device: CountingDevice, decoder: CpuSession) -> None:
    gated = Gated(decoder, open_gate=False)

    def interrupt() -> None:
        until(lambda: gated.begun == 1)
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


def test_a_pipeline_that_is_forgotten_ends(device: CountingDevice, decoder: CpuSession) -> None:
    """As when a loop over a stream is left by ``break``."""

    def frames() -> Iterator[Any]:
        with pipeline(device, decoder, [1] * 9) as decode:
            yield from decode

    for _ in frames():
        break
    gc.collect()
    assert device.live == 0


def test_closing_that_is_interrupted_can_be_done_again(device: CountingDevice, decoder: CpuSession) -> None:
    """Ctrl-C while a chunk of minutes is waited for: nothing is freed under it, and all of it later."""
    gated = Gated(decoder, open_gate=False)
    gated.cancel = lambda: None  # type: ignore[method-assign]  # as a device that cannot cancel
    decode = pipeline(device, gated, [1] * 3)
    until(lambda: gated.begun == 1)

    def interrupt() -> None:
        until(decode._stop.is_set)
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


def test_closing_a_stream_that_failed_cancels_nothing_of_others(device: CountingDevice, decoder: CpuSession) -> None:
    gated = Gated(decoder)
    gated.fail_at = 0
    decode = pipeline(device, gated, [1] * 3)
    until(lambda: finished(decode))
    decode.close()
    assert not gated.cancelled.is_set()


def test_a_thread_that_cannot_be_started_leaves_nothing(
    device: CountingDevice, decoder: CpuSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="start new thread"):
        pipeline(device, decoder, [1] * 3)
    assert device.live == 0
