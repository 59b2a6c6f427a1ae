"""A thread that makes calls in order, and that a finalizer may give work to."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

__all__ = ["Worker"]

_T = TypeVar("_T")
_Calls: TypeAlias = "SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]"


class Worker:
    """One thread, started by the first call.

    `concurrent.futures.ThreadPoolExecutor` takes a lock for each call. A finalizer, which the garbage collector may run
    in the middle of that, would wait for its own thread. A `queue.SimpleQueue` is made for that case.

    Args:
        name: of the thread.
        at_exit: called, from the interpreter's exit, if the worker was not stopped, so that its calls end early.
    """

    def __init__(self, name: str, at_exit: Callable[[], object]) -> None:
        self.name = name
        self.at_exit = at_exit
        self.calls: _Calls = SimpleQueue()
        self.thread: threading.Thread | None = None

    def submit(self, call: Callable[[], _T]) -> Future[_T]:
        """Make ``call`` after the earlier ones."""
        if self.thread is None:
            self.thread = threading.Thread(target=_work, args=(self.calls,), name=self.name, daemon=True)
            _running[self.thread] = self
            self.thread.start()
        future: Future[_T] = Future()
        self.calls.put((future, call))
        return future

    def stop(self) -> None:
        """End the thread after the calls that it was given. Returns at once."""
        self.calls.put(None)


_running: dict[threading.Thread, Worker] = {}


@atexit.register
def _finish() -> None:
    """Wait for all threads: one that computes while the interpreter is taken down could crash it."""
    for thread, worker in list(_running.items()):
        worker.at_exit()
        worker.stop()
        thread.join()


def _work(calls: _Calls) -> None:
    while (item := calls.get()) is not None:
        _make(*item)
        del item  # while the thread waits, a stream that was dropped must not be kept by its last call
    del _running[threading.current_thread()]


def _make(future: Future[_T], call: Callable[[], _T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:  # raised again in the thread that asked for the call
        future.set_exception(error)
    else:
        future.set_result(result)
