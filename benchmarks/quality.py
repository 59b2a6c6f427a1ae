"""What few evaluations cost in quality: schedules, samplers and intervals of guidance, on one bundle.

Every variant makes the same videos with the same seeds. They are compared with those of a reference, normally 50 steps
of the bundle's own schedule, and with true clips if there are some.
"""

from __future__ import annotations

import datetime as dt
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias
from zipfile import BadZipFile

import msgspec
import numpy as np
import numpy.typing as npt

from svd_trt.benchmarks.machine import describe_machine
from svd_trt.engine.manifest import NOT_JSON, Manifest
from svd_trt.engine.spec import SHALLOW
from svd_trt.errors import ArgumentError, ImageError, ResultError
from svd_trt.export.fidelity import psnr
from svd_trt.progress import Progress
from svd_trt.runtime.deep_steps import deep_steps
from svd_trt.runtime.pipeline import VideoPipeline
from svd_trt.runtime.quality_presets import QUALITIES
from svd_trt.runtime.settings import Settings, guided_steps_of

__all__ = [
    "REFERENCE",
    "Clip",
    "Point",
    "QualityResult",
    "Variant",
    "default_variants",
    "evaluations_of",
    "is_quality",
    "measure_quality",
    "read_clips",
    "read_quality",
    "with_frontier",
]

SCHEMA = 1
REFERENCE: Mapping[str, Any] = {"num_inference_steps": 50}
"""Arguments of the videos that the others are compared with."""

Frames: TypeAlias = npt.NDArray[np.uint8]
_INTERVAL = (0.0, 50.0)
_NARROW_INTERVAL = (0.5, 20.0)


class Variant(msgspec.Struct, frozen=True):
    """One way to make a video.

    Attributes:
        series: what it has in common with others that are joined by a line.
        label: what tells it from these.
        arguments: of a generation.
    """

    series: str
    label: str
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """Series and label."""
        return ", ".join(filter(None, (self.series, self.label)))


class Clip(msgspec.Struct, frozen=True):
    """A picture to start from, with the arguments that belong to it.

    Attributes:
        picture: a path, or an array ``[H, W, 3]``.
        arguments: such as ``fps`` and ``motion_bucket_id``.
        truth: the true video, ``[F, H, W, 3]``; None if nobody knows it.
    """

    picture: Any
    arguments: dict[str, Any]
    truth: Frames | None


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """What one variant cost and gave, over all videos."""

    series: str
    label: str
    arguments: dict[str, Any]
    evaluations: float
    """Evaluations of the denoiser over one branch for a video: two for a step with guidance, one for another. Shallow
    steps count as the part of one that their arithmetic is."""
    seconds: float
    """Of one video, median."""
    denoise_seconds: float
    """Of its denoising steps, median."""
    error: float
    """Root mean square difference of pixels in [0, 1] to the true clips, else to the reference: mean over videos."""
    psnr_db: float
    """To the reference: mean over videos. Identical videos count as 200 dB."""
    least_psnr_db: float
    """Of the worst video."""
    frontier: bool = False
    """No other point has a smaller error for as few evaluations."""


