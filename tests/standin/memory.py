"""Memory of the device and pinned memory of the host: real memory of this process, poisoned, counted and checked."""

from __future__ import annotations

import bisect
import ctypes
import itertools
import mmap
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from tests.standin.clock import Accesses

__all__ = ["POISON", "Allocation", "Kind", "Memory"]

Kind: TypeAlias = Literal["device", "pinned", "engine"]

POISON = 0xCD
FREED = 0xDD
_POISONED_BYTES = 64 << 20  # a larger allocation is for counting, and its pages stay untouched
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


@dataclass(eq=False)
class Allocation:
    """A range of addresses that belongs to somebody; ``engine`` is what a loaded engine holds of the device."""

    kind: Kind
    device: int
    nbytes: int
    address: int
    buffer: mmap.mmap
    serial: int
    freed: bool = False
    accesses: Accesses = field(default_factory=Accesses)

    def __str__(self) -> str:
        words = {"device": "device memory", "pinned": "pinned memory", "engine": "an engine's memory"}[self.kind]
        return f"{words} {self.address:#x} ({self.nbytes} bytes, allocation {self.serial})"

    def fill(self, value: int) -> None:
        """Set all bytes, or the first of many."""
        ctypes.memset(self.address, value, min(self.nbytes, _POISONED_BYTES))


class Memory:
    """All allocations, and how much of each device they take."""

    def __init__(self, devices: int, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.contexts = [0] * devices  # what the driver's own context takes
        self.used = [0] * devices
        self.peak = 0
        self._serial = itertools.count(1)
        self._live: list[Allocation] = []  # by address
        self._graveyard: list[Allocation] = []

    def free_bytes(self, device: int) -> int:
        return self.total_bytes - self.contexts[device] - self.used[device]

    def of_kind(self, kind: Kind) -> list[Allocation]:
        return [allocation for allocation in self._live if allocation.kind == kind]

    def allocate(self, kind: Kind, nbytes: int, device: int) -> Allocation | None:
        """A new range, or None where the device is full."""
        if kind != "pinned" and nbytes > self.free_bytes(device):
            return None
        # Whole pages, so the address is a multiple of 4096; pages that nobody touches take no memory.
        buffer = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        allocation = Allocation(kind, device, nbytes, address, buffer, next(self._serial))
        if kind != "engine":
            allocation.fill(POISON)
        if kind != "pinned":
            self.used[device] += nbytes
            self.peak = max(self.peak, sum(self.used))
        bisect.insort(self._live, allocation, key=lambda a: a.address)
        return allocation

    def free(self, allocation: Allocation) -> None:
        """Give it back. Host code may still hold the address of pinned memory: it stays mapped, with other poison."""
        self._live.remove(allocation)
        allocation.freed = True
        if allocation.kind == "pinned":
            allocation.fill(FREED)
            self._graveyard.append(allocation)
        else:
            self.used[allocation.device] -= allocation.nbytes

    def at(self, address: int) -> Allocation | None:
        """The live allocation that starts at ``address``."""
        found = self.find(address, 0)
        return found if found is not None and found.address == address else None

    def find(self, address: int, nbytes: int) -> Allocation | None:
        """The live allocation that holds the whole range."""
        index = bisect.bisect_right(self._live, address, key=lambda a: a.address) - 1
        if index < 0:
            return None
        found = self._live[index]
        return found if address + nbytes <= found.address + found.nbytes else None
