"""Vector clocks: which operations are ordered, and which two touch the same bytes without being so.

The actors are the streams, and the host, all of whose threads count as one: they hand work to each other through locks
and queues that nobody here can see. Every edge of the order (a stream's own sequence, an event that is waited for, a
synchronisation) runs from what was enqueued earlier to what was enqueued later, so all is known when an operation is
enqueued, and nothing has to run for a race to be found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Access", "Accesses", "Clock", "Range", "join", "overlap"]

Clock: TypeAlias = dict[int, int]
"""For each stream, how many of its operations came before."""

Range: TypeAlias = tuple[int, int]
"""Address and bytes."""


def join(clock: Clock, other: Clock) -> None:
    """Have ``clock`` come after ``other`` too."""
    for actor, tick in other.items():
        clock[actor] = max(clock.get(actor, 0), tick)


def overlap(one: Range, other: Range) -> bool:
    """True where the two share a byte."""
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]


@dataclass(frozen=True)
class Access:
    """One operation's use of one range."""

    range: Range
    write: bool
    stream: int
    tick: int
    what: str

    def before(self, clock: Clock) -> bool:
        """True where whoever has ``clock`` comes after this access."""
        return clock.get(self.stream, 0) >= self.tick

    def covers(self, other: Access) -> bool:
        """True where whatever does not race with this cannot race with ``other``, which came before on its stream."""
        inside = self.range[0] <= other.range[0] and sum(other.range) <= sum(self.range)
        return self.stream == other.stream and inside and (self.write or not other.write)


class Accesses:
    """The accesses of one allocation that something to come could still race with."""

    def __init__(self) -> None:
        self._open: list[Access] = []

    def add(self, access: Access, clock: Clock, host: Clock) -> Access | None:
        """Note ``access``, whose operation has ``clock``; the access that it races with, or None.

        All that the host has waited for is forgotten: whatever is enqueued from now on comes after it.
        """
        self._open = [old for old in self._open if not old.before(host)]
        for old in self._open:
            if (access.write or old.write) and overlap(access.range, old.range) and not old.before(clock):
                return old
        self._open = [old for old in self._open if not access.covers(old)]
        self._open.append(access)
        return None

    def unfinished(self, host: Clock) -> list[Access]:
        """Accesses that the host has not waited for."""
        return [old for old in self._open if not old.before(host)]
