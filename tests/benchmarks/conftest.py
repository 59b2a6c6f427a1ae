"""Results with realistic figures, to read, draw and compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from svd_trt.benchmarks.results import (
    STAGES,
    ContenderResult,
    Fidelity,
    Peak,
    Result,
    Round,
    Spread,
    Summary,
    Workload,
)


def contender_result(name: str, seconds: list[float], eager: list[float], **more: Any) -> ContenderResult:
    spread = Spread(
        step_s=Summary.of([s / 10 for s in seconds]),
        total_s=Summary.of(seconds),
        stages={stage: Summary.of([s / 5 for s in seconds]) for stage in STAGES},
        ratio_to_eager=Summary.of_ratios(eager, seconds),
        step_ratio_to_eager=Summary.of_ratios(eager, seconds),
    )
    rounds = [
        Round(round=i, total_s=s, stages=dict.fromkeys(STAGES, s / 5), steps=[s / 10] * 2)
        for i, s in enumerate(seconds)
    ]
    fields: dict[str, Any] = {
        "step_s": spread.step_s.median,
        "total_s": spread.total_s.median,
        "stages": {stage: m.median for stage, m in spread.stages.items()},
        "ratio_to_eager": spread.ratio_to_eager.median,
        "step_ratio_to_eager": spread.step_ratio_to_eager.median,
        "spread": spread,
        "psnr_db": 88.5,
        "fidelity": Fidelity(psnr_db=[90.0, 88.5], ssim=[1.0, 0.9999], worst_psnr_db=88.5, worst_ssim=0.9999),
        "peak_rss": 1_500_000_000,
        "rounds": rounds,
    }
    return ContenderResult(name=name, what="for tests", **fields | more)


@pytest.fixture(scope="session")
def make_result() -> Callable[..., Result]:
    def make(ours: list[float] | None = None, **more: Any) -> Result:
        eager = [10.0, 10.4, 9.9]
        fields: dict[str, Any] = {
            "date": "2026-01-02T03:04:05+00:00",
            "command": "svd-trt bench --preset mid",
            "machine": {"cpu": "A CPU", "cores": 2, "gpu": [], "packages": {"torch": "2.0"}, "commit": "abc"},
            "threads": 2,
            "workload": Workload(
                model="random:mid",
                precision="fp32",
                frames=2,
                height=64,
                width=64,
                steps=2,
                decode_chunk_size=2,
                seed=1,
                step_flops=2e11,
            ),
            "peak": Peak("fp32", 2048, 2e11),
            "contenders": [
                contender_result("diffusers-eager", eager, eager, psnr_db=200.0),
                contender_result("svd-trt-onnxruntime", ours or [6.0, 6.3, 5.9], eager),
                ContenderResult(name="svd-trt-tensorrt", what="engines", skipped="needs an NVIDIA GPU"),
            ],
        }
        return Result(**fields | more)

    return make
