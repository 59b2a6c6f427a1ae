"""Ending a generation from any thread, or from a signal handler."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from svd_trt.errors import SvdTrtError
from svd_trt.runtime.flag import Flag

__all__ = ["Cancellation"]

OnCancel: TypeAlias = Callable[[SvdTrtError], object]


class Cancellation:
    """The end of one generation, which any thread may ask for.

    Attributes:
        event: set once the generation should end.
    """

    def __init__(self) -> None:
        self.event = Flag()
        self._reason: SvdTrtError | None = None
        self._calls: list[OnCancel] = []
        self._lock = threading.RLock()  # a signal handler may cancel while its own thread holds it

    def cancel(self, reason: SvdTrtError) -> None:
        """Make the generation raise ``reason`` as soon as it can; an earlier reason counts."""
        with self._lock:
            self._reason = self._reason or reason
            self.event.set()
            for call in list(self._calls):
                call(self._reason)

    def check(self) -> None:
        """Raise the reason if the generation should end."""
        if self._reason is not None:
            raise self._reason

    @contextmanager
    def calling(self, call: OnCancel) -> Iterator[None]:
        """Make `cancel` call ``call`` while the block runs, to wake or stop what the block waits for.

        ``call`` must not wait for anything.
        """
        with self._lock:
            self._calls.append(call)
        try:
            self.check()
            yield
        finally:
            with self._lock:
                self._calls.remove(call)
