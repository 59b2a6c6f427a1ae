"""Stable Video Diffusion as TensorRT engines: build once with torch, run many times without it.

::

    import svd_trt

    options = svd_trt.BuildOptions(frames="2:14:25")
    svd_trt.build_bundle("stabilityai/stable-video-diffusion-img2vid-xt", "svd-xt", options)

    with svd_trt.VideoPipeline.open("svd-xt", vram_budget=8 * 10**9) as pipe:
        try:
            pipe("picture.png", seed=42, num_frames=14).save("video.mp4")
        except svd_trt.SvdTrtError as error:
            print(error)  # one line: what happened, then what to do

How a bundle runs within a budget of device memory follows from its manifest, without a GPU::

    request = svd_trt.MemoryRequest(frames=14, height=576, width=1024)
    plan = svd_trt.plan_memory(svd_trt.Bundle.open("svd-xt").manifest, request, budget=8 * 10**9)
    print(plan.words(), plan.total_bytes)

A public name is imported when it is first used, so ``import svd_trt`` takes milliseconds and never imports torch. The
tree of errors is in `svd_trt.errors`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from svd_trt.version import __version__

if TYPE_CHECKING:
    from svd_trt.engine.bundle import Bundle as Bundle
    from svd_trt.engine.memory import MemoryPlan as MemoryPlan
    from svd_trt.engine.memory import MemoryRequest as MemoryRequest
    from svd_trt.engine.memory import plan_memory as plan_memory
    from svd_trt.engine.spec import Range as Range
    from svd_trt.errors import ArgumentError as ArgumentError
    from svd_trt.errors import BackendError as BackendError
    from svd_trt.errors import BenchmarkError as BenchmarkError
    from svd_trt.errors import BudgetError as BudgetError
    from svd_trt.errors import BundleError as BundleError
    from svd_trt.errors import CancelledError as CancelledError
    from svd_trt.errors import CheckpointError as CheckpointError
    from svd_trt.errors import CudaError as CudaError
    from svd_trt.errors import DeviceMemoryError as DeviceMemoryError
    from svd_trt.errors import EngineBuildError as EngineBuildError
    from svd_trt.errors import ExportError as ExportError
    from svd_trt.errors import ImageError as ImageError
    from svd_trt.errors import LockedError as LockedError
    from svd_trt.errors import MissingDependencyError as MissingDependencyError
    from svd_trt.errors import NoGpuError as NoGpuError
    from svd_trt.errors import OutputError as OutputError
    from svd_trt.errors import ResourceError as ResourceError
    from svd_trt.errors import ResultError as ResultError
    from svd_trt.errors import SvdTrtError as SvdTrtError
    from svd_trt.export.build import build_bundle as build_bundle
    from svd_trt.export.options import BuildOptions as BuildOptions
    from svd_trt.runtime.async_stream import AsyncVideoStream as AsyncVideoStream
    from svd_trt.runtime.output import VideoOutput as VideoOutput
    from svd_trt.runtime.output import VideoStream as VideoStream
    from svd_trt.runtime.pipeline import VideoPipeline as VideoPipeline

__all__ = [
    "ArgumentError",
    "AsyncVideoStream",
    "BackendError",
    "BenchmarkError",
    "BudgetError",
    "BuildOptions",
    "Bundle",
    "BundleError",
    "CancelledError",
    "CheckpointError",
    "CudaError",
    "DeviceMemoryError",
    "EngineBuildError",
    "ExportError",
    "ImageError",
    "LockedError",
    "MemoryPlan",
    "MemoryRequest",
    "MissingDependencyError",
    "NoGpuError",
    "OutputError",
    "Range",
    "ResourceError",
    "ResultError",
    "SvdTrtError",
    "VideoOutput",
    "VideoPipeline",
    "VideoStream",
    "__version__",
    "build_bundle",
    "plan_memory",
]

_MODULES = {
    "AsyncVideoStream": "svd_trt.runtime.async_stream",
    "BuildOptions": "svd_trt.export.options",
    "Bundle": "svd_trt.engine.bundle",
    "MemoryPlan": "svd_trt.engine.memory",
    "MemoryRequest": "svd_trt.engine.memory",
    "Range": "svd_trt.engine.spec",
    "VideoOutput": "svd_trt.runtime.output",
    "VideoPipeline": "svd_trt.runtime.pipeline",
    "VideoStream": "svd_trt.runtime.output",
    "build_bundle": "svd_trt.export.build",
    "plan_memory": "svd_trt.engine.memory",
}


def __getattr__(name: str) -> Any:
    """Import the module that defines ``name`` when the name is first used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "svd_trt.errors")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
