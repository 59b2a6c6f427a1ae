"""What the denoising loop and the chunked decode need of a device: memory, copies, networks, and events.

The pipeline is written once over these base classes. `runtime.cpu_device` fills them in for ONNX Runtime on the CPU,
and `runtime.cuda` for an NVIDIA GPU. The defaults are right for a device on which every call has finished when it
returns, so a device overrides only what differs.

On a device that works asynchronously, every call except those that say *wait* may return before its work is done. Work
takes effect in the order in which it was enqueued, with one exception: copies to the host (`Device.fetch`) run beside
the work that is enqueued after them. Before the caller enqueues work that overwrites what is being fetched, it waits
for the event of the fetch: on the host with `Event.wait`, or on the device with `Device.wait_for`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.spec import NetworkName, NetworkSpec
from svd_trt.errors import ArgumentError, BackendError
from svd_trt.runtime.closeable import Closeable
from svd_trt.runtime.flag import Flag
from svd_trt.runtime.layer_times import LayerTimes

__all__ = [
    "Array",
    "Buffer",
    "Device",
    "Event",
    "Graph",
    "HostBuffer",
    "Session",
    "SharedFrames",
    "download",
    "synchronized_on_error",
    "upload",
]

Array = npt.NDArray[Any]


class Buffer(Closeable):
    """Memory on the device that holds one tensor.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def rows(self, start: int, stop: int) -> Buffer:
        """Rows ``start`` to ``stop`` of the first axis, in place."""
        raise NotImplementedError


class HostBuffer(Closeable):
    """Host memory that the device copies from and to.

    Attributes:
        array: the memory as a numpy array.
    """

    array: Array


class SharedFrames(ABC):
    """Memory on the device for frames ``[n, H, W, 3]``, uint8, that the caller gets. It is freed with the last of them.

    Attributes:
        buffer: the memory, for a network to write to.
    """

    buffer: Buffer

    @abstractmethod
    def arrays(self) -> list[Any]:
        """Make one array for each frame, which has ``__dlpack__``. The frames must be finished."""


class Event(Closeable, ABC):
    """A point in the order of the work. `record` sets it."""

    @abstractmethod
    def record(self) -> None:
        """Set the event to the point after everything that is enqueued now."""

    @abstractmethod
    def seconds_since(self, earlier: Event) -> float:
        """Seconds between two events. The host has waited for both."""

    def wait(self) -> None:
        """Wait on the host until the device has reached the event."""


class Session(Closeable, ABC):
    """One network, loaded and ready to run.

    Attributes:
        spec: names, shapes and types of the network's tensors.
        stop: of the generation that runs the network; once it is set, a run ends early if the device can do that.
    """

    spec: NetworkSpec
    stop: Flag | None = None

    @abstractmethod
    def enqueue(self, tensors: Mapping[str, Buffer]) -> None:
        """Run once. ``tensors`` has a buffer for every input and output; no tensor memory is allocated."""

    def profile_bytes(self) -> tuple[int, ...] | None:
        """The bytes of activations that each profile needs at its largest sizes, as the loaded network says.

        They are beside the buffers that the planner allows for streamed weights. None if the network does not say.
        """
        return None

    def save(self) -> None:
        """Keep for other processes what was compiled while the network ran, if the device compiles then."""

    def cancel(self) -> None:
        """Ask a run in another thread to end early. If the device can do that, `enqueue` raises there."""


