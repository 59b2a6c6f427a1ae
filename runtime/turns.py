"""Who may use a pipeline: one thread after the other, in the process that opened it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from svd_trt.errors import BackendError

__all__ = ["Turns"]


class Turns:
    """Gives a pipeline to one thread at a time. Threads that wait do not overtake one another for long.

    A forked process has a copy of the pipeline's memory, and none of its threads nor of the GPU's context. Work that is
    handed to such a thread would never be done, so it is refused there.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        # A thread that waits for the turn holds the entrance, so the one that had it cannot take it again at once.
        self._entrance = threading.Lock()
        self._turn = threading.RLock()
        self._owner: int | None = None

    @property
    def foreign(self) -> bool:
        """True in a process that was forked from the one that opened the pipeline."""
        return os.getpid() != self._process

    @property
    def mine(self) -> bool:
        """True if this thread has the turn, which is so in a callback."""
        return self._owner == threading.get_ident()

    def require_process(self) -> None:
        """Refuse to work in a forked process.

        Raises:
            BackendError: the process was forked from the one that opened the pipeline.
        """
        if self.foreign:
            raise BackendError(
                f"this pipeline was opened in process {self._process}, and process {os.getpid()} was forked from it, "
                "without its threads and its GPU; open a pipeline in this process, or start processes with "
                "multiprocessing.get_context('spawn')"
            )

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Have the turn while the block runs; wait for other threads first. A thread that has it goes on.

        Raises:
            BackendError: see `require_process`.
        """
        self.require_process()
        if self.mine:
            yield
            return
        me = threading.get_ident()
        try:
            with self._entrance:
                self._turn.acquire()
            self._owner = me
            yield
        finally:
            if self._owner == me:
                self._owner = None
            with suppress(RuntimeError):  # Ctrl-C ended the wait, so this thread never had the turn
                self._turn.release()
