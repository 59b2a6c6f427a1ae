"""Stable Video Diffusion as TensorRT engines: build once with torch, run many times without it.

The public names load on first use, so ``import svd_trt`` costs next to nothing and never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from svd_trt.version import __version__

if TYPE_CHECKING:
    from svd_trt.engine.bundle import Bundle as Bundle
    from svd_trt.errors import SvdTrtError as SvdTrtError
    from svd_trt.export.build import build_bundle as build_bundle
    from svd_trt.export.options import BuildOptions as BuildOptions
    from svd_trt.runtime.output import VideoOutput as VideoOutput
    from svd_trt.runtime.pipeline import VideoPipeline as VideoPipeline

_LAZY = {
    "Bundle": "svd_trt.engine.bundle",
    "BuildOptions": "svd_trt.export.options",
    "SvdTrtError": "svd_trt.errors",
    "VideoOutput": "svd_trt.runtime.output",
    "VideoPipeline": "svd_trt.runtime.pipeline",
    "build_bundle": "svd_trt.export.build",
}

__all__ = [
    "BuildOptions",
    "Bundle",
    "SvdTrtError",
    "VideoOutput",
    "VideoPipeline",
    "__version__",
    "build_bundle",
]


def __getattr__(name: str) -> Any:
    """Import the module that defines ``name`` when it is first asked for (PEP 562)."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
