"""Every error that svd-trt raises on purpose.

::

    SvdTrtError                    exit code 1: what went wrong and what to do, in one line
    ├── ArgumentError              a value outside what the bundle or the model takes (also a ValueError)
    ├── CheckpointError            MODEL is missing, is not SVD, or is SVD that is not supported
    ├── ExportError                a network could not be traced to ONNX
    ├── EngineBuildError           TensorRT refused a network or failed to build it
    ├── BundleError                a bundle is missing, incomplete, altered, or of a newer schema
    ├── BackendError               no backend on this machine can run the bundle
    │   ├── NoGpuError             there is no NVIDIA driver here, or it shows no GPU
    │   └── CudaError              a call of the CUDA driver failed; the message names the call, the tensor, the bytes
    │       └── DeviceMemoryError  the GPU has too little free memory, or the budget does not allow more
    ├── ImageError                 an input picture could not be read
    ├── OutputError                a video could not be written
    ├── ResourceError                  not enough disk or memory for what was asked, seen before it starts
    ├── BudgetError                the memory budget is below what any plan needs; the message says what works
    ├── MissingDependencyError     an optional package is not installed (also an ImportError)
    ├── BenchmarkError             what everything was to be measured against could not be measured
    ├── ResultError                a result file is missing, damaged, or not one of `svd-trt bench`
    └── LockedError                another process is building the same bundle

The command line prints the message of any of these and exits with 1; anything else is a defect in svd-trt and
keeps its traceback.
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "BackendError",
    "BenchmarkError",
    "BudgetError",
    "BundleError",
    "CheckpointError",
    "CudaError",
    "DeviceMemoryError",
    "EngineBuildError",
    "ExportError",
    "ImageError",
    "LockedError",
    "MissingDependencyError",
    "NoGpuError",
    "OutputError",
    "ResourceError",
    "ResultError",
    "SvdTrtError",
    "first_line",
]


class SvdTrtError(Exception):
    """Base of all errors that a user can mend; the message is one line and says how."""


class ArgumentError(SvdTrtError, ValueError):
    """A value that is malformed, or outside the range that the bundle or the model was made for."""


class CheckpointError(SvdTrtError):
    """The checkpoint is missing, unreadable, not Stable Video Diffusion, or a kind of it that is not supported."""


class ExportError(SvdTrtError):
    """A network could not be exported to ONNX."""


class EngineBuildError(SvdTrtError):
    """TensorRT refused the network or failed while building the engine."""


class BundleError(SvdTrtError):
    """The bundle is missing, incomplete, altered since it was built, or written by a newer svd-trt."""


class BackendError(SvdTrtError):
    """No backend on this machine can run the bundle, or the one asked for cannot."""


class NoGpuError(BackendError):
    """There is no NVIDIA driver on this machine, or it shows no GPU."""


class CudaError(BackendError):
    """A call of the CUDA driver failed.

    Attributes:
        call: the driver's function.
        status: its status, as ``CUDA_ERROR_INVALID_VALUE``.
    """

    def __init__(self, call: str, what: str, nbytes: int | None, status: str, reason: str) -> None:
        """``call`` for ``nbytes`` bytes of ``what`` ended in ``status``, which the driver explains as ``reason``."""
        size = "" if nbytes is None else f"{nbytes:,} bytes"
        subject = " of ".join(part for part in (size, what) if part)
        super().__init__(f"{call}{f' ({subject})' if subject else ''} failed: {status}, {reason}")
        self.call = call
        self.status = status


class DeviceMemoryError(CudaError):
    """The GPU has too little free memory, or the budget does not allow more.

    Attributes:
        asked: bytes, where known.
        free: bytes that were free, where known.
    """

    def __init__(self, call: str, what: str, asked: int | None, free: int | None, total: int | None) -> None:
        """``call`` asked for memory for ``what``; ``free`` of ``total`` bytes were free."""
        gpu = "the GPU is full" if free is None else f"{free / 1e9:.2f} GB free"
        super().__init__(call, what, asked, "out of memory", gpu + (f" of {total / 1e9:.2f} GB" if total else ""))
        self.asked = asked
        self.free = free

    def advise(self, advice: str) -> None:
        """Add what to do to the message."""
        self.args = (f"{self.args[0]}; {advice}",)


class ImageError(SvdTrtError):
    """An input picture is missing, is not a picture, or is damaged."""


class OutputError(SvdTrtError):
    """A video cannot be written where it was asked for."""


class ResourceError(SvdTrtError):
    """Disk or memory would run out; the message says how much is needed and how much there is."""


class BudgetError(SvdTrtError):
    """The memory budget is below what any plan needs; the message says the smallest that works."""


class BenchmarkError(SvdTrtError):
    """A comparison has nothing to compare with: its baseline failed."""


class ResultError(SvdTrtError):
    """A benchmark's result file is missing, damaged, of another version, or something else."""


class LockedError(SvdTrtError):
    """Another process holds the lock of the bundle that was to be built."""


class MissingDependencyError(SvdTrtError, ImportError):
    """An optional package is needed for what was asked; the message names the ``pip install`` that brings it."""

    def __init__(self, what: str, extra: str) -> None:
        """``what`` needs packages of the optional dependency group ``extra``."""
        super().__init__(f"{what} needs packages that are not installed: pip install 'svd-trt[{extra}]'")


def first_line(error: Exception) -> str:
    """What a library's exception says, cut to the one line that a message has room for; its type if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