class QualityResult(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run."""

    schema: int = SCHEMA
    benchmark: Literal["quality"] = "quality"
    date: str
    command: str
    machine: dict[str, Any]
    backend: str
    model: str
    precision: str
    frames: int
    height: int
    width: int
    pictures: int
    seed: int
    """Of the first video; the next has the next seed."""
    truth: bool
    """Whether errors are those to true clips."""
    reference: dict[str, Any]
    """Arguments of the videos that the others are compared with."""
    reference_error: float
    """Of these videos to the true clips; 0 if there are none."""
    notes: list[str] = msgspec.field(default_factory=list)
    """Variants that the bundle refused, and why."""
    points: list[Point]


def default_variants(*, shallow: bool = False) -> list[Variant]:
    """Schedules, samplers and intervals of guidance, from the slowest to the fastest of each series.

    Those of a preset have its name.

    Args:
        shallow: also shallow steps, for a bundle that has them.
    """
    ays = {"schedule": "ays"}
    interval = {"guidance_interval": _INTERVAL}
    narrow = ays | {"sampler": "unic", "guidance_interval": _NARROW_INTERVAL}
    series: list[tuple[str, Sequence[int], dict[str, Any]]] = [
        ("karras, euler", (25, 15, 10, 8, 5), {"schedule": "karras", "sampler": "euler"}),
        ("ays, euler", (10, 8, 5), ays | {"sampler": "euler"}),
        ("ays, unic", (10, 8, 5), ays | {"sampler": "unic"}),
        ("karras, euler, interval", (25, 15), {"schedule": "karras", "sampler": "euler"} | interval),
        ("ays, unic, interval", (10, 8, 5), ays | {"sampler": "unic"} | interval),
        ("karras, unic", (25, 10), {"schedule": "karras", "sampler": "unic"}),
        ("karras, dpmpp-2m", (25, 15), {"schedule": "karras", "sampler": "dpmpp-2m"}),
    ]
    if shallow:
        series += [
            ("karras, euler, every 3rd deep", (25,), {"schedule": "karras", "sampler": "euler", "deep_every": 3}),
            ("ays, unic, interval, every 2nd deep", (10, 8), ays | {"sampler": "unic", "deep_every": 2} | interval),
            ("ays, unic, narrow interval", (8,), narrow),
            ("ays, unic, narrow interval, every 2nd deep", (10, 8), narrow | {"deep_every": 2}),
        ]
    return [
        Variant(name, _label(chosen), chosen)
        for name, counts, arguments in series
        for chosen in ({"num_inference_steps": steps, **arguments} for steps in counts)
    ]


def _label(arguments: Mapping[str, Any]) -> str:
    """The steps, and the preset that sets the same arguments, if there is one."""
    steps = str(arguments["num_inference_steps"])
    names = [name for name, preset in QUALITIES.items() if dict(preset) == dict(arguments)]
    return " ".join([steps, *names])


def measure_quality(
    pipe: VideoPipeline,
    clips: Sequence[Clip],
    variants: Sequence[Variant],
    *,
    reference: Mapping[str, Any],
    sizes: Mapping[str, int],
    seed: int,
    command: str,
    keep: Callable[[QualityResult], object],
    progress: Progress,
) -> QualityResult:
    """Make the reference's videos of every clip, then those of every variant.

    Args:
        pipe: makes them.
        clips: one video of each.
        variants: in the order in which they are measured.
        reference: arguments of the videos that others are compared with.
        sizes: ``num_frames``, ``height`` and ``width``, as far as they are not the bundle's.
        seed: of the first clip; the next clip has the next one.
        command: for the record.
        keep: called with what is known after each variant.
        progress: called with the name of each variant, the videos that are done, and their number.
    """
    total = len(clips) * (1 + len(variants))
    done = 0

    def make(name: str, arguments: Mapping[str, Any]) -> list[_Made]:
        nonlocal done
        found = []
        for index, clip in enumerate(clips):
            progress(name, done, total)
            found.append(_make(pipe, clip, {**sizes, **arguments, "seed": seed + index}))
            done += 1
        progress(name, done, total)
        return found

    expected = make("reference", reference)
    settings = expected[0].settings
    truths = [made.frames if clip.truth is None else clip.truth for made, clip in zip(expected, clips, strict=True)]
    for truth, made in zip(truths, expected, strict=True):
        if truth.shape != made.frames.shape:
            raise ArgumentError(
                f"a true clip has the shape {list(truth.shape)} and the videos {list(made.frames.shape)}; "
                "give clips of this size, or a bundle for theirs"
            )
    manifest = pipe.bundle.manifest
    result = QualityResult(
        date=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        command=command,
        machine=describe_machine(),
        backend=pipe.device.name,
        model=manifest.source.model,
        precision=manifest.precision,
        frames=settings.num_frames,
        height=settings.height,
        width=settings.width,
        pictures=len(clips),
        seed=seed,
        truth=any(clip.truth is not None for clip in clips),
        reference=dict(reference),
        reference_error=_error(expected, truths),
        points=[],
    )
    for variant in variants:
        name = variant.name
        try:
            videos = make(name, variant.arguments)
            points = [*result.points, _point(variant, videos, expected, truths, shallow_share(manifest))]
            result = msgspec.structs.replace(result, points=with_frontier(points))
        except ArgumentError as error:
            done += len(clips) - done % len(clips) if done % len(clips) else len(clips)
            result = msgspec.structs.replace(result, notes=[*result.notes, f"{name}: {error}"])
        keep(result)
    return result


def evaluations_of(settings: Settings, shallow: float = 1.0) -> float:
    """Evaluations of the denoiser over one branch for one video of ``settings``.

    ``shallow`` is the part of an evaluation that the shallow denoiser costs.
    """
    guided = guided_steps_of(settings, settings.sigmas)
    deep = deep_steps(settings.deep_every, guided)
    return sum((1 + branches) * (1 if whole else shallow) for branches, whole in zip(guided, deep, strict=True))


def shallow_share(manifest: Manifest) -> float:
    """The arithmetic of the shallow denoiser, as a part of that of the denoiser; 1 if there is none."""
    shallow = manifest.networks.get(SHALLOW)
    return 1.0 if shallow is None else shallow.flops / manifest.networks["denoiser"].flops


def with_frontier(points: Sequence[Point]) -> list[Point]:
    """``points`` with those marked that no other beats in error for as few evaluations."""

    def beaten(point: Point) -> bool:
        return any(
            (other.evaluations, other.error) != (point.evaluations, point.error)
            and other.evaluations <= point.evaluations
            and other.error <= point.error
            for other in points
        )

    return [msgspec.structs.replace(point, frontier=not beaten(point)) for point in points]


def read_clips(path: Path, count: int) -> list[Clip]:
    """The first ``count`` clips of a file of numpy: ``frames`` ``[N, F, H, W, 3]``, uint8, and arguments ``[N]``.

    Raises:
        ImageError: the file cannot be read, or is something else.
        ArgumentError: it has fewer clips.
    """
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        frames = arrays.pop("frames")
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ImageError(f"{path} is no file of clips: it is a .npz with frames [N, F, H, W, 3] ({error})") from error
    if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
        raise ImageError(f"{path} has frames of {frames.dtype} {list(frames.shape)}, and not uint8 [N, F, H, W, 3]")
    if any(values.shape != frames.shape[:1] for values in arrays.values()):
        raise ImageError(f"{path} has arguments that are not one number for each of its {len(frames)} clips")
    if len(frames) < count:
        raise ArgumentError(f"{path} has {len(frames)} clips; measure at most as many --pictures, not {count}")
    return [
        Clip(frames[i][0], {name: values[i].item() for name, values in arrays.items()}, frames[i]) for i in range(count)
    ]


def is_quality(path: Path) -> bool:
    """True if ``path`` is a result of ``svd-trt bench quality`` and not of another benchmark."""
    try:
        raw = msgspec.json.decode(path.read_bytes())
    except (OSError, *NOT_JSON):
        return False
    return isinstance(raw, dict) and raw.get("benchmark") == "quality"


def read_quality(path: Path) -> QualityResult:
    """Read a result of ``svd-trt bench quality``.

    Raises:
        ResultError: the file is missing, damaged, something else, or of another version.
    """
    try:
        result = msgspec.json.decode(path.read_bytes(), type=QualityResult)
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror}") from error
    except NOT_JSON as error:
        raise ResultError(f"{path} is not a result of `svd-trt bench quality`, or damaged: {error}") from error
    if result.schema != SCHEMA:
        raise ResultError(f"{path} has schema {result.schema}, and this svd-trt reads {SCHEMA}; measure again")
    return result


class _Made(msgspec.Struct, frozen=True):
    frames: Frames
    settings: Settings
    seconds: float
    denoise_seconds: float


def _make(pipe: VideoPipeline, clip: Clip, arguments: Mapping[str, Any]) -> _Made:
    started = time.perf_counter()
    video = pipe(clip.picture, output_type="np", **{**clip.arguments, **arguments})
    seconds = time.perf_counter() - started - video.timings.get("load", 0.0)
    return _Made(video.frames[0], video.parameters, seconds, video.timings["denoise"])


def _point(
    variant: Variant, made: Sequence[_Made], expected: Sequence[_Made], truths: Sequence[Frames], shallow: float
) -> Point:
    levels = [psnr(one.frames, other.frames) for one, other in zip(made, expected, strict=True)]
    return Point(
        series=variant.series,
        label=variant.label,
        arguments=variant.arguments,
        evaluations=evaluations_of(made[0].settings, shallow),
        seconds=statistics.median(one.seconds for one in made),
        denoise_seconds=statistics.median(one.denoise_seconds for one in made),
        error=_error(made, truths),
        psnr_db=statistics.fmean(levels),
        least_psnr_db=min(levels),
    )


def _error(made: Sequence[_Made], truths: Sequence[Frames]) -> float:
    return statistics.fmean(_difference(one.frames, truth) for one, truth in zip(made, truths, strict=True))


def _difference(frames: Frames, truth: Frames) -> float:
    return math.sqrt(float(np.mean((frames.astype(np.float64) - truth) ** 2))) / 255
