"""The builder's messages and its progress, as TensorRT reports them to objects of its own classes."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

from svd_trt.engine.builder_log import concerns_kernels

__all__ = ["make_logger", "make_monitor"]

# The builder logs these at INFO; without loading the engine there are no other figures of its memory.
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")  # once for each profile, in their order
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")
# TensorRT only warns of a profile that it cannot satisfy at one of its ends; users would get a bundle that fails at
# frame counts it was built for.
_BROKEN_PROFILE = "not self-consistent"
# Tensors that the engine allocates while it runs (seen if one is larger than any GPU's memory) are missing from the
# report of activation memory.
_UNREPORTED = "Static Tensor Allocation failed"


def make_logger(trt: Any) -> Any:
    """An ``ILogger`` with ``activation_bytes`` of the profiles, ``weight_bytes``, ``kernels`` (messages), ``errors``.

    ``broken_profile`` is TensorRT's warning of a profile that it cannot satisfy, and ``unreported`` says that the
    engine allocates memory that is not in ``activation_bytes``.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]  # the base class comes from a module found at run time
        """Keeps the builder's messages about memory, kernels and failures, and prints nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.activation_bytes: list[int] = []
            self.weight_bytes: int | None = None
            self.kernels: list[str] = []
            self.errors: list[str] = []
            self.broken_profile = ""
            self.unreported = False

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING and _BROKEN_PROFILE in message:
                self.broken_profile = message.strip()
            elif _UNREPORTED in message:
                self.unreported = True
            elif concerns_kernels(message):
                self.kernels.append(message)
            elif match := _ACTIVATIONS.search(message):
                self.activation_bytes.append(int(match[1]))
            elif match := _WEIGHTS.search(message):
                self.weight_bytes = int(match[1])

    return Logger()


def make_monitor(trt: Any, report_fraction: Callable[[float], object]) -> Any:
    """An ``IProgressMonitor`` that calls ``report_fraction`` with the fraction done, from threads of the builder."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the fraction done. Phases nest: a phase counts the inner ones as parts of its running step."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.lock = threading.Lock()  # phases may report from several of the builder's threads
            self.phases: list[list[Any]] = []  # [name, steps, done], outermost first
            self.fraction = 0.0

        def phase_start(self, phase_name: str, _parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                self.phases.append([phase_name, max(num_steps, 1), 0])

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                for phase in self.phases:
                    if phase[0] == phase_name:
                        phase[2] = step + 1
            self._report()
            return True

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                self.phases = [phase for phase in self.phases if phase[0] != phase_name]
            self._report()

        def _report(self) -> None:
            with self.lock:
                fraction = 0.0
                for _, steps, done in reversed(self.phases):
                    fraction = min((done + fraction) / steps, 1.0)
                # Phases overlap and end early, so the estimate can decrease; the reported fraction must not.
                self.fraction = max(self.fraction, fraction)
            report_fraction(self.fraction)

    return Monitor()
