"""Who takes part: what a user would run to make the same video, and whether it can be run here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from svd_trt.engine.driver import gpu_count
from svd_trt.errors import ArgumentError

__all__ = ["CONTENDERS", "BundleKind", "Entrant", "Kind", "choose", "has_gpu"]

Kind: TypeAlias = Literal["diffusers", "svd-trt", "openvino"]
BundleKind: TypeAlias = Literal[
    "default", "portable", "plain", "tensorrt", "tensorrt-plain", "tensorrt-rtx", "tensorrt-rtx-plain"
]
"""``default`` is what ``svd-trt build`` writes for ONNX Runtime, ``portable`` the same with the standard's operators
alone, ``plain`` without rewrites; the others hold engines, with rewrites and without."""


@dataclass(frozen=True)
class Entrant:
    """One way to make a video.

    Attributes:
        name: as in results.
        kind: which code runs it.
        what: for people.
        mode: of its kind: ``eager``, ``compile`` or ``low-memory``; a backend of svd-trt.
        bundle: what it runs, if it runs a bundle.
        obstacle: why it cannot be run here, or None.
    """

    name: str
    kind: Kind
    what: str
    mode: str
    bundle: BundleKind | None = None
    obstacle: Callable[[], str | None] = lambda: None

    @property
    def on_cpu(self) -> bool:
        """It runs there even where there is a GPU."""
        return self.kind == "openvino" or self.mode == "onnxruntime"


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU.

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


def _cuda_provider() -> str | None:
    if not has_gpu():
        return "needs an NVIDIA GPU"
    import onnxruntime

    return None if "CUDAExecutionProvider" in onnxruntime.get_available_providers() else "needs onnxruntime-gpu"


CONTENDERS: tuple[Entrant, ...] = (
    Entrant("diffusers-eager", "diffusers", "StableVideoDiffusionPipeline as it comes", "eager"),
    Entrant(
        "diffusers-compile",
        "diffusers",
        'torch.compile of the UNet; on a GPU mode="reduce-overhead", fullgraph=True',
        "compile",
    ),
    Entrant(
        "diffusers-low-memory",
        "diffusers",
        "forward chunking, decode chunks of 2, and on a GPU offloading",
        "low-memory",
    ),
    Entrant("svd-trt-onnxruntime", "svd-trt", "default bundle on ONNX Runtime, CPU", "onnxruntime", "default"),
    Entrant(
        "svd-trt-onnxruntime-portable",
        "svd-trt",
        "rewritten graph of standard operators on the same",
        "onnxruntime",
        "portable",
    ),
    Entrant("svd-trt-onnxruntime-plain", "svd-trt", "plain export (--no-rewrites) on the same", "onnxruntime", "plain"),
    Entrant("svd-trt-onnxruntime-cuda", "svd-trt", "ONNX Runtime's CUDA provider", "cuda", "portable", _cuda_provider),
    Entrant(
        "svd-trt-tensorrt",
        "svd-trt",
        "TensorRT engines",
        "tensorrt",
        "tensorrt",
        _missing("tensorrt", "cuda", gpu=True),
    ),
    Entrant(
        "svd-trt-tensorrt-plain",
        "svd-trt",
        "TensorRT engines of the plain export (--no-rewrites)",
        "tensorrt",
        "tensorrt-plain",
        _missing("tensorrt", "cuda", gpu=True),
    ),
    Entrant(
        "svd-trt-tensorrt-rtx",
        "svd-trt",
        "TensorRT for RTX engines",
        "tensorrt-rtx",
        "tensorrt-rtx",
        _missing("tensorrt_rtx_bindings", "cuda", gpu=True),
    ),
    Entrant(
        "svd-trt-tensorrt-rtx-plain",
        "svd-trt",
        "TensorRT for RTX engines of the plain export (--no-rewrites)",
        "tensorrt-rtx",
        "tensorrt-rtx-plain",
        _missing("tensorrt_rtx_bindings", "cuda", gpu=True),
    ),
    Entrant(
        "openvino",
        "openvino",
        "the rewritten ONNX networks on OpenVINO's CPU plugin, shapes fixed, fp32",
        "cpu",
        "portable",
        _missing("openvino"),
    ),
)
"""The first is what ratios and fidelity refer to."""


def choose(names: Sequence[str], *, precision: str = "fp32") -> list[Entrant]:
    """The contenders called ``names``, the baseline always among them and first; all of them for no names.

    In fp16 the default bundle for ONNX Runtime has the standard's operators too, so the portable one is left out.

    Raises:
        ArgumentError: one has no such name.
    """
    known = {entrant.name: entrant for entrant in CONTENDERS}
    for name in names:
        if name not in known:
            raise ArgumentError(f"no contender is called {name!r}; choose from: {', '.join(known)}")
    chosen = [e for i, e in enumerate(CONTENDERS) if not names or e.name in names or i == 0]
    # A video that takes a GPU seconds takes a processor hours.
    if not names and has_gpu():
        chosen = [replace(e, obstacle=_on_cpu) if e.on_cpu else e for e in chosen]
    if precision == "fp16":
        chosen = [replace(e, obstacle=_same) if e.name == "svd-trt-onnxruntime-portable" else e for e in chosen]
    return chosen


def _same() -> str:
    return "in fp16 the same as svd-trt-onnxruntime"


def _on_cpu() -> str:
    return "runs on the CPU, and this machine has a GPU; name it with --contender to wait for it"
