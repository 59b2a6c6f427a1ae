"""How the stand-in's driver functions are called: checked, recorded, and made to fail where a test wants it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from cuda.bindings import driver

__all__ = ["Call", "Needs", "Refused", "number", "resembles"]

Needs: TypeAlias = Literal["nothing", "init", "context"]

SUCCESS = driver.CUresult.CUDA_SUCCESS


class Refused(Exception):  # noqa: N818  # a status on its way to the caller, not an error
    """A driver function ends with this status."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.result = getattr(driver.CUresult, name)


@dataclass(frozen=True)
class Call:
    """One call of a driver function; ``result`` is None where the stand-in raised."""

    name: str
    arguments: tuple[int, ...]
    result: Any
    thread: str


def number(value: Any) -> int:
    """An argument as the driver would see it: a handle, an address, a size or an enumeration's value."""
    return 0 if value is None else int(value)


def resembles(
    outputs: int = 0, *, needs: Needs = "context", unsafe: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., tuple[Any, ...]]]:
    """Make a method a driver function that returns its status and ``outputs`` results.

    Args:
        outputs: how many results come after the status; None each where the function fails, as in the bindings.
        needs: what must have been done in this thread before.
        unsafe: the driver refuses it while a stream is captured.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
        name = function.__name__

        @functools.wraps(function)
        def called(self: Any, *arguments: Any, **named: Any) -> tuple[Any, ...]:
            with self._lock:
                status: Any = None
                results: tuple[Any, ...] = (None,) * outputs
                try:
                    self._admit(name, needs, unsafe)
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
