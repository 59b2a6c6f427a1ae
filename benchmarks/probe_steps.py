"""The steps of `svd_trt.benchmarks.gpu_probe`: what each asks, what it needs, and the function that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from svd_trt.engine.manifest import TensorRtName
from svd_trt.errors import ArgumentError

__all__ = [
    "DRY",
    "FULL",
    "STEPS",
    "Answer",
    "Need",
    "Outcome",
    "ProbeError",
    "ProbeJob",
    "Report",
    "Sizes",
    "SkippedError",
    "Step",
    "bundle_of",
    "choose_steps",
    "sizes_of",
]

Need: TypeAlias = Literal[
    "gpu", "torch", "diffusers", "cuda-python", "nvrtc", "tensorrt", "provider", "checkout", "bundle"
]
Outcome: TypeAlias = Literal["passed", "failed", "crashed", "timeout", "skipped"]
Report: TypeAlias = Callable[..., None]
"""Called with figures by keyword, as soon as they are known."""

NEEDS: dict[Need, str] = {
    "gpu": "an NVIDIA GPU; a dry run works without",
    "torch": "torch, with CUDA unless it is a dry run",
    "diffusers": "diffusers, transformers and accelerate",
    "cuda-python": "cuda-python, and a GPU also in a dry run",
    "nvrtc": "NVRTC, which torch with CUDA brings",
    "tensorrt": "the TensorRT of --backend",
    "provider": "onnxruntime-gpu; a dry run works without",
    "checkout": "the folder tests/ of a checkout as the current folder, and pytest",
    "bundle": "the step `bundle`, or --bundle",
}


@dataclass(frozen=True)
class Sizes:
    """What the steps compute.

    Attributes:
        model: the checkpoint, as ``svd-trt build`` takes it.
        frames: of a video; ``height`` and ``width`` in pixels.
        chunk: of most decodes: the default for these sizes.
        chunks: sizes of decode chunks that are compared with torch, by the step's name for them.
        steps: denoising steps of a video.
        rounds: how often each contender is timed.
        tokens: of attention with large scores.
        copy_bytes: of the buffers that are copied.
    """

    model: str
    frames: int
    height: int
    width: int
    chunk: int
    chunks: dict[int, int]
    steps: int
    rounds: int
    tokens: int
    copy_bytes: int


FULL = Sizes(
    model="random:svd-xt",
    frames=25,
    height=576,
    width=1024,
    chunk=5,
    chunks={8: 8, 14: 14, 15: 15, 25: 25},
    steps=25,
    rounds=7,
    tokens=9216,
    copy_bytes=256 << 20,
)
DRY = Sizes(
    model="random:tiny",
    frames=3,
    height=32,
    width=32,
    chunk=3,
    chunks={8: 2, 14: 3, 15: 4, 25: 6},
    steps=2,
    rounds=2,
    tokens=96,
    copy_bytes=1 << 20,
)
"""Of a dry run, which executes every step as far as this machine can."""


class ProbeJob(msgspec.Struct, frozen=True):
    """What the process of a step is to do."""

    work: str
    """Folder for bundles, which later steps use."""
    backend: TensorRtName = "tensorrt-rtx"
    bundle: str | None = None
    """Use this bundle instead of the one of the step ``bundle``."""
    model: str | None = None
    """Use this checkpoint instead of that of the sizes."""
    dry_run: bool = False
    rtx_runs: bool = False
    """A step ``rtx-*`` showed that TensorRT for RTX runs on this GPU, whatever capabilities it lists."""
    place: str = ""
    """`Step.place`; its ``arguments`` and ``needs`` follow."""
    arguments: dict[str, Any] = {}
    needs: tuple[Need, ...] = ()


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """From the process of a step: figures, and at the end its outcome."""

    figures: dict[str, Any] = {}
    outcome: Outcome | None = None
    reason: str | None = None


class SkippedError(Exception):
    """The step cannot run here; the message says why."""


class ProbeError(Exception):
    """The step found what must not be; the message says what."""


def sizes_of(job: ProbeJob) -> Sizes:
    """What the step computes."""
    sizes = DRY if job.dry_run else FULL
    return sizes if job.model is None else replace(sizes, model=job.model)


def bundle_of(job: ProbeJob) -> Path:
    """The bundle that the steps use: the one that was given, or the place of the one of the step ``bundle``."""
    kind = "dry-run" if job.dry_run else "full-size"
    return Path(job.bundle) if job.bundle is not None else Path(job.work, f"bundle-{kind}-{job.backend}")


@dataclass(frozen=True)
class Step:
    """One question.

    Attributes:
        name: for ``--step`` and the record. A step ``a-b`` also belongs to the group ``a``.
        what: the question.
        needs: without these it is skipped.
        seconds: its limit.
        place: ``module:function``, which is called as ``function(job, report, **arguments)``.
        arguments: see ``place``.
    """

    name: str
    what: str
    needs: tuple[Need, ...]
    seconds: int
    place: str
    arguments: dict[str, Any]


def _step(name: str, what: str, needs: tuple[Need, ...], seconds: int, place: str, **arguments: Any) -> Step:
    return Step(name, what, needs, seconds, f"svd_trt.benchmarks.{place}", arguments)


_TORCH: tuple[Need, ...] = ("gpu", "torch", "diffusers")
_ENGINE: tuple[Need, ...] = ("gpu", "tensorrt", "bundle")

STEPS: tuple[Step, ...] = (
    *(
        _step(
            f"rtx-{target}",
            f"Does TensorRT for RTX build, accept and run a small fp16 engine here, with compute capability {target}?",
            ("gpu", "tensorrt"),
            120,
            "probe_rtx:run_small_engine",
            target=target,
        )
        for target in ("unset", "current", "8.0", "8.9", "12.0")
    ),
    _step(
        "driver",
        "Do pinned copies, events, capture and two alternating graphs work, with an NVRTC kernel in TensorRT's place?",
        ("cuda-python", "nvrtc"),
        120,
        "probe_driver:run_driver",
    ),
    _step(
        "gpu-tests",
        "Do the tests of the runtime pass on this GPU (make gpu-test)?",
        ("gpu", "tensorrt", "checkout"),
        580,
        "probe_engines:run_gpu_tests",
    ),
    _step(
        "provider-miniature",
        "Does ONNX Runtime's CUDA provider make the frames of the CPU, with the trained miniature?",
        (*_TORCH, "provider", "checkout"),
        400,
        "probe_provider:compare_miniature",
    ),
    _step(
        "provider-scores",
        "Attention with large scores in ONNX Runtime's own operator, in fp16, against fp32.",
        (*_TORCH, "provider"),
        120,
        "probe_provider:compare_provider_scores",
    ),
    _step(
        "provider-video",
        "A whole video by ONNX Runtime's CUDA provider: the build, and seconds by stage.",
        (*_TORCH, "provider"),
        580,
        "probe_provider:make_provider_video",
    ),
    *(
        _step(
            f"provider-{name}",
            f"The same video with {what}.",
            (*_TORCH, "provider"),
            300,
            "probe_provider:make_provider_video",
            **options,
        )
        for name, what, options in (
            ("arena", "an arena that doubles", {"arena_extend_strategy": "kNextPowerOfTwo"}),
            ("search", "the fastest convolutions that a search finds", {"cudnn_conv_algo_search": "EXHAUSTIVE"}),
            ("workspace", "as much memory for convolutions as they ask for", {"cudnn_conv_use_max_workspace": "1"}),
            ("nhwc", "channels last in convolutions", {"prefer_nhwc": "1"}),
        )
    ),
    _step(
        "torch-denoiser",
        "A denoising step in torch: the rewritten network against diffusers, time and difference.",
        _TORCH,
        300,
        "probe_torch:race_denoisers",
        compiled=False,
    ),
    _step(
        "torch-decoder",
        "A decode in torch: the rewritten network against diffusers, time and difference.",
        _TORCH,
        200,
        "probe_torch:race_decoders",
        compiled=False,
    ),
    _step(
        "torch-scores",
        "Attention with large scores in real fp16: diffusers' layer and the bounded one against fp32.",
        _TORCH,
        120,
        "probe_torch:compare_scores",
    ),
    *(
        _step(
            f"chunk-{chunk}",
            f"Decoding {chunk} frames together in torch: is the rewritten network right? (from 15, tensors of 2^31)",
            _TORCH,
            200,
            "probe_torch:compare_chunk",
            chunk=chunk,
        )
        for chunk in FULL.chunks
    ),
    _step(
        "bundle",
        "Build the full-size bundle that the next steps use.",
        ("torch", "diffusers", "tensorrt"),
        580,
        "probe_engines:build",
    ),
    _step(
        "engine-denoiser",
        "The denoiser's engine and diffusers in torch, both against diffusers in fp32.",
        (*_ENGINE, "torch", "diffusers"),
        300,
        "probe_engines:compare_denoiser",
    ),
    _step(
        "engine-video",
        "A whole video: seconds by stage, memory against the plan, the slowest layers.",
        _ENGINE,
        300,
        "probe_engines:make_video",
    ),
    *(
        _step(
            f"engine-chunk-{chunk}",
            f"The decoder's engine on {chunk} frames against diffusers in torch: is it right?",
            (*_ENGINE, "torch", "diffusers"),
            200,
            "probe_engines:compare_chunk",
            chunk=chunk,
        )
        for chunk in FULL.chunks
    ),
    _step(
        "compiled-denoiser",
        "A denoising step in torch with torch.compile: diffusers and the rewritten network.",
        _TORCH,
        580,
        "probe_torch:race_denoisers",
        compiled=True,
    ),
    _step(
        "compiled-decoder",
        "A decode in torch with torch.compile: diffusers and the rewritten network.",
        _TORCH,
        580,
        "probe_torch:race_decoders",
        compiled=True,
    ),
)
"""In the order in which they run."""


def choose_steps(names: tuple[str, ...]) -> list[Step]:
    """The steps with these names or of these groups, in order; all if there is none.

    Raises:
        ArgumentError: a name is unknown; the message lists all.
    """
    groups = dict.fromkeys(step.name.partition("-")[0] for step in STEPS)
    known = {step.name for step in STEPS} | set(groups)
    if unknown := [name for name in names if name not in known]:
        listed = ", ".join(step.name for step in STEPS)
        raise ArgumentError(f"there is no step {unknown[0]!r}; choose one of {listed}, or a group: {', '.join(groups)}")
    chosen = [step for step in STEPS if step.name in names or step.name.partition("-")[0] in names]
    return chosen if names else list(STEPS)
