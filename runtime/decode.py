"""Chunked decode as a pipeline: while frames are handed out, the next chunks are decoded and copied."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from svd_trt.errors import BackendError
from svd_trt.runtime.closeable import Closeable
from svd_trt.runtime.denoise import Floats
from svd_trt.runtime.device import Device, Session

__all__ = ["AHEAD", "ChunkedDecode", "Frames"]

Frames: TypeAlias = npt.NDArray[np.uint8]

AHEAD = 2
"""Chunks that are decoded or copied at once, handed out or not. More would only take more memory."""


class ChunkedDecode(Closeable, Iterator[Frames]):
    """Chunks of frames ``[n, H, W, 3]`` in order, decoded by a thread ahead of whoever takes them.

    The thread enqueues decoding and the copy to the host for as many chunks as there are slots, and waits for a slot
    to be taken before it goes on, so memory does not grow with the number of frames. A failure in the thread is raised
    where the chunk would have come. Closing gives up the rest.

    Args:
        device: where.
        lease: lends the decoder; gives up waiting for it once the event is set.
        latents: of all frames, ``[N, C, h, w]``.
        chunks: sizes of the chunks; their sum is N.
        size: height and width of the frames.
        on_chunk: called with the seconds that the device worked on a chunk, when it is handed out.
    """

    def __init__(
        self,
        device: Device,
        lease: Callable[[threading.Event], AbstractContextManager[Session]],
        latents: Floats,
        chunks: Sequence[int],
        size: tuple[int, int],
        on_chunk: Callable[[float], object],
    ) -> None:
        self._device = device
        self._lease = lease
        self._latents = latents
        self._chunks = chunks
        self._on_chunk = on_chunk
        self._session: Session | None = None
        self._session_lock = threading.Lock()
        self._stop = threading.Event()
        # Not Thread.join: in Python 3.11 one that a signal interrupts takes the thread for finished.
        self._ended = threading.Event()
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._taken = 0
        self._error: BackendError | None = None
        with ExitStack() as stack:
            slots = min(AHEAD, len(chunks))
            shape = (max(chunks), *latents.shape[1:])
            self._slots = [stack.enter_context(_Slot(device, shape, size)) for _ in range(slots)]
            for index in range(slots):
                self._free.put(index)
            # A daemon, so that a stream that nobody closed does not keep the interpreter from ending.
            threading.Thread(target=self._decode_all, name="decode", daemon=True).start()
            self._held = stack.pop_all()

    def __next__(self) -> Frames:
        got = None if self._stop.is_set() else self._ready.get()
        if not isinstance(got, int):
            self.close()
            raise self._error or got or StopIteration
        slot = self._slots[got]
        slot.fetched.wait()
        # A copy: the slot is filled again while whoever gets the frames may keep them.
        frames: Frames = slot.host_frames.array[: self._chunks[self._taken]].copy()
        self._on_chunk(slot.fetched.seconds_since(slot.started))
        self._taken += 1
        self._free.put(got)
        return frames

    def abort(self, error: BackendError) -> None:
        """Close, and raise ``error`` instead of handing out another chunk."""
        self._error = self._error or error
        self.close()

    def close(self) -> None:
        """Give up the rest, and free everything once nothing uses it. To be repeated where it was interrupted."""
        self._stop.set()
        self._ready.put(None)  # wakes whoever waits for a chunk
        self._free.put(-1)  # wakes the thread
        with self._session_lock:
            if self._session is not None:
                self._session.cancel()
        self._ended.wait()
        with suppress(BackendError):  # reported where it happened
            self._device.synchronize()
        self._held.close()

    def _decode_all(self) -> None:
        try:
            done = 0
            for size in self._chunks:
                index = self._free.get()
                if self._stop.is_set():
                    return
                self._decode(self._slots[index], self._latents[done : done + size])
                done += size
                self._ready.put(index)
            self._ready.put(None)
        except BaseException as error:  # raised again by whoever waits for the chunk
            self._ready.put(error)
        finally:
            self._ended.set()

    def _decode(self, slot: _Slot, latents: Floats) -> None:
        size = len(latents)
        slot.host_latents.array[:size] = latents
        # All of it under one lease, so that no other stream's work comes between.
        with self._lease(self._stop) as session, self._cancellable(session):
            slot.started.record()
            self._device.send(slot.host_latents, slot.latents.rows(0, size))
            session.enqueue({"latents": slot.latents.rows(0, size), "frames": slot.frames.rows(0, size)})
            self._device.fetch(slot.frames.rows(0, size), slot.host_frames, slot.fetched)

    @contextmanager
    def _cancellable(self, session: Session) -> Iterator[None]:
        """Closing cancels what ``session`` runs in the block, and nothing that it runs for others."""
        with self._session_lock:
            self._session = session
        try:
            yield
        finally:
            with self._session_lock:
                self._session = None


class _Slot(Closeable):
    """Memory for one chunk on its way."""

    def __init__(self, device: Device, shape: tuple[int, ...], size: tuple[int, int]) -> None:
        frames = (shape[0], *size, 3)
        with ExitStack() as stack:
            self.latents = stack.enter_context(device.empty(shape, np.float32, "latents of a chunk"))
            self.frames = stack.enter_context(device.empty(frames, np.uint8, "frames of a chunk"))
            self.host_latents = stack.enter_context(device.host(shape, np.float32, "latents of a chunk"))
            self.host_frames = stack.enter_context(device.host(frames, np.uint8, "frames of a chunk"))
            self.started = stack.enter_context(device.mark())
            self.fetched = stack.enter_context(device.mark())
            self._held = stack.pop_all()

    def close(self) -> None:
        """Free it."""
        self._held.close()
