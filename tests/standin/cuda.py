# ruff: noqa: N802, N803  # the names of the driver, so that keyword arguments work too
"""A CUDA driver without a GPU. It computes real numbers in host memory and raises AssertionError on mistakes."""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import Any

from cuda.bindings import driver

from tests.standin.calls import Refused, driver_function, number
from tests.standin.clock import join
from tests.standin.devices import Devices
from tests.standin.memory import Kind
from tests.standin.streams import Capture, Event, Graph, GraphExec, Item, Record, Stream, run, set_time

__all__ = ["StandInCuda"]

_POLLS = 3  # `cuEventQuery` calls until an event is done


class StandInCuda(Devices):
    """A stand-in for the module ``cuda.bindings.driver``.

    Work on a stream runs only when something waits for it, and then only the work that the wait needs. A missing
    dependency therefore gives poison or old data every time. Functions that are not modelled raise AttributeError.
    Types and enumerations are the real ones.

    Attributes:
        calls: every call of a driver function.
        refuse_capture: every capture of a stream fails.
    """

    def __init__(
        self,
        *,
        devices: int = 1,
        total_bytes: int = 8 << 30,
        capability: tuple[int, int] = (8, 9),
        driver_version: int = 13000,
    ) -> None:
        super().__init__(devices, total_bytes, capability, driver_version)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("CU") and hasattr(driver, name):
            return getattr(driver, name)
        raise AttributeError(f"the stand-in for cuda.bindings.driver has no {name}")

    # Memory.

    @driver_function(2)
    def cuMemGetInfo(self) -> tuple[int, int]:
        return self._memory.free_bytes(self._check_context().device), self._memory.total_bytes

    @driver_function(1, unsafe=True)
    def cuMemAlloc(self, bytesize: int) -> Any:
        return driver.CUdeviceptr(self._allocate("device", bytesize))

    @driver_function(unsafe=True)
    def cuMemFree(self, dptr: Any) -> None:
        # The real function may synchronise first but does not guarantee it, so the caller must have waited.
        allocation = self._memory.at(number(dptr))
        busy = allocation.accesses.unfinished(self._host) if allocation else []
        if busy:
            raise self.violation(f"{allocation} was freed while {busy[0].what} may be using it")
        self._finish_device(self._check_context().device)
        self._free("device", dptr)

    @driver_function(1, unsafe=True)
    def cuMemHostAlloc(self, bytesize: int, Flags: int) -> int:
        return self._allocate("pinned", bytesize)

    @driver_function(unsafe=True)
    def cuMemFreeHost(self, p: Any) -> None:
        allocation = self._memory.at(number(p))
        busy = allocation.accesses.unfinished(self._host) if allocation else []
        if busy:
            raise self.violation(f"{allocation} was freed while {busy[0].what} may be using it")
        self._free("pinned", p)

    @driver_function()
    def cuMemcpyHtoDAsync(self, dstDevice: Any, srcHost: Any, ByteCount: int, hStream: Any) -> None:
        self._copy("HtoD", dstDevice, "device", srcHost, "pinned", ByteCount, hStream)

    @driver_function()
    def cuMemcpyDtoHAsync(self, dstHost: Any, srcDevice: Any, ByteCount: int, hStream: Any) -> None:
        self._copy("DtoH", dstHost, "pinned", srcDevice, "device", ByteCount, hStream)

    @driver_function()
    def cuMemcpyDtoDAsync(self, dstDevice: Any, srcDevice: Any, ByteCount: int, hStream: Any) -> None:
        self._copy("DtoD", dstDevice, "device", srcDevice, "device", ByteCount, hStream)

    @driver_function()
    def cuMemsetD8Async(self, dstDevice: Any, uc: int, N: int, hStream: Any) -> None:
        stream, target = self._stream(hStream), (number(dstDevice), N)
        self.locate(target, "memset")
        work = functools.partial(ctypes.memset, target[0], uc, N)
        self._submit(stream, self._operation(f"memset of {N} bytes", work, (), (target,)))

    # Streams and events.

    @driver_function(1)
    def cuStreamCreate(self, Flags: int) -> Any:
        if not number(Flags) & driver.CUstream_flags.CU_STREAM_NON_BLOCKING:
            raise self.violation("hidden default stream: a blocking stream synchronises with it")
        return driver.CUstream(self._new(Stream).handle)

    @driver_function(1)
    def cuStreamGetCtx(self, hStream: Any) -> Any:
        stream = self._objects.get(number(hStream))  # of any context: which one is the question
        if not isinstance(stream, Stream):
            raise self.violation(f"{number(hStream):#x} is no live stream")
        return driver.CUcontext(stream.context.handle)

    @driver_function()
    def cuStreamDestroy(self, hStream: Any) -> None:
        stream = self._stream(hStream)
        if stream.capture is not None:
            raise self.violation(f"stream {stream.handle:#x} was destroyed while it was captured")
        if stream.queue:
            self.violations.append(f"stream {stream.handle:#x} was destroyed before {stream.queue[-1].name} was done")
            run(stream.queue[-1], self.ran)
        del self._objects[stream.handle]

    @driver_function(unsafe=True)
    def cuStreamSynchronize(self, hStream: Any) -> None:
        stream = self._stream(hStream)
        if stream.capture is not None:
            stream.capture.valid = False
            raise Refused("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
        self._finish([stream])

    @driver_function()
    def cuStreamWaitEvent(self, hStream: Any, hEvent: Any, Flags: int) -> None:
        stream, record = self._stream(hStream), self._get(Event, hEvent).record
        captured = record.capture if record else None
        if record is None or (captured is not None and captured is stream.capture):
            return  # nothing to wait for, or work of the same stream, which is in order anyway
        if stream.capture is not None:
            stream.capture.valid = False
            raise Refused("CUDA_ERROR_STREAM_CAPTURE_ISOLATION")
        if captured is not None:
            raise self.violation("waiting for an event of another stream's capture is not modelled")
        join(stream.clock, record.clock)
        if record.item is not None and not record.item.done:
            stream.push(Item(stream, "wait", waits_for=record.item))

    @driver_function(1)
    def cuEventCreate(self, Flags: int) -> Any:
        timing = not number(Flags) & driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
        return driver.CUevent(self._new(lambda handle, context: Event(handle, context, timing)).handle)

    @driver_function()
    def cuEventDestroy(self, hEvent: Any) -> None:
        event = self._get(Event, hEvent)
        if event.record is not None and event.record.item is not None and not event.record.item.done:
            self.violations.append(f"event {event.handle:#x} was destroyed before it was reached")
        del self._objects[event.handle]

    @driver_function()
    def cuEventRecord(self, hEvent: Any, hStream: Any) -> None:
        event, stream = self._get(Event, hEvent), self._stream(hStream)
        if stream.capture is not None:
            event.record = Record({}, capture=stream.capture)
            return
        join(stream.clock, self._host)
        record = event.record = Record(dict(stream.clock))
        record.item = stream.push(Item(stream, f"event {event.handle:#x}", functools.partial(set_time, record)))

    @driver_function(unsafe=True)
    def cuEventSynchronize(self, hEvent: Any) -> None:
        record = self._recorded(hEvent)
        if record is not None:
            self._reach(record)

    @driver_function(unsafe=True)
    def cuEventQuery(self, hEvent: Any) -> None:
        record = self._recorded(hEvent)
        if record is None:
            return
        record.polls += 1
        assert record.item is not None
        if not record.item.done and record.polls < _POLLS:
            raise Refused("CUDA_ERROR_NOT_READY")
        self._reach(record)

    @driver_function(1)
    def cuEventElapsedTime(self, hStart: Any, hEnd: Any) -> float:
        events = [self._get(Event, handle) for handle in (hStart, hEnd)]
        start, end = (self._recorded(handle) for handle in (hStart, hEnd))
        if start is None or end is None or not all(event.timing for event in events):
            raise Refused("CUDA_ERROR_INVALID_HANDLE")
        if not all(record.item is not None and record.item.done for record in (start, end)):
            raise Refused("CUDA_ERROR_NOT_READY")
        return 1e3 * (end.time - start.time)

    # Graphs.

    @driver_function()
    def cuStreamBeginCapture(self, hStream: Any, mode: Any) -> None:
        stream = self._stream(hStream)
        if self.refuse_capture:
            raise Refused("CUDA_ERROR_NOT_SUPPORTED")
        if stream.capture is not None:
            raise Refused("CUDA_ERROR_ILLEGAL_STATE")
        stream.capture = Capture(stream, driver.CUstreamCaptureMode(mode), threading.get_ident())
        self._captures.append(stream.capture)

    @driver_function(1)
    def cuStreamEndCapture(self, hStream: Any) -> Any:
        stream = self._stream(hStream)
        capture = stream.capture
        if capture is None:
            raise Refused("CUDA_ERROR_ILLEGAL_STATE")
        relaxed = capture.mode == driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        if capture.thread != threading.get_ident() and not relaxed:
            raise Refused("CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD")
        stream.capture = None
        self._captures.remove(capture)
        if not capture.valid:
            raise Refused("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        operations = tuple(capture.operations)
        return driver.CUgraph(self._new(lambda handle, context: Graph(handle, context, operations)).handle)

    @driver_function(1)
    def cuStreamIsCapturing(self, hStream: Any) -> Any:
        capture, states = self._stream(hStream).capture, driver.CUstreamCaptureStatus
        if capture is None:
            return states.CU_STREAM_CAPTURE_STATUS_NONE
        valid = capture.valid
        return states.CU_STREAM_CAPTURE_STATUS_ACTIVE if valid else states.CU_STREAM_CAPTURE_STATUS_INVALIDATED

    @driver_function(1)
    def cuGraphInstantiate(self, hGraph: Any, flags: int) -> Any:
        operations = self._get(Graph, hGraph).operations
        return driver.CUgraphExec(self._new(lambda handle, context: GraphExec(handle, context, operations)).handle)

    @driver_function()
    def cuGraphLaunch(self, hGraphExec: Any, hStream: Any) -> None:
        graph, stream = self._get(GraphExec, hGraphExec), self._stream(hStream)
        for operation in graph.operations:
            if operation.stale is not None and (why := operation.stale()) is not None:
                raise self.violation(f"a graph was launched although {why}")
            for allocation in operation.allocations:
                if allocation.freed:
                    raise self.violation(
                        f"a graph was launched whose {operation.name} uses {allocation}, which was freed"
                    )
        if stream.capture is None and graph.last is not None:  # launches of one graph run one after another
            join(stream.clock, graph.clock)
            if not graph.last.done:
                stream.push(Item(stream, "wait", waits_for=graph.last))
        for operation in graph.named():
            graph.last = self._submit(stream, operation) or graph.last
        graph.clock = dict(stream.clock)

    @driver_function()
    def cuGraphExecDestroy(self, hGraphExec: Any) -> None:
        graph = self._get(GraphExec, hGraphExec)
        if graph.last is not None and not graph.last.done:
            self.violations.append(f"graph {graph.handle:#x} was destroyed before its last launch was done")
        del self._objects[graph.handle]

    @driver_function()
    def cuGraphDestroy(self, hGraph: Any) -> None:
        del self._objects[self._get(Graph, hGraph).handle]

    # Shared.

    def _allocate(self, kind: Kind, nbytes: int) -> int:
        if nbytes <= 0:
            raise Refused("CUDA_ERROR_INVALID_VALUE")
        allocation = self._memory.allocate(kind, nbytes, self._check_context().device)
        if allocation is None:
            raise Refused("CUDA_ERROR_OUT_OF_MEMORY")
        return allocation.address

    def _free(self, kind: Kind, address: Any) -> None:
        allocation = self._memory.at(number(address))
        if allocation is None or allocation.kind != kind:
            self.violations.append(f"{number(address):#x}, which is freed, is not live {kind} memory")
            raise Refused("CUDA_ERROR_INVALID_VALUE")
        self._memory.free(allocation)

    def _copy(
        self, what: str, target: Any, target_kind: Kind, source: Any, source_kind: Kind, nbytes: int, stream: Any
    ) -> None:
        name = f"{what} copy of {nbytes} bytes"
        into, out_of = (number(target), nbytes), (number(source), nbytes)
        for where, kind in ((into, target_kind), (out_of, source_kind)):
            self.locate(
                where, name if kind == "device" else f"pageable memory in an asynchronous copy: {name}", (kind,)
            )
        work = functools.partial(ctypes.memmove, into[0], out_of[0], nbytes)
        self._submit(self._stream(stream), self._operation(name, work, (out_of,), (into,)))

    def _recorded(self, handle: Any) -> Record | None:
        """The record of an event, or None if it was not recorded."""
        record = self._get(Event, handle).record
        if record is not None and record.capture is not None:
            raise Refused("CUDA_ERROR_CAPTURED_EVENT")
        return record

    def _reach(self, record: Record) -> None:
        assert record.item is not None
        if not record.item.done:
            run(record.item, self.ran)
        join(self._host, record.clock)
