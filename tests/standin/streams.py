"""What runs on the stand-in's device: streams, events, graphs, and the queues that run only when they have to."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from tests.standin.clock import Clock, Range
from tests.standin.memory import Allocation

__all__ = ["Capture", "Context", "Event", "Graph", "GraphExec", "Item", "Operation", "Record", "Stream", "run", "stamp"]


@dataclass(eq=False)
class Context:
    """The primary context of a device."""

    handle: int
    device: int
    references: int = 1


@dataclass(frozen=True, eq=False)
class Operation:
    """Work on memory: a copy, a memset, a network."""

    name: str
    run: Callable[[], object]
    reads: tuple[Range, ...]
    writes: tuple[Range, ...]
    allocations: tuple[Allocation, ...]


@dataclass(eq=False)
class Item:
    """A place in a stream's queue: an operation, a wait for another item, or an event's record."""

    stream: Stream
    name: str
    work: Callable[[], object] | None = None
    waits_for: Item | None = None
    allocations: tuple[Allocation, ...] = ()
    done: bool = False


@dataclass(eq=False)
class Record:
    """What `cuEventRecord` made of an event: waits take the record of their time, later records change nothing."""

    clock: Clock
    item: Item | None = None  # None where it was recorded in a capture
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
    """What a stream records instead of queueing."""

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
        """The operations, saying where they come from."""
        return (replace(operation, name=f"{operation.name} (of a graph)") for operation in self.operations)


def run(target: Item, ran: list[str]) -> None:
    """Run what ``target`` needs and then itself: its stream up to there, and what that waits for on other streams."""
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
        head.done = True  # also where it fails: a failed operation is not tried again
        if head.work is not None:
            head.work()
            ran.append(head.name)


def stamp(record: Record) -> None:
    """Note that the event's turn has come."""
    record.time = time.perf_counter()
