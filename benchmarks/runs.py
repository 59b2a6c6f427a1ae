"""The shape that every contender's code has: load once, then make the same video any number of times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from svd_trt.benchmarks.schema import Stage

__all__ = ["Run", "Video"]


@dataclass(frozen=True)
class Video:
    """What a run made, and when.

    Attributes:
        frames: uint8 ``[F, H, W, 3]``.
        stages: seconds of each.
        steps: seconds of each denoising step.
        first_step_at: when the first began, by `time.perf_counter`.
        host_s: of a step, what it took beyond the network's own time, where that is known.
        load_s: loading that it had to wait for.
    """

    frames: npt.NDArray[np.uint8]
    stages: dict[Stage, float]
    steps: list[float]
    first_step_at: float
    host_s: float | None = None
    load_s: float = 0.0


class Run(ABC):
    """One contender in its own process."""

    @abstractmethod
    def load(self) -> None:
        """Bring everything to where the first call can start."""

    @abstractmethod
    def make(self, write: Callable[[Any], None]) -> Video:
        """One video; ``write`` takes frames ``[n, H, W, 3]`` in order."""
