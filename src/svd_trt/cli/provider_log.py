"""What ONNX Runtime's GPU providers write to standard error by themselves."""

from __future__ import annotations

from svd_trt.runtime.backends import Provider

__all__ = ["end_log_of"]

_FATAL_ONLY = 4


def end_log_of(provider: Provider | None) -> None:
    """End it, since what fails is raised: most lines are of kernels that were tried before others were found."""
    if provider not in (None, "cpu"):
        import onnxruntime

        onnxruntime.set_default_logger_severity(_FATAL_ONLY)
