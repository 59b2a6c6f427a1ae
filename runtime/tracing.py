"""Named ranges on the timeline of Nsight Systems: stages, denoising steps and decode chunks.

The package nvtx hands them to the tool that traces the process. Without the package or a tool, nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib import import_module
from typing import Any

__all__ = ["traced"]

_DOMAIN = "svd-trt"


def traced(name: str) -> AbstractContextManager[Any]:
    """Make the block a range ``name`` of this thread, inside the range that is open there.

    A range ends in the thread in which it began, so no generator may yield in the block.
    """
    annotate = _annotate()
    return nullcontext() if annotate is None else annotate(name, domain=_DOMAIN)


@lru_cache(maxsize=1)
def _annotate() -> Callable[..., AbstractContextManager[Any]] | None:
    try:
        annotate: Callable[..., AbstractContextManager[Any]] = import_module("nvtx").annotate
    except ImportError:
        return None
    return annotate
