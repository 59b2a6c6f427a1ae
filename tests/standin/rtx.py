"""The real TensorRT for RTX, for its enumerations and to compare with; it loads without a GPU."""

from __future__ import annotations

from typing import Any

from svd_trt.engine.flavour import find_flavour

__all__ = ["real"]

real: Any = find_flavour("tensorrt-rtx").trt
