"""What a benchmark's result holds: the one description of the JSON files that the harness writes and others read.

One file is one run: everything was measured on one machine, one after another, with the same picture, seed and
arguments. Times are seconds, sizes bytes, rates operations or bytes per second. A field that a machine or a contender
cannot give is null and never zero. Readers of an older file raise `svd_trt.errors.ResultError`.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

__all__ = [
    "BASELINE",
    "SCHEMA",
    "STAGES",
    "Contender",
    "Curve",
    "Fidelity",
    "Measure",
    "Peak",
    "Point",
    "Result",
    "Round",
    "Spread",
    "Stage",
    "Subject",
]

SCHEMA = 1

BASELINE = "diffusers-eager"
"""The contender that ratios are taken against; its fp32 frames are what fidelity is measured against."""

# "image_encode" has the picture's preparation for both encoders in it.
Stage: TypeAlias = Literal["image_encode", "vae_encode", "denoise", "decode", "write"]

STAGES: tuple[Stage, ...] = ("image_encode", "vae_encode", "denoise", "decode", "write")
"""In the order in which they run; together they are a video."""


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What every contender was asked to make."""

    model: str
    """``random:mid``, a checkpoint or a bundle."""
    precision: Literal["fp32", "fp16"]
    frames: int
    height: int
    width: int
    steps: int
    decode_chunk_size: int
    seed: int
    picture: str = ""
    """First digits of the sha256 of the file that the video is of."""
    step_flops: float | None = None
    """Arithmetic of one denoising step as diffusers computes it, all guidance branches."""
    decode_flops: float | None = None
    """Arithmetic of decoding all frames as diffusers does."""


class Measure(msgspec.Struct, frozen=True):
    """A figure over rounds."""

    median: float
    low: float
    high: float
    """Least and most of the rounds."""


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One video by one contender, everything warm."""

    round: int
    total_s: float
    """From the call to the last frame written."""
    stages: dict[Stage, float]
    steps: list[float]
    """Each denoising step."""
    energy_j: float | None = None


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a `Contender` that vary from round to round, with their least and most."""

    step_s: Measure
    total_s: Measure
    stages: dict[Stage, Measure]
    ratio_to_eager: Measure
    step_ratio_to_eager: Measure


class Fidelity(msgspec.Struct, frozen=True, kw_only=True):
    """Frames compared with those of fp32 eager diffusers for the same seed; identical frames count as 200 dB."""

    psnr_db: list[float]
    """Of each frame."""
    ssim: list[float]
    worst_psnr_db: float
    worst_ssim: float


class Contender(msgspec.Struct, frozen=True, kw_only=True):
    """One way to make the video."""

    name: str
    """``diffusers-eager``, ``diffusers-compile``, ``diffusers-low-memory``, ``svd-trt-onnxruntime``,
    ``svd-trt-onnxruntime-plain``, ``svd-trt-tensorrt-rtx``, ``openvino``, ..."""
    what: str
    """A sentence for people: library, compiler mode, backend, what is special."""
    skipped: str | None = None
    """Why it was not measured; then nothing below is given."""
    step_s: float | None = None
    """Of a denoising step. This and the four below are medians over the rounds; `spread` has least and most."""
    total_s: float | None = None
    """Of a video, from the call to the last frame written."""
    stages: dict[Stage, float] = msgspec.field(default_factory=dict)
    ratio_to_eager: float | None = None
    """Total of eager over total of this one, in the same round: above 1 is faster."""
    step_ratio_to_eager: float | None = None
    """The same of a step."""
    spread: Spread | None = None
    psnr_db: float | None = None
    """Of the worst frame."""
    fidelity: Fidelity | None = None
    import_s: float | None = None
    load_s: float | None = None
    """Weights and networks, from the disk to ready to run."""
    prepare_s: float | None = None
    """Once a machine or once a process: building the bundle, or torch.compile's work in the first call."""
    first_call_s: float | None = None
    """What the first video of a process takes beyond later ones: compiling, tuning, memory that is new."""
    warmup_s: float | None = None
    """The first video of the process."""
    startup_s: float | None = None
    """From the process's start to the first step's beginning, without `load_s`."""
    peak_rss: int | None = None
    peak_vram: int | None = None
    energy_j: float | None = None
    """Of one video, median."""
    host_overhead_s: float | None = None
    """Of a step: what it takes beyond the network's own time."""
    step_flops_per_s: float | None = None
    """`Subject.step_flops` over `step_s`: what the step is worth, whatever arithmetic was saved."""
    share_of_peak: float | None = None
    rounds: list[Round] = msgspec.field(default_factory=list)


class Point(msgspec.Struct, frozen=True):
    """One place on a curve."""

    at: float
    seconds: Measure
    peak_bytes: int | None


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """Time and memory of one contender against one argument, all others as in the subject."""

    contender: str
    axis: Literal["frames", "steps", "pixels", "decode_chunk_size"]
    what: Literal["total_s", "step_s", "decode_s"]
    points: list[Point]
    slope: float
    """Seconds per unit of the axis, least squares."""
    intercept: float
    exponent: float
    """Of the power law through the points: 1 is proportional."""


class Peak(msgspec.Struct, frozen=True):
    """The machine's rate at a large matrix product, timed in the same run."""

    precision: str
    size: int
    flops_per_s: float


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run."""

    schema: int = SCHEMA
    benchmark: Literal["side-by-side"] = "side-by-side"
    date: str
    """ISO 8601, UTC."""
    command: str
    """What was asked, without where it was written to."""
    machine: dict[str, Any]
    """See `svd_trt.benchmarks.machine.describe_machine`; clocks and load before anything was measured."""
    clocks_after: dict[str, Any] = msgspec.field(default_factory=dict)
    """The same of `svd_trt.benchmarks.machine.describe_clocks` after the last round."""
    notes: list[str] = msgspec.field(default_factory=list)
    """What could not be measured or compared, and why."""
    threads: int
    subject: Subject
    peak: Peak | None
    contenders: list[Contender]
    curves: list[Curve] = msgspec.field(default_factory=list)
