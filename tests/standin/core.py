"""The state of a stand-in device and the checks that its driver functions share."""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver

from tests.standin.calls import Call, Needs, Refused, number
from tests.standin.clock import Access, Clock, Range, join, overlap
from tests.standin.memory import POISON, Allocation, Kind, Memory
from tests.standin.streams import Capture, Context, Event, Graph, GraphExec, Item, Operation, Stream, run

__all__ = ["Core", "Live"]

T = TypeVar("T", Stream, Event, Graph, GraphExec)

_DEFAULT_STREAMS = (0, 1, 2)  # no stream, the legacy default stream, the default stream of the thread


@dataclass(frozen=True)
class Live:
    """The number of objects that were made and not freed, by kind."""

    allocations: int
    pinned: int
    streams: int
    events: int
    graphs: int
    graph_execs: int
    contexts: int
    engines: int
    """Memory blocks of engines: weights, and activations of contexts that allocate their own."""


class Core:
    """The state of `StandInCuda` and everything except the functions of the driver."""

    def __init__(self, devices: int, total_bytes: int) -> None:
        self.calls: list[Call] = []
        self.ran: list[str] = []
        """The names of the operations in the order in which they ran."""
        self.violations: list[str] = []
        """All mistakes, including those whose AssertionError was caught or could not be raised."""
        self.refuse_capture = False
        self._devices = devices
        self._memory = Memory(devices, total_bytes)
        self._lock = threading.RLock()
        self._thread = threading.local()
        self._initialised = False
        self._handles = itertools.count(0x1000, 0x10)
        self._objects: dict[int, Any] = {}
        self._contexts: dict[int, Context] = {}
        self._captures: list[Capture] = []
        self._host: Clock = {}
        self._to_fail: dict[str, list[list[Any]]] = {}
        self._to_free: collections.deque[Allocation] = collections.deque()

    # For tests.

    def names(self) -> list[str]:
        """The names of the driver functions that were called, in order."""
        return [call.name for call in self.calls]

    def count(self, name: str) -> int:
        """How many times the driver function ``name`` was called."""
        return self.names().count(name)

    def fail(self, name: str, result: Any, on: int = 1) -> None:
        """Make the ``on``-th call of ``name``, counted from now, do nothing and return ``result``."""
        assert hasattr(self, name), name
        self._to_fail.setdefault(name, []).append([on, driver.CUresult(result)])

    @property
    def live(self) -> Live:
        with self._lock:
            self._free_collected()
            kinds = [type(thing) for thing in self._objects.values()]
            return Live(
                allocations=len(self._memory.of_kind("device")),
                pinned=len(self._memory.of_kind("pinned")),
                streams=kinds.count(Stream),
                events=kinds.count(Event),
                graphs=kinds.count(Graph),
                graph_execs=kinds.count(GraphExec),
                contexts=sum(context.references for context in self._contexts.values()),
                engines=len(self._memory.of_kind("engine")),
            )

    @property
    def bytes_in_use(self) -> int:
        """Bytes of allocations and engines, without the memory of the context."""
        with self._lock:
            self._free_collected()
            return sum(self._memory.used)

    @property
    def peak_bytes(self) -> int:
        return self._memory.peak

    def assert_clean(self) -> None:
        """Raise AssertionError if something was not freed, or if a mistake was recorded."""
        leaks = [f"{count} {kind.replace('_', ' ')}" for kind, count in asdict(self.live).items() if count]
        kinds: tuple[Kind, ...] = ("device", "pinned", "engine")
        leaks += [str(allocation) for kind in kinds for allocation in self._memory.of_kind(kind)]
        assert not leaks, f"not freed: {', '.join(leaks)}"
        assert not self.violations, "; ".join(self.violations)

    def view(self, address: int, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Device or pinned memory as an array, without synchronisation."""
        kind = np.dtype(dtype)
        nbytes = int(np.prod(shape)) * kind.itemsize
        allocation = self.locate((number(address), nbytes), "view", ("device", "pinned"))
        return np.frombuffer(
            allocation.buffer, kind, int(np.prod(shape)), number(address) - allocation.address
        ).reshape(tuple(shape))

    # For the stand-in for TensorRT.

    def enqueue(
        self,
        stream: Any,
        name: str,
        work: Callable[[], object],
        reads: Iterable[Range],
        writes: Iterable[Range],
        stale: Callable[[], str | None] | None = None,
    ) -> Any:
        """Add work to a stream, or to the stream's capture, and return the driver's status.

        ``stale`` says at each launch of a graph why its operation is not valid any more; None if it is.
        """
        with self._lock:
            try:
                self._check_context()
                operation = replace(self._operation(name, work, reads, writes), stale=stale)
                self._submit(self._stream(stream), operation)
            except Refused as refused:
                return refused.result
            return driver.CUresult.CUDA_SUCCESS

    def locate(self, where: Range, what: str, kinds: tuple[Kind, ...] = ("device",)) -> Allocation:
        """The live allocation of one of ``kinds`` that holds the range. Raises AssertionError if there is none."""
        found = self._memory.find(*where)
        if found is None or found.kind not in kinds:
            near = self._memory.find(where[0], 0)
            raise self.violation(
                f"{what}: {where[1]} bytes at {where[0]:#x} are not inside live {' or '.join(kinds)} memory"
                + (f"; the address is in {near}" if near else "")
            )
        return found

    def has_context(self) -> bool:
        """True if the calling thread has a current context."""
        return self._current() is not None

    def is_capturing(self, stream: Any) -> bool:
        with self._lock:
            return self._stream(stream).capture is not None

    def invalidate_capture(self, stream: Any) -> None:
        """Make the capture of ``stream`` invalid, as an unsafe call during a capture does."""
        with self._lock:
            capture = self._stream(stream).capture
            if capture is not None:
                capture.valid = False

    def reserve(self, nbytes: int) -> Allocation | None:
        """Allocate device memory for an engine; None if the device is full. `free_later` frees it."""
        with self._lock:
            self._free_collected()
            context = self._current()
            assert context is not None
            return self._memory.allocate("engine", nbytes, context.device)

    def free_later(self, allocation: Allocation) -> None:
        """Free engine memory at the next call, because finalizers run at any time and in any thread."""
        self._to_free.append(allocation)

    def violation(self, message: str) -> AssertionError:
        """Record a mistake and return its exception. The record stays if the code under test catches the exception."""
        self.violations.append(message)
        return AssertionError(message)

    # For the driver's functions.

    def _check_call(self, name: str, needs: Needs, unsafe: bool) -> None:
        self._free_collected()
        due = [waiting for waiting in self._to_fail.get(name, []) if waiting[0] == 1]
        for waiting in self._to_fail.get(name, []):
            waiting[0] -= 1
        if due:
            raise Refused(due[0][1].name)
        if needs != "nothing" and not self._initialised:
            raise Refused("CUDA_ERROR_NOT_INITIALIZED")
        if needs == "context":
            self._check_context()
        if unsafe:
            self._refuse_in_capture()

    def _current(self) -> Context | None:
        context: Context | None = getattr(self._thread, "context", None)
        return context if context is not None and context.references else None

    def _check_context(self) -> Context:
        context = self._current()
        if context is None:
            gone = getattr(self._thread, "context", None) is not None
            raise Refused("CUDA_ERROR_CONTEXT_IS_DESTROYED" if gone else "CUDA_ERROR_INVALID_CONTEXT")
        return context

    def _refuse_in_capture(self) -> None:
        modes = driver.CUstreamCaptureMode
        for capture in self._captures:
            mine = capture.thread == threading.get_ident()
            everywhere = capture.mode == modes.CU_STREAM_CAPTURE_MODE_GLOBAL
            if everywhere or (mine and capture.mode == modes.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL):
                capture.valid = False
                raise Refused("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")

    def _new(self, make: Callable[[int, Context], T]) -> T:
        thing = make(next(self._handles), self._check_context())
        self._objects[thing.handle] = thing
        return thing

    def _get(self, kind: type[T], handle: Any) -> T:
        thing = self._objects.get(number(handle))
        if not isinstance(thing, kind):
            raise self.violation(f"{number(handle):#x} is no live {kind.__name__}")
        if thing.context is not self._current():
            raise self.violation(f"{kind.__name__} {thing.handle:#x} belongs to a context that is not current")
        return thing

    def _stream(self, handle: Any) -> Stream:
        if number(handle) in _DEFAULT_STREAMS:
            raise self.violation("hidden default stream")
        return self._get(Stream, handle)

    def _operation(
        self, name: str, work: Callable[[], object], reads: Iterable[Range], writes: Iterable[Range]
    ) -> Operation:
        reads, writes = (tuple(r for r in ranges if r[1]) for ranges in (reads, writes))
        for index, target in enumerate(writes):
            if any(overlap(target, other) for other in reads + writes[:index]):
                raise self.violation(f"{name} writes to {target[0]:#x}, which it also reads, or writes twice")
        anything: tuple[Kind, ...] = ("device", "pinned", "engine")
        allocations = {self.locate(where, name, anything): None for where in reads + writes}
        return Operation(name, work, reads, writes, tuple(allocations))

    def _submit(self, stream: Stream, operation: Operation) -> Item | None:
        """Add an operation to the stream's queue or capture."""
        if stream.capture is not None:
            if not stream.capture.valid:
                raise Refused("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
            stream.capture.operations.append(operation)
            return None
        self._check_order(stream, operation)
        self._poison_targets(operation)
        return stream.push(Item(stream, operation.name, operation.run, allocations=operation.allocations))

    def _check_order(self, stream: Stream, operation: Operation) -> None:
        join(stream.clock, self._host)
        stream.ticks += 1
        stream.clock[stream.handle] = stream.ticks
        what = f"{operation.name} on stream {stream.handle:#x}"
        for ranges, write in ((operation.reads, False), (operation.writes, True)):
            for where in ranges:
                access = Access(where, write, stream.handle, stream.ticks, what)
                other = self.locate(where, what, ("device", "pinned", "engine")).accesses.add(
                    access, stream.clock, self._host
                )
                if other is not None:
                    raise self.violation(f"race: {_describe(other)} and {_describe(access)} are not ordered")

    def _poison_targets(self, operation: Operation) -> None:
        """Fill pinned targets with poison, so that a read before the copy is done does not find older data."""
        pending = {a for item in self._pending() for a in item.allocations}
        for address, nbytes in operation.writes:
            allocation = self.locate((address, nbytes), operation.name, ("device", "pinned", "engine"))
            if allocation.kind == "pinned" and allocation not in pending:
                self.view(address, (nbytes,), np.uint8)[...] = POISON

    def _pending(self) -> list[Item]:
        return [item for thing in self._objects.values() if isinstance(thing, Stream) for item in thing.queue]

    def _finish(self, streams: Iterable[Stream]) -> None:
        """Run everything on these streams and record that the host waited for them."""
        for stream in streams:
            if stream.queue:
                run(stream.queue[-1], self.ran)
            join(self._host, stream.clock)

    def _finish_device(self, device: int) -> None:
        things = list(self._objects.values())
        self._finish(thing for thing in things if isinstance(thing, Stream) and thing.context.device == device)

    def _free_collected(self) -> None:
        """Free the memory of engines that the garbage collector has finalized."""
        while self._to_free:
            allocation = self._to_free.popleft()
            busy = allocation.accesses.unfinished(self._host)
            if busy:
                self.violations.append(
                    f"an engine or its context was released while {_describe(busy[0])} may be running"
                )
                self._finish_device(allocation.device)
            self._memory.free(allocation)


def _describe(access: Access) -> str:
    return f"{access.what} ({'writing' if access.write else 'reading'} {access.range[1]} bytes at {access.range[0]:#x})"
