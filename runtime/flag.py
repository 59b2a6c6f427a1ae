"""A flag that signal handlers may set."""

from __future__ import annotations

__all__ = ["Flag"]


class Flag:
    """Set once, by any thread or signal handler.

    `threading.Event` takes a lock to be set. A signal handler that sets it again, in the middle of that, would wait for
    its own thread.
    """

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        """Set the flag."""
        self._set = True

    def is_set(self) -> bool:
        """Whether it is set."""
        return self._set
