"""What a benchmark's result holds, and its JSON files: the harness writes them, the reports read them.

One file is one run: everything was measured on one machine, one contender after another, with the same picture, seed
and arguments. Times are seconds, sizes bytes, rates operations per second. A figure that the machine or the contender
cannot give is null, never zero.
"""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from svd_trt.engine.manifest import NOT_JSON
from svd_trt.errors import OutputError, ResultError

__all__ = [
    "BASELINE",
    "SCHEMA",
    "STAGES",
    "ContenderResult",
    "Curve",
    "Fidelity",
    "Peak",
    "Point",
    "Result",
    "Round",
    "Spread",
    "Stage",
    "Summary",
    "Workload",
    "encode_result",
    "encode_rounded",
    "read_result",
    "write_file",
    "write_result",
]

SCHEMA = 1

BASELINE = "diffusers-eager"
"""The contender that ratios are taken against. Fidelity is measured against its frames in fp32."""

Stage: TypeAlias = Literal["image_encode", "vae_encode", "denoise", "decode", "write"]

STAGES: tuple[Stage, ...] = ("image_encode", "vae_encode", "denoise", "decode", "write")
"""The stages of a video in the order in which they run. ``image_encode`` includes preparing the picture."""

_DIGITS = 6


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """The video that every contender makes."""

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
    """First digits of the SHA-256 of the picture's file."""
    step_flops: float | None = None
    """Arithmetic of one denoising step as diffusers computes it, all guidance branches."""
    decode_flops: float | None = None
    """Arithmetic of decoding all frames as diffusers does."""


class Summary(msgspec.Struct, frozen=True):
    """A figure over all rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Median, minimum and maximum of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def of_ratios(cls, baseline: Sequence[float], other: Sequence[float]) -> Summary:
        """Baseline over other within each round: what slows the machine down in a round cancels."""
        return cls.of([a / b for a, b in zip(baseline, other, strict=True)])


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One video by one contender, after warm-up."""

    round: int
    total_s: float
    """From the call to the last frame written."""
    stages: dict[Stage, float]
    steps: list[float]
    """Seconds of each denoising step."""
    energy_j: float | None = None


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a `ContenderResult` that vary from round to round."""

    step_s: Summary
    total_s: Summary
    stages: dict[Stage, Summary]
    ratio_to_eager: Summary
    step_ratio_to_eager: Summary


class Fidelity(msgspec.Struct, frozen=True, kw_only=True):
    """Frames compared with those of eager diffusers in fp32 for the same seed; identical frames count as 200 dB."""

    psnr_db: list[float]
    """Of each frame."""
    ssim: list[float]
    worst_psnr_db: float
    worst_ssim: float


class ContenderResult(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of one contender."""

    name: str
    """As in `svd_trt.benchmarks.contenders.CONTENDERS`."""
    what: str
    """One line for readers: library, compiler mode, backend."""
    skipped: str | None = None
    """Why it was not measured; if this is given, nothing below is."""
    step_s: float | None = None
    """Of a denoising step. This and the next four are medians over the rounds; `spread` has minimum and maximum."""
    total_s: float | None = None
    """Of a video, from the call to the last frame written."""
    stages: dict[Stage, float] = msgspec.field(default_factory=dict)
    ratio_to_eager: float | None = None
    """Total of the baseline over total of this contender, in the same round: above 1 is faster."""
    step_ratio_to_eager: float | None = None
    """The same for a step."""
    spread: Spread | None = None
    psnr_db: float | None = None
    """Of the worst frame."""
    fidelity: Fidelity | None = None
    import_s: float | None = None
    load_s: float | None = None
    """Weights and networks, from disk to ready to run."""
    prepare_s: float | None = None
    """Work that is done once: building the bundle, or torch.compile's work in the first call."""
    first_call_s: float | None = None
    """How much longer the first video of a process takes than later ones: compiling, tuning, allocating."""
    warmup_s: float | None = None
    """The first video of the process."""
    startup_s: float | None = None
    """From the start of the process to the start of the first step, without `load_s`."""
    peak_rss: int | None = None
    peak_vram: int | None = None
    energy_j: float | None = None
    """Of one video, median."""
    host_overhead_s: float | None = None
    """The part of a step that its network does not account for."""
    step_flops_per_s: float | None = None
    """`Workload.step_flops` over `step_s`: arithmetic that a contender saves counts as done."""
    share_of_peak: float | None = None
    rounds: list[Round] = msgspec.field(default_factory=list)


class Point(msgspec.Struct, frozen=True):
    """One point of a curve."""

    at: float
    seconds: Summary
    peak_bytes: int | None


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """Time and memory of one contender against one argument, all others as in the workload."""

    contender: str
    axis: Literal["frames", "steps", "pixels", "decode_chunk_size"]
    what: Literal["total_s", "step_s", "decode_s"]
    points: list[Point]
    slope: float
    """Seconds for each unit of the axis, by least squares."""
    intercept: float
    exponent: float
    """Of the power law through the points: 1 is proportional."""


class Peak(msgspec.Struct, frozen=True):
    """The rate of a large matrix product on this machine, timed in the same run."""

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
    """The command line, without the paths it wrote to."""
    machine: dict[str, Any]
    """See `svd_trt.benchmarks.machine.describe_machine`; clocks and load are those before the first measurement."""
    clocks_after: dict[str, Any] = msgspec.field(default_factory=dict)
    """Clocks and load after the last round."""
    notes: list[str] = msgspec.field(default_factory=list)
    """What could not be measured or compared, and why."""
    threads: int
    workload: Workload = msgspec.field(name="subject")
    peak: Peak | None
    contenders: list[ContenderResult]
    curves: list[Curve] = msgspec.field(default_factory=list)


def encode_result(result: Result) -> bytes:
    """The content of a result file."""
    return encode_rounded(result)


def encode_rounded(result: msgspec.Struct) -> bytes:
    """``result`` as indented JSON, numbers with six significant digits."""
    rounded = _rounded(msgspec.to_builtins(result))
    return msgspec.json.format(msgspec.json.encode(rounded), indent=1) + b"\n"


def write_result(path: Path, result: Result) -> None:
    """Write ``result`` to ``path``, which a failure leaves as it was.

    Raises:
        OutputError: it cannot be written.
    """
    write_file(path, encode_result(result))


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, which a failure leaves as it was; write to pipes and devices in place.

    Raises:
        OutputError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # another run may write the same file
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        try:
            partial.write_bytes(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; free space or choose another place") from error


def read_result(path: Path) -> Result:
    """Read a result of ``svd-trt bench``.

    Raises:
        ResultError: the file is missing, damaged, something else, or of another version.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror}") from error
    try:
        raw = msgspec.json.decode(content)
    except NOT_JSON as error:
        raise ResultError(f"{path} is not JSON, or cut short: {error}") from error
    if not isinstance(raw, dict) or raw.get("benchmark") != "side-by-side":
        raise ResultError(f"{path} is not a result of `svd-trt bench`")
    if raw.get("schema") != SCHEMA:
        raise ResultError(f"{path} has schema {raw.get('schema')}, and this svd-trt reads {SCHEMA}; measure again")
    try:
        result = msgspec.convert(raw, Result)
    except msgspec.ValidationError as error:
        raise ResultError(f"{path} is damaged: {error}") from error
    if (without := next((c for c in result.contenders if c.skipped is None and not _has_times(c)), None)) is not None:
        raise ResultError(f"{path} is damaged: it has neither times of {without.name} nor the reason")
    return result


def _has_times(contender: ContenderResult) -> bool:
    return contender.spread is not None and contender.total_s is not None and contender.total_s > 0


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
