"""Vector clocks, which find races: two operations that use the same bytes without an order between them.

The actors are the streams and the host. All threads of the host count as one actor, because they synchronise through
locks and queues that the stand-in does not see. Every edge of the order (the sequence within a stream, a wait for an
event, a synchronisation) goes from work that was enqueued earlier to work that was enqueued later. Therefore a race is
found when an operation is enqueued, before it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Access", "Accesses", "Clock", "Range", "join", "overlap"]

Clock: TypeAlias = dict[int, int]
"""The number of earlier operations of each stream."""

Range: TypeAlias = tuple[int, int]
"""Address and number of bytes."""


def join(clock: Clock, other: Clock) -> None:
    """Make ``clock`` later than ``other`` as well."""
    for actor, tick in other.items():
        clock[actor] = max(clock.get(actor, 0), tick)


def overlap(one: Range, other: Range) -> bool:
    """True if the two ranges share a byte."""
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]


@dataclass(frozen=True)
class Access:
    """One operation reads or writes one range."""

    range: Range
    write: bool
    stream: int
    tick: int
    what: str

    def before(self, clock: Clock) -> bool:
        """True if an operation with ``clock`` comes after this access."""
        return clock.get(self.stream, 0) >= self.tick

    def covers(self, other: Access) -> bool:
        """True if no later access can race with ``other``, an earlier one, without racing with this one."""
        inside = self.range[0] <= other.range[0] and sum(other.range) <= sum(self.range)
        return self.stream == other.stream and inside and (self.write or not other.write)


class Accesses:
    """The accesses of one allocation with which later accesses could still race."""

    def __init__(self) -> None:
        self._open: list[Access] = []

    def add(self, access: Access, clock: Clock, host: Clock) -> Access | None:
        """Record ``access`` of an operation with ``clock``, and return the access that it races with, or None.

        Accesses that the host has waited for are dropped, because everything that is enqueued later comes after them.
        """
        self._open = [old for old in self._open if not old.before(host)]
        for old in self._open:
            if (access.write or old.write) and overlap(access.range, old.range) and not old.before(clock):
                return old
        self._open = [old for old in self._open if not access.covers(old)]
        self._open.append(access)
        return None

    def unfinished(self, host: Clock) -> list[Access]:
        """The accesses that the host has not waited for."""
        return [old for old in self._open if not old.before(host)]
