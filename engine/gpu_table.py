"""Peak arithmetic and memory bandwidth of GPUs, from NVIDIA's data sheets and architecture papers."""

from __future__ import annotations

import re

import msgspec

from svd_trt.errors import ArgumentError

__all__ = ["GPUS", "GpuFigures", "find_gpu"]


class GpuFigures(msgspec.Struct, frozen=True):
    """A GPU's figures on paper, at its boost clock."""

    name: str
    fp16_tflops: float
    """Dense products of fp16 on tensor cores with fp32 accumulation, without sparsity, in 1e12 operations a second."""
    fp32_tflops: float
    """Products of fp32 without TF32, in 1e12 operations a second."""
    gb_per_s: float
    """Memory bandwidth, in 1e9 bytes a second."""
    source: str


_AMPERE = "NVIDIA A100 80GB data sheet"
_GA102 = "NVIDIA Ampere GA102 architecture paper, appendix A"
_ADA = "NVIDIA Ada architecture paper, appendix A"
_ADA_PRO = "NVIDIA Ada professional graphics architecture paper"
_HOPPER = "NVIDIA H100 data sheet"
_BLACKWELL = "NVIDIA RTX Blackwell architecture paper, appendix A"
_BLACKWELL_PRO = "NVIDIA RTX PRO Blackwell architecture paper"

GPUS: tuple[GpuFigures, ...] = (
    GpuFigures("A100 PCIe", 312, 19.5, 1935, _AMPERE),
    GpuFigures("A100 SXM", 312, 19.5, 2039, _AMPERE),
    GpuFigures("H100 PCIe", 756, 51, 2000, _HOPPER),
    GpuFigures("H100 SXM", 989, 67, 3350, _HOPPER),
    GpuFigures("H200 SXM", 989, 67, 4800, "NVIDIA H200 data sheet"),
    GpuFigures("L4", 121, 30.3, 300, "NVIDIA L4 data sheet"),
    GpuFigures("L40S", 362, 91.6, 864, "NVIDIA L40S data sheet"),
    GpuFigures("RTX 3090", 71, 35.6, 936, _GA102),
    GpuFigures("RTX 4080", 97.5, 48.7, 717, _ADA),
    GpuFigures("RTX 4090", 165, 82.6, 1008, _ADA),
    GpuFigures("RTX 5080", 113, 56.3, 960, _BLACKWELL),
    GpuFigures("RTX 5090", 210, 104.8, 1792, _BLACKWELL),
    GpuFigures("RTX 6000 Ada", 364, 91.1, 960, _ADA_PRO),
    GpuFigures("RTX PRO 6000", 504, 126, 1792, _BLACKWELL_PRO),
)


def find_gpu(text: str) -> GpuFigures:
    """The GPU that ``text`` names, or a part of its name; case, spaces, NVIDIA and GeForce do not matter.

    Raises:
        ArgumentError: there is none, or several; the message lists them.
    """
    wanted = _plain(text)
    found = [gpu for gpu in GPUS if _plain(gpu.name) == wanted]
    found = found or [gpu for gpu in GPUS if wanted and wanted in _plain(gpu.name)]
    if len(found) == 1:
        return found[0]
    reason = "is several GPUs" if found else "is not a GPU whose figures are known"
    raise ArgumentError(f"{text!r} {reason}; choose one of: {', '.join(gpu.name for gpu in found or GPUS)}")


def _plain(text: str) -> str:
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", text.lower())
