"""Seconds by stage of a generation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias, TypedDict

__all__ = ["Stage", "Timings", "timed"]

Stage: TypeAlias = Literal["load", "preprocess", "image_encoder", "vae_encoder", "denoise", "decode"]


class Timings(TypedDict, total=False):
    """Seconds by stage. A stage appears once it has run; stages overlap, so their sum may exceed the whole.

    ``load`` is the loading of engines, and ``steps`` has the seconds of every denoising step.
    """

    load: float
    preprocess: float
    image_encoder: float
    vae_encoder: float
    denoise: float
    decode: float
    steps: list[float]


@contextmanager
def timed(timings: Timings, stage: Stage) -> Iterator[None]:
    """Add the seconds of the block to ``stage``."""
    started = time.perf_counter()
    try:
        yield
    finally:
        timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - started
