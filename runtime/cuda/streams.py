"""Streams, events, and graphs of captured work."""

from __future__ import annotations

from typing import Any

from svd_trt.errors import ArgumentError
from svd_trt.runtime.closeable import Closeable
from svd_trt.runtime.cuda.context import Context
from svd_trt.runtime.device import Event
from svd_trt.units import shorten

__all__ = ["CapturedGraph", "CudaEvent", "Stream", "callers_stream"]

_DEFAULT_STREAMS = {0: "the default stream", 1: "the default stream", 2: "the default stream of each thread"}


def callers_stream(stream: Any, context: Context) -> Stream:
    """The stream that ``stream`` names, which is kept until the result is closed; see `handle_of`."""
    return Stream(context, "compute", handle_of(stream, context), owner=stream)


def handle_of(stream: Any, context: Context) -> int:
    """The handle of a stream of torch, CuPy, cuda.core or any library with ``__cuda_stream__``, or the number itself.

    Raises:
        ArgumentError: it is no stream, a default stream, or one of another context.
    """
    if hasattr(stream, "__cuda_stream__"):
        handle: Any = stream.__cuda_stream__()[1]
    else:
        found = (getattr(stream, name, None) for name in ("cuda_stream", "ptr"))  # of torch, of CuPy
        handle = next((value for value in found if value is not None), stream)
    try:
        number = int(handle)
    except (TypeError, ValueError):
        number = -1
    if isinstance(handle, bool | str | bytes | float) or number < 0:
        raise ArgumentError(f"stream must be a CUDA stream or its handle, not {shorten(repr(stream))}")
    if number in _DEFAULT_STREAMS:
        raise ArgumentError(
            f"stream is {_DEFAULT_STREAMS[number]}, whose work cannot be captured in graphs; pass one that was made, "
            "such as torch.cuda.Stream()"
        )
    if not context.owns(context.driver.bindings.CUstream(number)):
        gpu = context.gpu
        raise ArgumentError(
            f"stream is not of the primary context of {gpu.name}, cuda:{gpu.index}; name its GPU with device="
        )
    return number


class Stream(Closeable):
    """A queue of work that never waits for the legacy default stream, or a stream of the caller's.

    Args:
        context: the GPU's context.
        name: for messages.
        handle: of the caller's stream, which is not destroyed with this object; None makes one.
        owner: the caller's object, which may destroy the stream when nothing refers to it.
    """

    def __init__(self, context: Context, name: str, handle: int | None = None, owner: object = None) -> None:
        self.context = context
        self.name = name
        self._owned = handle is None
        self._owner = owner
        if handle is not None:
            self._handle: Any = context.driver.bindings.CUstream(handle)
            return
        flags = context.driver.bindings.CUstream_flags.CU_STREAM_NON_BLOCKING
        self._handle = context.call("cuStreamCreate", int(flags), what=f"the {name} stream")

    @property
    def handle(self) -> int:
        """The ``CUstream`` as an integer, as TensorRT and ONNX Runtime take it."""
        assert self._handle is not None, "the stream is closed"
        return int(self._handle)

    def wait_for(self, event: CudaEvent) -> None:
        """Make work that is enqueued from now on wait for ``event``. The host does not wait."""
        self.context.call("cuStreamWaitEvent", self._handle, event.handle, 0, what=f"the {self.name} stream")

    def copy_in(self, target: int, source: int, nbytes: int, what: str) -> None:
        """Copy from pinned host memory to the device."""
        self.context.call("cuMemcpyHtoDAsync", target, source, nbytes, self._handle, what=what, nbytes=nbytes)

    def copy_out(self, target: int, source: int, nbytes: int, what: str) -> None:
        """Copy from the device to pinned host memory."""
        self.context.call("cuMemcpyDtoHAsync", target, source, nbytes, self._handle, what=what, nbytes=nbytes)

    def copy_within(self, target: int, source: int, nbytes: int, what: str) -> None:
        """Copy within the device."""
        self.context.call("cuMemcpyDtoDAsync", target, source, nbytes, self._handle, what=what, nbytes=nbytes)

    def synchronize(self) -> None:
        """Wait on the host until everything enqueued is done."""
        self.context.call("cuStreamSynchronize", self._handle, what=f"the {self.name} stream")

    def begin_capture(self) -> None:
        """Capture the work that is enqueued from now on instead of running it. Other threads do not interfere."""
        mode = self.context.driver.bindings.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.context.call("cuStreamBeginCapture", self._handle, mode, what=f"the {self.name} stream")

    def end_capture(self) -> CapturedGraph:
        """Make a graph of the work that was enqueued since `begin_capture`.

        Raises:
            CudaError: a call cannot be part of a graph.
        """
        captured = self.context.call("cuStreamEndCapture", self._handle, what=f"the {self.name} stream")
        try:
            return CapturedGraph(self.context, self.context.call("cuGraphInstantiate", captured, 0))
        finally:
            self.context.call("cuGraphDestroy", captured)

    def close(self) -> None:
        """Destroy the stream after its work is done. A stream of the caller's is only waited for."""
        if self._handle is not None:
            self.synchronize()
            handle, self._handle, self._owner = self._handle, None, None
            if self._owned:
                self.context.call("cuStreamDestroy", handle)


class CudaEvent(Event):
    """A point in ``stream``, once recorded."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        flags = stream.context.driver.bindings.CUevent_flags.CU_EVENT_BLOCKING_SYNC  # threads that wait do not spin
        self._handle: Any = stream.context.call("cuEventCreate", int(flags))

    @property
    def handle(self) -> Any:
        assert self._handle is not None, "the event is closed"
        return self._handle

    def record(self) -> None:
        """Set the event to the point after everything that is enqueued on its stream."""
        self.record_on(self._stream)

    def record_on(self, stream: Stream) -> None:
        """Set the event to a point of another stream."""
        stream.context.call("cuEventRecord", self.handle, int(stream.handle), what=f"the {stream.name} stream")

    def wait(self) -> None:
        """Wait on the host until the device has reached the event."""
        self._stream.context.call("cuEventSynchronize", self.handle)

    def seconds_since(self, earlier: Event) -> float:
        """Seconds between two events that the device has reached."""
        assert isinstance(earlier, CudaEvent)
        milliseconds = self._stream.context.call("cuEventElapsedTime", earlier.handle, self.handle)
        return float(milliseconds) / 1e3

    def close(self) -> None:
        """Destroy the event."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            self._stream.context.call("cuEventDestroy", handle)


class CapturedGraph(Closeable):
    """Captured work that one call enqueues."""

    def __init__(self, context: Context, executable: Any) -> None:
        self._context = context
        self._executable = executable

    def launch(self, stream: Stream) -> None:
        """Enqueue all of the work."""
        self._context.call("cuGraphLaunch", self._executable, stream.handle, what=f"the {stream.name} stream")

    def close(self) -> None:
        """Destroy the graph. No launch of it may be running."""
        if self._executable is not None:
            executable, self._executable = self._executable, None
            self._context.call("cuGraphExecDestroy", executable)
