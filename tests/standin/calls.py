"""The decorator of the driver functions of the stand-in: it checks and records calls, and fails those a test chose."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from cuda.bindings import driver

__all__ = ["Call", "Needs", "Refused", "driver_function", "number"]

Needs: TypeAlias = Literal["nothing", "init", "context"]

SUCCESS = driver.CUresult.CUDA_SUCCESS


class Refused(Exception):  # noqa: N818  # the status that the caller gets, not an error
    """The driver function returns this status."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.result = getattr(driver.CUresult, name)


@dataclass(frozen=True)
class Call:
    """One call of a driver function; ``result`` is None if the stand-in raised an exception."""

    name: str
    arguments: tuple[int, ...]
    result: Any
    thread: str


def number(value: Any) -> int:
    """The argument as the driver gets it: a handle, an address, a size or the value of an enumeration."""
    return 0 if value is None else int(value)


def driver_function(
    outputs: int = 0, *, needs: Needs = "context", unsafe: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., tuple[Any, ...]]]:
    """Make a method a driver function, which returns its status and ``outputs`` results.

    Args:
        outputs: how many results follow the status. Each is None if the function fails, as in the bindings.
        needs: what the function requires: nothing, `cuInit`, or a context that is current in this thread.
        unsafe: the driver refuses the function while a stream is captured.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
        name = function.__name__

        @functools.wraps(function)
        def called(self: Any, *arguments: Any, **named: Any) -> tuple[Any, ...]:
            with self._lock:
                status: Any = None
                results: tuple[Any, ...] = (None,) * outputs
                try:
                    self._check_call(name, needs, unsafe)
                    answer = function(self, *arguments, **named)
                    results = answer if outputs > 1 else (answer,) * outputs
                    status = SUCCESS
                except Refused as refused:
                    status = refused.result
                finally:
                    caller = threading.current_thread().name
                    self.calls.append(Call(name, tuple(map(number, (*arguments, *named.values()))), status, caller))
                return (status, *results)

        return called

    return decorate
