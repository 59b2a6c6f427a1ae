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
_POISONED_BYTES = 64 << 20  # of a larger allocation, only this part is filled; its other pages take no memory
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


@dataclass(eq=False)
class Allocation:
    """An allocated range of addresses. The kind ``engine`` is device memory of a loaded engine."""

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
        """Set all bytes, up to a limit."""
        ctypes.memset(self.address, value, min(self.nbytes, _POISONED_BYTES))


class Memory:
    """All allocations, and the bytes that they take on each device."""

    def __init__(self, devices: int, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.contexts = [0] * devices  # bytes of the driver's context
        self.used = [0] * devices
        self.peak = 0
        self._serial = itertools.count(1)
        self._live: list[Allocation] = []  # sorted by address
        self._freed_pinned: list[Allocation] = []

    def free_bytes(self, device: int) -> int:
        return self.total_bytes - self.contexts[device] - self.used[device]

    def of_kind(self, kind: Kind) -> list[Allocation]:
        return [allocation for allocation in self._live if allocation.kind == kind]

    def allocate(self, kind: Kind, nbytes: int, device: int) -> Allocation | None:
        """A new allocation, or None if the device is full."""
        if kind != "pinned" and nbytes > self.free_bytes(device):
            return None
        # mmap gives whole pages, so the address is a multiple of 4096. Pages that are never used take no memory.
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
        """Free an allocation. Pinned memory stays mapped, filled with poison, because host code may still read it."""
        self._live.remove(allocation)
        allocation.freed = True
        if allocation.kind == "pinned":
            allocation.fill(FREED)
            self._freed_pinned.append(allocation)
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
