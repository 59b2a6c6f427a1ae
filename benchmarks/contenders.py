"""The contenders: what a user could run to make the same video, and the interface that their code has in common."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from svd_trt.benchmarks.results import Stage, Workload
from svd_trt.benchmarks.workload import BundleKind
from svd_trt.engine.driver import gpu_count
from svd_trt.errors import ArgumentError

__all__ = ["CONTENDERS", "Contender", "Job", "Kind", "Runner", "Video", "choose_contenders", "has_gpu"]

Kind: TypeAlias = Literal["diffusers", "svd-trt", "openvino"]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a contender's process loads."""

    contender: str
    workload: Workload
    picture: str
    bundle: str | None
    threads: int
    gpu: bool
    exact: bool = False
    """Make the reference: without TF32, which a GPU uses for fp32 by default."""


@dataclass(frozen=True)
class Video:
    """A video that a runner made, and its times in seconds.

    Attributes:
        frames: uint8 ``[F, H, W, 3]``.
        stages: of each stage but writing.
        steps: of each denoising step.
        first_step_at: when the first step began, by `time.perf_counter`.
        host_s: the part of a step that its network does not account for, if that is known.
        load_s: loading that was part of this call.
    """

    frames: npt.NDArray[np.uint8]
    stages: dict[Stage, float]
    steps: list[float]
    first_step_at: float
    host_s: float | None = None
    load_s: float = 0.0


class Runner(ABC):
    """One contender in its own process: loads once, then makes the same video any number of times."""

    @abstractmethod
    def load(self) -> None:
        """Load everything that the first video needs."""

    @abstractmethod
    def make_video(self, write: Callable[[Any], None]) -> Video:
        """Make one video; call ``write`` with its frames ``[n, H, W, 3]`` in order."""


@dataclass(frozen=True)
class Contender:
    """One way to make a video.

    Attributes:
        name: as in results.
        kind: which code runs it.
        what: one line for readers.
        mode: of its kind: ``eager``, ``compile`` or ``low-memory`` for diffusers, a backend for svd-trt.
        bundle: the bundle that it runs, if it runs one.
        obstacle: returns why it cannot run on this machine, or None.
    """

    name: str
    kind: Kind
    what: str
    mode: str
    bundle: BundleKind | None = None
    obstacle: Callable[[], str | None] = lambda: None

    @property
    def on_cpu(self) -> bool:
        """True if it runs on the CPU even if there is a GPU."""
        return self.kind == "openvino" or self.mode == "onnxruntime"


def has_gpu() -> bool:
    """True if this machine has an NVIDIA GPU.

    Raises:
        CudaError: it has one, and its driver does not work.
    """
    return gpu_count() > 0


def _missing(*modules: str, gpu: bool = False) -> Callable[[], str | None]:
    def obstacle() -> str | None:
        if gpu and not has_gpu():
            return "needs an NVIDIA GPU"
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        return f"needs {', '.join(absent)}, not installed" if absent else None

    return obstacle


def _missing_cuda_provider() -> str | None:
    if not has_gpu():
        return "needs an NVIDIA GPU"
    import onnxruntime

    return None if "CUDAExecutionProvider" in onnxruntime.get_available_providers() else "needs onnxruntime-gpu"


_no_tensorrt = _missing("tensorrt", "cuda", gpu=True)
_no_tensorrt_rtx = _missing("tensorrt_rtx_bindings", "cuda", gpu=True)

CONTENDERS: tuple[Contender, ...] = (
    Contender("diffusers-eager", "diffusers", "StableVideoDiffusionPipeline without changes", "eager"),
    Contender(
        "diffusers-compile",
        "diffusers",
        'torch.compile of the UNet; on a GPU mode="reduce-overhead", fullgraph=True',
        "compile",
    ),
    Contender(
        "diffusers-low-memory",
        "diffusers",
        "forward chunking, decode chunks of 2, and on a GPU offloading",
        "low-memory",
    ),
    Contender("svd-trt-onnxruntime", "svd-trt", "default bundle on ONNX Runtime, CPU", "onnxruntime", "default"),
    Contender(
        "svd-trt-onnxruntime-portable",
        "svd-trt",
        "rewritten graph of standard operators on ONNX Runtime, CPU",
        "onnxruntime",
        "portable",
    ),
    Contender(
        "svd-trt-onnxruntime-plain",
        "svd-trt",
        "plain export (--no-rewrites) on ONNX Runtime, CPU",
        "onnxruntime",
        "plain",
    ),
    Contender(
        "svd-trt-onnxruntime-cuda",
        "svd-trt",
        "ONNX Runtime's CUDA provider",
        "cuda",
        "cuda",
        _missing_cuda_provider,
    ),
    Contender("svd-trt-tensorrt", "svd-trt", "TensorRT engines", "tensorrt", "tensorrt", _no_tensorrt),
    Contender(
        "svd-trt-tensorrt-plain",
        "svd-trt",
        "TensorRT engines of the plain export (--no-rewrites)",
        "tensorrt",
        "tensorrt-plain",
        _no_tensorrt,
    ),
    Contender(
        "svd-trt-tensorrt-rtx",
        "svd-trt",
        "TensorRT for RTX engines",
        "tensorrt-rtx",
        "tensorrt-rtx",
        _no_tensorrt_rtx,
    ),
    Contender(
        "svd-trt-tensorrt-rtx-plain",
        "svd-trt",
        "TensorRT for RTX engines of the plain export (--no-rewrites)",
        "tensorrt-rtx",
        "tensorrt-rtx-plain",
        _no_tensorrt_rtx,
    ),
    Contender(
        "openvino",
        "openvino",
        "the rewritten ONNX networks on OpenVINO's CPU plugin, fixed shapes, fp32",
        "cpu",
        "portable",
        _missing("openvino"),
    ),
)
"""The first one is the baseline of ratios and fidelity."""


def choose_contenders(names: Sequence[str], *, precision: str = "fp32") -> list[Contender]:
    """The contenders called ``names``, or all of them if there are none; the baseline is always the first.

    In fp16 the default bundle for ONNX Runtime has standard operators too, so the portable one is skipped.

    Raises:
        ArgumentError: no contender has one of the names.
    """
    known = {contender.name: contender for contender in CONTENDERS}
    for name in names:
        if name not in known:
            raise ArgumentError(f"no contender is called {name!r}; choose from: {', '.join(known)}")
    chosen = [c for i, c in enumerate(CONTENDERS) if not names or c.name in names or i == 0]
    # A video that takes a GPU seconds takes a CPU hours.
    if not names and has_gpu():
        chosen = [replace(c, obstacle=_slow_on_cpu) if c.on_cpu else c for c in chosen]
    if precision == "fp16":
        chosen = [replace(c, obstacle=_same_in_fp16) if c.name == "svd-trt-onnxruntime-portable" else c for c in chosen]
    return chosen


def _same_in_fp16() -> str:
    return "in fp16 the same as svd-trt-onnxruntime"


def _slow_on_cpu() -> str:
    return "runs on the CPU, and this machine has a GPU; name it with --contender to measure it"
