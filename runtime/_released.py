"""The ``with`` half of everything that is closed."""

from __future__ import annotations

from types import TracebackType
from typing import Self

__all__ = ["Released"]


class Released:
    """Holds something until it is closed; leaving a ``with`` block closes it."""

    def close(self) -> None:
        """Release it; harmless when repeated."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
