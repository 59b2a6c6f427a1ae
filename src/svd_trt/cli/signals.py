"""Signals that end a command by an exception, as Ctrl-C does, so that incomplete files are removed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any, NoReturn

__all__ = ["end_by_exceptions", "received"]

_received: int | None = None
_SECONDS = 0.02  # until a signal that was lost is sent again; by then the code that lost it has returned


def end_by_exceptions() -> None:
    """Make SIGTERM and SIGHUP raise `SystemExit`, and see to it that neither these nor Ctrl-C are lost.

    Python runs a handler wherever the main thread is. In a callback of a weak reference or in ``__del__`` it prints the
    handler's exception and goes on, as if there had been no signal. Such a signal is sent again.
    """
    global _received
    _received = None
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    before = sys.unraisablehook
    if getattr(before, "sends_again", False):
        return

    def hook(lost: Any) -> None:
        number = _signal_of(lost.exc_value)
        if number is None:
            before(lost)
        else:
            timer = threading.Timer(_SECONDS, os.kill, (os.getpid(), number))
            timer.daemon = True
            timer.start()

    hook.sends_again = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook


def received() -> int | None:
    """The first signal that should end this command, if there was one.

    An extension module that is imported in that moment may turn the handler's exception into an ImportError of its own.
    """
    return _received


def _signal_of(error: BaseException | None) -> int | None:
    """The signal whose handler raised ``error``; None if it is another exception."""
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT
    if isinstance(error, SystemExit) and error.code in (128 + signal.SIGTERM, 128 + signal.SIGHUP):
        return int(error.code) - 128
    return None


def _terminate(number: int, _frame: object) -> NoReturn:
    _note(number)
    sys.exit(128 + number)


def _interrupt(number: int, _frame: object) -> NoReturn:
    _note(number)
    raise KeyboardInterrupt


def _note(number: int) -> None:
    global _received
    _received = _received or number
