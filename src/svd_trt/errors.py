"""Every error that svd-trt raises on purpose.

    SvdTrtError                    exit code 1; the message is one line: what happened, then what to do
    ├── ArgumentError              a value is malformed, or outside what the bundle or the model takes (a ValueError)
    ├── CheckpointError            MODEL is missing, is not SVD, or is a kind of SVD that is not supported
    ├── ExportError                a network could not be exported to ONNX
    ├── EngineBuildError           TensorRT refused a network or failed to build its engine
    ├── BundleError                a bundle is missing, incomplete, altered, or of another schema
    ├── BackendError               no backend on this machine can run the bundle
    │   ├── NoGpuError             there is no NVIDIA driver, or it shows no GPU
    │   └── CudaError              a call of the CUDA driver failed; the message names the call, the tensor, the bytes
    │       └── DeviceMemoryError  the GPU has too little free memory, or the budget does not allow more
    ├── CancelledError             the video was cancelled, or its stream was closed, by another thread
    ├── ImageError                 an input picture could not be read
    ├── OutputError                a video or another output could not be written
    ├── ResourceError              disk or memory do not suffice; found before the work starts
    ├── BudgetError                every plan needs more than the memory budget; the message says what works
    ├── MissingDependencyError     an optional package is not installed (an ImportError)
    ├── BenchmarkError             the baseline of a comparison failed
    ├── ResultError                a result file is missing, damaged, or not one of `svd-trt bench`
    └── LockedError                another process is building the same bundle

The command line prints the message of any of these and exits with 1. Any other exception is a defect of svd-trt and
keeps its traceback.
"""

from __future__ import annotations

from svd_trt.units import format_bytes

__all__ = [
    "ArgumentError",
    "BackendError",
    "BenchmarkError",
    "BudgetError",
    "BundleError",
    "CancelledError",
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
    "is_lack_of_memory",
]


_NO_MEMORY = (
    "bad_alloc",
    "failed to map segment",
    "annot allocate memory",
    "ailed to allocate memory",
    "pthread_create failed",
    "can't start new thread",
)


class SvdTrtError(Exception):
    """Base of all errors that a user can correct. The message is one line: what happened, then what to do."""


class ArgumentError(SvdTrtError, ValueError):
    """A value is malformed, or outside the range that the bundle was built for or the model takes."""


class CheckpointError(SvdTrtError):
    """The checkpoint is missing, unreadable, not Stable Video Diffusion, or of a kind that is not supported."""


class ExportError(SvdTrtError):
    """A network could not be exported to ONNX."""


class EngineBuildError(SvdTrtError):
    """TensorRT refused the network or failed to build its engine."""


class BundleError(SvdTrtError):
    """The bundle is missing, incomplete, altered since it was built, or written by a newer or older svd-trt."""


class BackendError(SvdTrtError):
    """No backend on this machine can run the bundle, or the requested one cannot."""


class NoGpuError(BackendError):
    """There is no NVIDIA driver on this machine, or it shows no GPU."""


class CudaError(BackendError):
    """A call of the CUDA driver failed.

    Attributes:
        call: the driver's function.
        status: the name of its status, such as ``CUDA_ERROR_INVALID_VALUE``.
    """

    def __init__(self, call: str, what: str, nbytes: int | None, status: str, reason: str) -> None:
        """``call`` for ``nbytes`` bytes of ``what`` returned ``status``, which the driver explains as ``reason``."""
        size = "" if nbytes is None else f"{nbytes:,} bytes"
        subject = " of ".join(part for part in (size, what) if part)
        super().__init__(f"{call}{f' ({subject})' if subject else ''} failed: {status}, {reason}")
        self.call = call
        self.status = status


class DeviceMemoryError(CudaError):
    """The GPU has too little free memory, or the budget does not allow more.

    Attributes:
        asked: bytes that were requested; None if not known.
        free: bytes that were free; None if not known.
    """

    def __init__(self, call: str, what: str, asked: int | None, free: int | None, total: int | None) -> None:
        """``call`` requested ``asked`` bytes for ``what`` when ``free`` of ``total`` bytes were free."""
        gpu = "the GPU is full" if free is None else f"{format_bytes(free)} free"
        super().__init__(call, what, asked, "out of memory", gpu + (f" of {format_bytes(total)}" if total else ""))
        self.asked = asked
        self.free = free

    def advise(self, advice: str) -> None:
        """Append ``advice``, what to do, to the message."""
        self.args = (f"{self.args[0]}; {advice}",)


class CancelledError(SvdTrtError):
    """The video was cancelled, or its stream was closed, while it was made."""


class ImageError(SvdTrtError):
    """An input picture is missing, damaged, or not a picture."""


class OutputError(SvdTrtError):
    """An output cannot be written to the requested place."""


class ResourceError(SvdTrtError):
    """Disk or memory do not suffice; the message says how much is needed and how much is free."""


class BudgetError(SvdTrtError):
    """Every plan needs more than the memory budget; the message says the smallest budget that works."""


class BenchmarkError(SvdTrtError):
    """The baseline of a comparison failed, so there is nothing to compare with."""


class ResultError(SvdTrtError):
    """A result file is missing, damaged, of another version, or not one of ``svd-trt bench``."""


class LockedError(SvdTrtError):
    """Another process holds the lock of the bundle that this process should build."""


class MissingDependencyError(SvdTrtError, ImportError):
    """An optional package is not installed; the message names the ``pip install`` command for it."""

    def __init__(self, what: str, extra: str) -> None:
        """``what`` needs packages of the optional dependency group ``extra``."""
        super().__init__(f"{what} needs packages that are not installed: pip install 'svd-trt[{extra}]'")


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, which libraries and the loader of libraries say in several ways, few of them plain."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY)


def first_line(error: Exception) -> str:
    """The first line of a library's exception, for a one-line message; its type if it has no text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
