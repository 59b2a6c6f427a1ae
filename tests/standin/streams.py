"""Streams, events and graphs of the stand-in. A queue runs only when something waits for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from tests.standin.clock import Clock, Range
from tests.standin.memory import Allocation

__all__ = [
    "Capture",
    "Context",
    "Event",
    "Graph",
    "GraphExec",
    "Item",
    "Operation",
    "Record",
    "Stream",
    "run",
    "set_time",
]


@dataclass(eq=False)
class Context:
    """The primary context of a device, with the number of times that it is retained."""

    handle: int
    device: int
    references: int = 1


@dataclass(frozen=True, eq=False)
class Operation:
    """Work that reads and writes memory: a copy, a memset, or a run of a network."""

    name: str
    run: Callable[[], object]
    reads: tuple[Range, ...]
    writes: tuple[Range, ...]
    allocations: tuple[Allocation, ...]
    stale: Callable[[], str | None] | None = None
    """Says at a launch of a graph why the operation is not what was captured."""


@dataclass(eq=False)
class Item:
    """An entry of a stream's queue: an operation, a wait for another item, or the record of an event."""

    stream: Stream
    name: str
    work: Callable[[], object] | None = None
    waits_for: Item | None = None
    allocations: tuple[Allocation, ...] = ()
    done: bool = False


@dataclass(eq=False)
class Record:
    """One call of `cuEventRecord`. A wait uses the latest record at its time; later records do not change it."""

    clock: Clock
    item: Item | None = None  # None if it was recorded in a capture
    capture: Capture | None = None
    time: float = 0.0
    polls: int = 0


@dataclass(eq=False)
class Event:
    handle: int
    context: Context
    timing: bool
    record: Record | None = None


@dataclass(eq=False)
class Stream:
    handle: int
    context: Context
    clock: Clock = field(default_factory=dict)
    ticks: int = 0
    queue: deque[Item] = field(default_factory=deque)
    capture: Capture | None = None

    def push(self, item: Item) -> Item:
        self.queue.append(item)
        return item


@dataclass(eq=False)
class Capture:
    """The operations of a stream that is being captured. They are not queued."""

    stream: Stream
    mode: Any
    thread: int
    operations: list[Operation] = field(default_factory=list)
    valid: bool = True


@dataclass(eq=False)
class Graph:
    handle: int
    context: Context
    operations: tuple[Operation, ...]


@dataclass(eq=False)
class GraphExec:
    handle: int
    context: Context
    operations: tuple[Operation, ...]
    clock: Clock = field(default_factory=dict)
    last: Item | None = None

    def named(self) -> Iterable[Operation]:
        """The operations, with a note in their names that they are of a graph."""
        return (replace(operation, name=f"{operation.name} (of a graph)") for operation in self.operations)


def run(target: Item, ran: list[str]) -> None:
    """Run ``target`` after everything before it on its stream and everything that those items wait for."""
    needed = [target]
    while needed:
        item = needed[-1]
        if item.done:
            needed.pop()
            continue
        head = item.stream.queue[0]
        if head.waits_for is not None and not head.waits_for.done:
            needed.append(head.waits_for)
            continue
        item.stream.queue.popleft()
        head.done = True  # set before the work, so that failed work is not repeated
        if head.work is not None:
            head.work()
            ran.append(head.name)


def set_time(record: Record) -> None:
    """Set the time at which the stream reached the event."""
    record.time = time.perf_counter()
