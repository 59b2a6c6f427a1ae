"""The real TensorRT for RTX, whose enumerations and names the stand-in uses. It loads without a GPU."""

from __future__ import annotations

from typing import Any

from svd_trt.engine.tensorrt_import import find_tensorrt

__all__ = ["real"]

real: Any = find_tensorrt("tensorrt-rtx").trt
