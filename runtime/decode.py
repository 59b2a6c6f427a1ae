"""The decode stage, in chunks: while the caller uses the frames of one chunk, the next ones are decoded and copied."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from svd_trt.errors import BackendError, SvdTrtError
from svd_trt.runtime.cancellation import Cancellation
from svd_trt.runtime.closeable import Closeable
from svd_trt.runtime.device import Device, Session, SharedFrames
from svd_trt.runtime.executor import Executor
from svd_trt.runtime.flag import Flag
from svd_trt.runtime.timings import Timings, timed
from svd_trt.runtime.tracing import traced

__all__ = ["SLOTS", "ChunkedDecode", "Frames", "decode"]

Frames: TypeAlias = npt.NDArray[np.uint8]

SLOTS = 2
"""Chunks that have memory on the device at once. More would take more memory and save no time."""


def decode(
    executor: Executor,
    latents: npt.NDArray[np.float32],
    *,
    chunks: Sequence[int],
    size: tuple[int, int],
    on_frames: Callable[[int], object],
    timings: Timings,
    cancellation: Cancellation,
    on_device: bool = False,
) -> Generator[Frames | list[Any]]:
    """Decode latents chunk by chunk.

    Args:
        executor: has the VAE decoder.
        latents: of all frames, ``[N, C, h, w]``.
        chunks: sizes of the chunks; their sum is N.
        size: height and width of the frames.
        on_frames: called with 0 once the decoder is loaded, and after every chunk with the number of its frames.
        timings: gets ``decode`` and ``load``.
        cancellation: wakes the thread that waits for a chunk.
        on_device: leave the frames on the device.

    Yields:
        Frames ``[n, H, W, 3]``; with ``on_device`` and a GPU, a list of arrays on it instead.
    """
    with timed(timings, "load"):
        executor.load("vae_decoder")
    on_frames(0)

    def on_chunk(seconds: float) -> None:
        timings["decode"] = timings.get("decode", 0.0) + seconds

    decoder = partial(executor.session, "vae_decoder")
    with ChunkedDecode(executor.device, decoder, latents, chunks, size, on_chunk, on_device=on_device) as decoded:
        executor.track(decoded)
        with cancellation.calling(decoded.cancel):
            for frames in decoded:
                on_frames(len(frames))
                yield frames


class ChunkedDecode(Closeable, Iterator[Frames | list[Any]]):
    """Chunks of frames ``[n, H, W, 3]`` in order, decoded by a thread ahead of the caller.

    The thread enqueues decoding and the copy to the host for as many chunks as there are slots, and waits for a free
    slot before it continues, so memory does not grow with the number of frames. If the thread fails, the call for the
    next chunk raises its error. Closing cancels the remaining chunks.

    Args:
        device: where to decode.
        decoder: holds the network while a chunk is enqueued; stops waiting for it once the event is set.
        latents: of all frames, ``[N, C, h, w]``.
        chunks: sizes of the chunks; their sum is N.
        size: height and width of the frames.
        on_chunk: called with the seconds that the device worked on a chunk, when the caller gets the chunk.
        on_device: leave the frames on the device, and give a list of arrays for each chunk, if it is a GPU.
    """

    def __init__(
        self,
        device: Device,
        decoder: Callable[[Flag], AbstractContextManager[Session]],
        latents: npt.NDArray[np.float32],
        chunks: Sequence[int],
        size: tuple[int, int],
        on_chunk: Callable[[float], object],
        *,
        on_device: bool = False,
    ) -> None:
        self._device = device
        self._decoder = decoder
        self._latents = latents
        self._chunks = chunks
        self._on_chunk = on_chunk
        self._on_device = on_device
        self._session: Session | None = None
        self._session_lock = threading.RLock()  # a signal handler may cancel while its own thread holds it
        self._stop = Flag()
        # Not Thread.join: in Python 3.11 a join that a signal interrupts marks the thread as finished.
        self._ended = threading.Event()
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._taken = 0
        self._error: SvdTrtError | None = None
        self._process = os.getpid()
        with ExitStack() as stack:
            slots = min(SLOTS, len(chunks))
            shape = (max(chunks), *latents.shape[1:])
            self._slots = [stack.enter_context(_Slot(device, shape, size)) for _ in range(slots)]
            for index in range(slots):
                self._free.put(index)
            # A daemon thread, so that a stream that was not closed does not keep the interpreter from exiting.
            threading.Thread(target=self._work, name="decode", daemon=True).start()
            self._held = stack.pop_all()

    def __next__(self) -> Frames | list[Any]:
        got = None if self._stop.is_set() else self._ready.get()
        if not isinstance(got, int):
            self.close()
            raise self._error or got or StopIteration
        slot = self._slots[got]
        slot.fetched.wait()
        frames: Frames | list[Any]
        if slot.shared is not None:
            frames, slot.shared = slot.shared.arrays(), None
        else:  # a copy, because the caller may keep the frames while the slot is filled again
            frames = slot.host_frames.array[: self._chunks[self._taken]].copy()
        self._on_chunk(slot.fetched.seconds_since(slot.started))
        self._taken += 1
        self._free.put(got)
        return frames

    def cancel(self, error: SvdTrtError) -> None:
        """Cancel the remaining chunks, and raise ``error`` when the caller asks for another one, which also closes.

        Any thread may call it. It frees nothing, because the caller may be copying the frames of a chunk.
        """
        self._error = self._error or error
        self._cancel()

    def abort(self, error: BackendError) -> None:
        """Close, and raise ``error`` when the caller asks for another chunk."""
        self._error = self._error or error
        self.close()

    def close(self) -> None:
        """Cancel the remaining chunks, and free all memory once no work uses it. If interrupted, call it again.

        A forked process does nothing here: it has neither the thread nor the device.
        """
        if os.getpid() != self._process:
            return
        self._cancel()
        self._ended.wait()
        with suppress(BackendError):  # the call that failed has reported it
            self._device.synchronize()
        self._held.close()

    def _cancel(self) -> None:
        self._stop.set()
        self._ready.put(None)  # wakes a caller that waits for a chunk
        self._free.put(-1)  # wakes the thread
        with self._session_lock:
            if self._session is not None:
                self._session.cancel()

    def _work(self) -> None:
        with traced("decode"):
            self._decode_all()

    def _decode_all(self) -> None:
        try:
            done = 0
            for size in self._chunks:
                index = self._free.get()
                if self._stop.is_set():
                    return
                with traced(f"frames {done} to {done + size - 1}"):
                    self._decode(self._slots[index], self._latents[done : done + size])
                done += size
                self._ready.put(index)
            self._ready.put(None)
        except BaseException as error:  # raised again when the caller asks for the chunk
            self._ready.put(error)
        finally:
            self._ended.set()

    def _decode(self, slot: _Slot, latents: npt.NDArray[np.float32]) -> None:
        size = len(latents)
        slot.host_latents.array[:size] = latents
        if self._on_device:
            slot.shared = self._device.share_frames((size, *slot.frames.shape[1:]))
        target = slot.frames.rows(0, size) if slot.shared is None else slot.shared.buffer
        # Hold the network throughout, so that no other stream's work comes in between.
        with self._decoder(self._stop) as session, self._cancellable(session):
            slot.started.record()
            self._device.send(slot.host_latents, slot.latents.rows(0, size))
            session.enqueue({"latents": slot.latents.rows(0, size), "frames": target})
            if slot.shared is None:
                self._device.fetch(target, slot.host_frames, slot.fetched)
            else:
                slot.fetched.record()

    @contextmanager
    def _cancellable(self, session: Session) -> Iterator[None]:
        """Let `close` cancel what ``session`` runs in the block, and nothing that it runs for other streams."""
        with self._session_lock:
            self._session = session
        try:
            yield
        finally:
            with self._session_lock:
                self._session = None


class _Slot(Closeable):
    """Memory for one chunk, on the device and on the host."""

    def __init__(self, device: Device, shape: tuple[int, ...], size: tuple[int, int]) -> None:
        frames = (shape[0], *size, 3)
        with ExitStack() as stack:
            self.latents = stack.enter_context(device.empty(shape, np.float32, "latents of a chunk"))
            self.frames = stack.enter_context(device.empty(frames, np.uint8, "frames of a chunk"))
            self.host_latents = stack.enter_context(device.host(shape, np.float32, "latents of a chunk"))
            self.host_frames = stack.enter_context(device.host(frames, np.uint8, "frames of a chunk"))
            self.started = stack.enter_context(device.event())
            self.fetched = stack.enter_context(device.event())
            self.shared: SharedFrames | None = None  # the frames, if they stay on the device
            self._held = stack.pop_all()

    def close(self) -> None:
        """Free all of it."""
        self.shared = None
        self._held.close()
