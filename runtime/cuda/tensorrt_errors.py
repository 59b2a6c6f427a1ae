"""What TensorRT said about a call that failed.

TensorRT reports an error to the `IErrorRecorder` of the object whose call failed, and then logs nothing. Without a
recorder it logs the error, but a process has one logger: the first one that any library gave to TensorRT. So every
runtime, engine and context here gets a recorder. Checks of a plan's header are logged in any case, so svd-trt's own
logger is needed too. (Seen with TensorRT for RTX 1.7.1.)
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from svd_trt.errors import BackendError, DeviceMemoryError
from svd_trt.runtime.cuda.context import Context

__all__ = ["Errors", "logger_of"]

_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|amount of (gpu )?memory|insufficient (gpu )?memory", re.IGNORECASE)
_MOST_KEPT = 20


class Errors:
    """The errors of the latest call of one runtime, or of one engine and its contexts.

    Call `clear` before each call: an error that was left by an earlier one must not explain a later failure.
    """

    def __init__(self, trt: Any) -> None:
        self._recorder = _classes(trt)[1]()
        self._log = logger_of(trt).errors

    def attach(self, thing: Any) -> None:
        """Make ``thing``, a runtime, an engine or a context, report its errors here."""
        thing.error_recorder = self._recorder

    def clear(self) -> None:
        """Forget all errors."""
        self._recorder.clear()
        self._log.clear()

    @property
    def recorded(self) -> bool:
        """True if an error was recorded since `clear`, for calls that return nothing."""
        return bool(self._recorder.errors)

    @property
    def messages(self) -> list[str]:
        """What was recorded since `clear`, or else what was logged; the first message is the most specific."""
        return [message for _, message in self._recorder.errors] or list(self._log)

    @property
    def reason(self) -> str:
        """The first message on one line."""
        return " ".join(self.messages[0].split()) if self.messages else "it gives no reason"

    @property
    def out_of_memory(self) -> bool:
        """True if the call failed because the GPU is full."""
        codes = [code for code, _ in self._recorder.errors]
        return "FAILED_ALLOCATION" in codes or any(_OUT_OF_MEMORY.search(message) for message in self.messages)

    def failure(
        self, context: Context, call: str, message: str, what: str = "", nbytes: int | None = None
    ) -> BackendError:
        """Make the error of a call that failed.

        Args:
            context: of the GPU.
            call: what was done, if memory ran out.
            message: the error's text for other reasons.
            what: what the memory was for.
            nbytes: bytes of ``what``, if they are known.
        """
        if self.out_of_memory:
            free, total = context.memory()
            return DeviceMemoryError(call, what, nbytes, free, total)
        return BackendError(message)


def logger_of(trt: Any) -> Any:
    """The logger of this process for ``trt``. Its ``errors`` are the latest messages."""
    return _classes(trt)[2]


@lru_cache
def _classes(trt: Any) -> tuple[type[Any], type[Any], Any]:
    """The classes of the logger and of recorders, whose bases are found at run time, and the logger."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the latest errors and prints nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
                del self.errors[:-_MOST_KEPT]

    class Recorder(trt.IErrorRecorder):  # type: ignore[misc]
        """Keeps the first errors since `clear`, as pairs of the code's name and the message."""

        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self.errors: list[tuple[str, str]] = []
            self._dropped = False

        def report_error(self, code: Any, message: str) -> bool:
            if len(self.errors) < _MOST_KEPT:
                self.errors.append((code.name, message))
            else:
                self._dropped = True
            return False  # not fatal for this process

        def clear(self) -> None:
            self.errors.clear()
            self._dropped = False

        def num_errors(self) -> int:
            return len(self.errors)

        def get_error_code(self, index: int) -> Any:
            return getattr(trt.ErrorCodeTRT, self.errors[index][0])

        def get_error_desc(self, index: int) -> str:
            return self.errors[index][1]

        def has_overflowed(self) -> bool:
            return self._dropped

    return Logger, Recorder, Logger()
