"""The table of GPUs and the roofline model of a list of kernels."""

from __future__ import annotations

import pytest

from svd_trt.engine.gpu_table import GPUS, GpuFigures, find_gpu
from svd_trt.engine.kernels import Kernel, KernelCost
from svd_trt.engine.roofline import roofline
from svd_trt.errors import ArgumentError

_KERNEL = Kernel("k", "kgen", "pointwise", (), (), (), None, ())


def cost(moved: int, flops: int, *, half: bool = True, weights: int = 0) -> KernelCost:
    return KernelCost(_KERNEL, moved, 0, weights, 0, flops, half, known=True)


def test_each_kernel_takes_the_longer_of_its_bytes_and_its_arithmetic() -> None:
    gpu = GpuFigures("test", fp16_tflops=100, fp32_tflops=10, gb_per_s=1000, source="")
    model = roofline([cost(10**9, 10**9), cost(1000, 10**12), cost(1000, 10**12, half=False)], gpu)
    assert model.seconds == pytest.approx(0.001 + 0.01 + 0.1), "1 GB, then 1 TFLOP in fp16, then 1 TFLOP in fp32"
    assert model.memory_seconds == pytest.approx(0.001, rel=1e-4)
    assert model.arithmetic_seconds == pytest.approx(0.11, rel=1e-3)
    assert model.memory_bound_share == pytest.approx(0.001 / 0.111)
    assert cost(10**9, 0, weights=1).moved == 10**9, "without weights"
    assert roofline([cost(10**9, 0, weights=10**9)], gpu).seconds == pytest.approx(0.002), "weights take time too"
    assert roofline([], gpu).seconds == roofline([], gpu).memory_bound_share == 0


@pytest.mark.parametrize("text", ["RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "4090"])
def test_gpus_are_found_by_the_names_that_people_write(text: str) -> None:
    assert find_gpu(text).name == "RTX 4090"
    assert find_gpu("L4").name == "L4", "and not L40S"


def test_unknown_gpus_are_answered_with_the_list() -> None:
    with pytest.raises(ArgumentError) as error:
        find_gpu("GTX 1080")
    assert all(gpu.name in str(error.value) for gpu in GPUS)
    with pytest.raises(ArgumentError, match=r"is several GPUs; choose one of: H100 PCIe, H100 SXM$"):
        find_gpu("H100")
    with pytest.raises(ArgumentError, match="RTX 3090"):
        find_gpu("NVIDIA")


def test_figures_are_plausible() -> None:
    """A wrong unit or a figure with sparsity would fall out of these bounds, which all generations keep."""
    for gpu in GPUS:
        assert 1.5 <= gpu.fp16_tflops / gpu.fp32_tflops <= 17, gpu.name
        assert 70 <= gpu.fp16_tflops * 1e3 / gpu.gb_per_s <= 420, gpu.name
        assert gpu.source
    assert [gpu.name for gpu in GPUS] == sorted(gpu.name for gpu in GPUS)