class Graph(Closeable):
    """Work that every call enqueues again. This one calls the function; a device may replay a capture of it."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def __call__(self) -> None:
        """Enqueue the work."""
        self._work()


class Device(Closeable, ABC):
    """A place where networks run.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        steps_in_flight: how many steps the loop enqueues before it waits for the first of them. 1 is right if a step
            has finished when the call that enqueues it returns.
    """

    kind: ClassVar[Literal["cpu", "cuda"]] = "cpu"
    steps_in_flight: ClassVar[int] = 1

    @property
    @abstractmethod
    def name(self) -> str:
        """The device's name in messages, such as ``onnxruntime (CPU)``."""

    @property
    def runs_engines(self) -> bool:
        """True if the networks are the bundle's TensorRT engines."""
        return False

    @property
    def notes(self) -> Sequence[str]:
        """Why the device runs otherwise than usual, such as without graphs, a sentence each."""
        return ()

    @abstractmethod
    def open(self, bundle: Bundle, network: NetworkName, *, streamed_bytes: int = 0) -> Session:
        """Load one network of a bundle. A device that can stream weights leaves ``streamed_bytes`` in host memory.

        Raises:
            BackendError: this device cannot run the network.
            DeviceMemoryError: the network does not fit.
        """

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike, name: str) -> Buffer:
        """Allocate a buffer with undefined content. ``name`` appears in error messages."""

    @abstractmethod
    def host(self, shape: Sequence[int], dtype: npt.DTypeLike, name: str) -> HostBuffer:
        """Allocate host memory for copies to and from the device."""

    @abstractmethod
    def event(self) -> Event:
        """Make an event that is not recorded yet."""

    @abstractmethod
    def send(self, source: HostBuffer, target: Buffer) -> None:
        """Fill ``target`` from the start of ``source``, which must not change before a later event has been reached."""

    @abstractmethod
    def fetch(self, source: Buffer, target: HostBuffer, done: Event) -> None:
        """Copy to the start of ``target`` beside the work that follows, and record ``done`` after the copy."""

    @abstractmethod
    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy on the device. Both buffers have the same number of bytes; their shapes may differ."""

    def wait_for(self, event: Event) -> None:
        """Make work that is enqueued from now on wait for ``event``. The host does not wait."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """Make a graph of what ``work`` enqueues: networks only, and the same buffers every time."""
        return Graph(work)

    def share_frames(self, shape: Sequence[int]) -> SharedFrames | None:  # noqa: ARG002
        """Allocate memory for frames ``[n, H, W, 3]`` that stay on the device; None if that is the host.

        Raises:
            DeviceMemoryError: too little is free, or the budget does not allow it.
        """
        return None

    def measure_layers(self, times: LayerTimes) -> None:  # noqa: ARG002
        """Add the time of every layer to ``times``, of networks that are opened from now on; complete once they close.

        Runs are slower while layers are measured, and their work is not captured.

        Raises:
            ArgumentError: this device does not report such times.
        """
        raise ArgumentError(
            f"{self.name} does not report the times of layers; TensorRT does, "
            "and so does ONNX Runtime on the CPU (--device cpu)"
        )

    def synchronize(self) -> None:
        """Wait until all work is done."""

    def reserve(self, nbytes: int) -> None:
        """Set the size of the activation memory that all networks share, if they share one."""

    def trim(self) -> None:
        """Free activation memory that no network needs at the moment."""

    def free_bytes(self) -> int | None:
        """Memory that is free for tensors and networks, in bytes. None means that the device does not count it."""
        return None

    def set_budget(self, nbytes: int | None) -> None:
        """Set the most bytes that may be allocated on the device. A device that does not count memory ignores it.

        Raises:
            ArgumentError: this device cannot keep a budget.
        """


def upload(device: Device, array: Array, name: str) -> Buffer:
    """Allocate a buffer with the content of ``array``, and wait for the copy."""
    buffer = device.empty(array.shape, array.dtype, name)
    try:
        _write(device, array, buffer)
    except BaseException:
        buffer.close()
        raise
    return buffer


def _write(device: Device, array: Array, buffer: Buffer) -> None:
    with (
        device.host(buffer.shape, buffer.dtype, "an upload") as host,
        device.event() as done,
        synchronized_on_error(device),
    ):
        host.array[...] = array
        device.send(host, buffer)
        done.record()
        done.wait()


def download(device: Device, buffer: Buffer) -> Array:
    """Copy ``buffer`` to a new array, and wait for the work that fills the buffer."""
    with ExitStack() as stack:
        host = stack.enter_context(device.host(buffer.shape, buffer.dtype, "a download"))
        done = stack.enter_context(device.event())
        stack.enter_context(synchronized_on_error(device))
        device.fetch(buffer, host, done)
        done.wait()
        return host.array.copy()


@contextmanager
def synchronized_on_error(device: Device) -> Iterator[None]:
    """If the block fails, wait for the work that it enqueued, because that work may use memory that is freed next."""
    try:
        yield
    except BaseException:
        with suppress(BackendError):  # the first failure is the one to report
            device.synchronize()
        raise
