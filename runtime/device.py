"""What the loop and the decode pipeline need of a device: memory, copies, networks, and points in their order.

The pipeline is written once over these protocols. A leaf implements them for one kind of device: `runtime.ort` is
ONNX Runtime on the CPU, `runtime.cuda` an NVIDIA GPU. Every call but those that say *wait* may return before the work
is done. Work takes effect in the order in which it was enqueued, with one exception: copies to the host (`fetch`) run
beside the work that is enqueued after them. Whoever enqueues work that overwrites what is being fetched waits for the
fetch's mark first, on the host with `Mark.wait` or on the device with `Device.after`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.spec import NetworkName, NetworkSpec
from svd_trt.errors import BackendError

__all__ = [
    "Array",
    "Buffer",
    "Closeable",
    "Device",
    "HostBuffer",
    "Mark",
    "Recording",
    "Session",
    "download",
    "settled",
    "upload",
]

Array = npt.NDArray[Any]


class Closeable(Protocol):
    """Holds something of the device until it is closed; a ``with`` block closes it."""

    def close(self) -> None:
        """Release it; harmless when repeated."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Buffer(Closeable, Protocol):
    """Memory on the device that holds one tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def rows(self, start: int, stop: int) -> Buffer:
        """Rows ``start`` to ``stop`` of the first axis, in place."""


class HostBuffer(Closeable, Protocol):
    """Memory of the host that the device copies from and to."""

    @property
    def array(self) -> Array: ...


class Mark(Closeable, Protocol):
    """A point in the order of the work, once it was recorded."""

    def record(self) -> None:
        """Be the point after everything enqueued so far."""

    def wait(self) -> None:
        """Wait on the host until the device has come here."""

    def seconds_since(self, earlier: Mark) -> float:
        """Seconds between two marks that were waited for."""


class Session(Closeable, Protocol):
    """One network, loaded and ready to run."""

    @property
    def spec(self) -> NetworkSpec: ...

    def enqueue(self, tensors: Mapping[str, Buffer]) -> None:
        """Run once: ``tensors`` names a buffer for every input and output. No memory of tensors is allocated."""

    def cancel(self) -> None:
        """Ask a run that goes on in another thread to end early, where the device can; it then raises."""


class Recording(Closeable, Protocol):
    """Work that is enqueued again at every call."""

    def __call__(self) -> None:
        """Enqueue it."""


class Device(Closeable, Protocol):
    """A place where networks run."""

    @property
    def name(self) -> str:
        """For people: ``onnxruntime (CPU)``."""

    @property
    def notes(self) -> Sequence[str]:
        """What does not work as well as it could, for people."""

    @property
    def steps_in_flight(self) -> int:
        """How many steps to enqueue before waiting for the first: 1 where enqueuing is running."""

    def open(self, bundle: Bundle, network: NetworkName, *, streamed_bytes: int = 0) -> Session:
        """Load one network of a bundle, leaving ``streamed_bytes`` of its weights in host memory where it can.

        Raises:
            BackendError: this device cannot run it.
            DeviceMemoryError: it does not fit.
        """

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike, name: str) -> Buffer:
        """Allocate a buffer with undefined content; ``name`` is for error messages."""

    def host(self, shape: Sequence[int], dtype: npt.DTypeLike, name: str) -> HostBuffer:
        """Allocate host memory that copies to and from the device can use."""

    def mark(self) -> Mark:
        """A mark, not recorded yet."""

    def send(self, source: HostBuffer, target: Buffer) -> None:
        """Fill ``target`` from the beginning of ``source``, which must not change until a later mark was waited for."""

    def fetch(self, source: Buffer, target: HostBuffer, done: Mark) -> None:
        """Copy to the beginning of ``target`` beside the work that follows; ``done`` is recorded after the copy."""

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy on the device; as many bytes, whatever the shapes."""

    def after(self, mark: Mark) -> None:
        """Have work that is enqueued from now on wait for ``mark``, without the host waiting."""

    def record(self, work: Callable[[], None]) -> Recording:
        """What ``work`` enqueues, to be enqueued again and again, as a whole where the device can.

        ``work`` must enqueue networks alone, on the same buffers every time.
        """

    def synchronize(self) -> None:
        """Wait until all work is done."""

    def reserve(self, nbytes: int) -> None:
        """Have so much working memory, and no more, where all networks share it."""

    def trim(self) -> None:
        """Give back working memory that no network needs just now."""

    def free_bytes(self) -> int | None:
        """Memory that is free for tensors and networks; None where it is not counted."""

    def set_budget(self, nbytes: int | None) -> None:
        """Never allocate more than so many bytes on the device, where they are counted.

        Raises:
            ArgumentError: this device cannot keep a budget.
        """


def upload(device: Device, array: Array, name: str) -> Buffer:
    """A new buffer with the content of ``array``; waits for the copy."""
    buffer = device.empty(array.shape, array.dtype, name)
    try:
        _write(device, array, buffer)
    except BaseException:
        buffer.close()
        raise
    return buffer


def _write(device: Device, array: Array, buffer: Buffer) -> None:
    """Fill ``buffer`` from ``array`` and wait for the copy."""
    with device.host(buffer.shape, buffer.dtype, "an upload") as host, device.mark() as done, settled(device):
        host.array[...] = array
        device.send(host, buffer)
        done.record()
        done.wait()


def download(device: Device, buffer: Buffer) -> Array:
    """A host copy of ``buffer``; waits for the work that fills it."""
    with ExitStack() as stack:
        host = stack.enter_context(device.host(buffer.shape, buffer.dtype, "a download"))
        done = stack.enter_context(device.mark())
        stack.enter_context(settled(device))
        device.fetch(buffer, host, done)
        done.wait()
        return host.array.copy()


@contextmanager
def settled(device: Device) -> Iterator[None]:
    """Where the block fails, wait for what it enqueued: it may use memory that is freed next."""
    try:
        yield
    except BaseException:
        with suppress(BackendError):  # the failure that led here is the one worth reporting
            device.synchronize()
        raise
