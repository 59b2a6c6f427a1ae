"""How everything that takes more than a second reports its progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

__all__ = ["Progress", "ignore_progress"]

Progress: TypeAlias = Callable[[str, float, float], object]
"""Called as ``progress(stage, done, total)``.

A stage starts with ``done`` 0 and has ended when ``done`` equals ``total``. A stage whose first call has ``done`` equal
to ``total`` was found finished. ``total`` 0 means that the length of the stage is not known.
"""


def ignore_progress(stage: str, done: float, total: float) -> None:
    """A `Progress` that reports nothing."""
