"""The base class of everything that holds memory or handles until it is closed."""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType
from typing import Self

from svd_trt.errors import BackendError

__all__ = ["Closeable", "closed_error"]


def closed_error(name: str) -> BackendError:
    """Make the error for a call to ``name`` after it was closed."""
    return BackendError(f"{name} was released; open the pipeline again")


class Closeable:
    """Holds something until it is closed. Leaving a ``with`` block closes it."""

    def close(self) -> None:
        """Release it. Closing twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        with suppress(BackendError):  # the first failure is the one to report
            self.close()
