"""What to build: the options, their limits, and the ranges and graphs that follow from them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeAlias, get_args

import msgspec

from svd_trt.engine.decode_chunks import MOST_ELEMENTS, chunk_choices, largest_chunk
from svd_trt.engine.host import size_multiple
from svd_trt.engine.manifest import GraphEntry, Operators, Precision
from svd_trt.engine.spec import LARGEST_COUNT, LARGEST_SIDE, SYMBOLS, ModelInfo, Range, Ranges
from svd_trt.engine.tensorrt_import import BuildBackend
from svd_trt.errors import ArgumentError

__all__ = [
    "DEFAULT_FF_CHUNKS",
    "MOST_FF_CHUNKS",
    "ONNXRUNTIME_FF_CHUNKS",
    "BuildOptions",
    "RangeLike",
    "exact_points",
    "graph_of",
    "ranges_of",
]

_log = logging.getLogger("svd_trt")

DEFAULT_FF_CHUNKS = 1
ONNXRUNTIME_FF_CHUNKS = 8
MOST_FF_CHUNKS = 16
# The smallest picture that a range may hold has 2x2 pixels at the deepest level, and a part must have one.
_MOST_DYNAMIC_FF_CHUNKS = 4


RangeLike: TypeAlias = Range | str | int
"""A `Range`, or what the command line takes for one: ``"2:14:25"``, ``"14"`` or ``14``."""


@dataclass(frozen=True)
class BuildOptions:
    """What to build; every default is the checkpoint's own or diffusers'.

    Raises:
        ArgumentError: a text is not a range, or not a list of frame counts or sizes.

    Attributes:
        height, width: frame size in pixels, multiples of 8; a fixed one makes a smaller, faster network.
        frames: frames of one video, from 2 up; None is 2 up to what the checkpoint was trained for.
        decode_chunk: frames decoded together, from 1 up; None is 1 up to the most frames, as far as no tensor has more
            than 2^31 elements: 14 at 576x1024.
        batch: videos denoised together.
        exact: compile the engines also for the optimum of every range alone, which is faster at that size.
        exact_frames: more frame counts to compile for, such as ``"14,25"``; with every exact size.
        exact_sizes: more sizes to compile for, height first, such as ``"576x1024,1024x576"``; with every exact count.
        precision: of all networks but the VAE encoder, which stays in fp32 as the checkpoints ask.
        rewrites: apply the exact rewrites of `svd_trt.export.rewrites`; without them the networks compute what
            diffusers computes, for comparison.
        ff_chunks: parts into which the widest feed-forwards of the denoiser are cut; more take less memory. Needs
            rewrites.
        operators: ``onnx`` keeps to the standard's operators; ``onnxruntime`` uses ONNX Runtime's own, whose attention
            never stores the scores; ``auto`` uses these if nothing else will run the networks, on a processor: no
            engines, fp32 and rewrites. In half precision they are for its CUDA provider.
        split_guidance: build the denoiser for one guidance branch at a time: half the memory, two passes a step.
        branches: 2 builds the denoiser for guided videos alone; 1 is the same as ``split_guidance``, and is the fastest
            for videos without guidance. None is both in one.
        shallow_steps: add a denoiser without the deep levels of the UNet, which takes what an earlier step left of
            them, for videos with ``deep_every``. Height and width are multiples of 16 then.
        weight_streaming: build the denoiser's engine so that its weights may stay in host memory and be copied in as
            they are used; slower. How many of them stay there is decided when it is loaded. Needs engines.
        golden_frames: make the frames of a short video on the CPU, with which hosts check themselves; None makes them
            if that takes seconds.
        skip_checks: start even if disk or memory seem too small.
        backend: which engines to build beside the ONNX networks, which every bundle has.
        device: the GPU that TensorRT builds on and for, ``cuda:1`` for the second; None is the first.
        targets: GPUs that TensorRT for RTX builds for, such as ``"sm89,sm120"``, all in one engine; by default those
            from Ampere (sm80) on that it serves. Turing, sm75, is only served if it is named here.
        optimization_level: 0 to 5; a higher one lets the builder look longer for fast kernels. None is its default, 3.
        timing_cache: a file in which TensorRT keeps the times of the kernels that it tried, so that later builds need
            not try them again; by default it is in the cache, if there is one.
        cache: a folder of finished networks and engines to reuse, and to add new ones to; by default the environment
            variable SVD_TRT_CACHE names it, and without that there is none. It only grows; remove it with ``rm -r``.
        unet: another UNet of the same architecture for the checkpoint, such as a few-step model or a fine-tune: a
            safetensors file, a folder or a hub id; see `svd_trt.export.other_unet.find_unet`.
        loras: merged into the UNet in fp32; a file each, or ``FILE:SCALE``.
        revision, variant, local_files_only: as in diffusers' ``from_pretrained``.
        config: for a single file, ``svd`` or ``svd-xt``, the published architectures, or a folder in diffusers format
            with its configurations; by default words of its name tell, or its metadata.
    """

    height: RangeLike = Range(576, 576, 576)
    width: RangeLike = Range(1024, 1024, 1024)
    frames: RangeLike | None = None
    decode_chunk: RangeLike | None = None
    batch: RangeLike = Range(1, 1, 1)
    exact: bool = True
    exact_frames: str | Iterable[int] = ()
    exact_sizes: str | Iterable[tuple[int, int]] = ()
    precision: Precision = "fp16"
    rewrites: bool = True
    ff_chunks: int | None = None
    operators: Literal["auto", "onnx", "onnxruntime"] = "auto"
    split_guidance: bool = False
    branches: Literal[1, 2] | None = None
    shallow_steps: bool = False
    weight_streaming: bool = False
    golden_frames: bool | None = None
    skip_checks: bool = False
    backend: BuildBackend = "auto"
    device: str | None = None
    targets: str | Iterable[str] = ()
    optimization_level: int | None = None
    timing_cache: str | os.PathLike[str] | None = None
    unet: str | os.PathLike[str] | None = None
    loras: Iterable[str | os.PathLike[str]] = ()
    revision: str | None = None
    variant: str | None = None
    local_files_only: bool = False
    config: str | None = None
    cache: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames", "decode_chunk", "batch"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, _range(value))
        object.__setattr__(self, "exact_frames", _counts(self.exact_frames))
        object.__setattr__(self, "exact_sizes", _sizes(self.exact_sizes))
        targets = self.targets.split(",") if isinstance(self.targets, str) else self.targets
        loras = [self.loras] if isinstance(self.loras, str | os.PathLike) else self.loras
        object.__setattr__(self, "loras", tuple(os.fspath(lora) for lora in loras))
        object.__setattr__(self, "targets", tuple(dict.fromkeys(t.strip().lower() for t in targets if t.strip())))
        if self.branches not in (None, 1, 2):
            raise ArgumentError(f"branches must be 1 or 2, not {self.branches!r}")
        if self.split_guidance and self.branches == 2:
            raise ArgumentError("--split-guidance runs one branch at a time, and --branches 2 both; choose one")
        if self.optimization_level not in (None, *range(6)):
            raise ArgumentError(f"optimization_level must be 0 to 5, not {self.optimization_level!r}")
        choices: dict[str, tuple[str, ...]] = {
            "precision": get_args(Precision),
            "backend": get_args(BuildBackend),
            "operators": ("auto", "onnx", "onnxruntime"),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise ArgumentError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")

    @property
    def graph(self) -> GraphEntry:
        """How the networks are written.

        Raises:
            ArgumentError: the options contradict each other.
        """
        on_cpu = self.backend == "onnxruntime" and self.precision == "fp32" and self.rewrites
        own = self.operators == "onnxruntime" or (self.operators == "auto" and on_cpu)
        if own and not self.rewrites:
            raise ArgumentError("--operators onnxruntime is one of the rewrites; leave out --no-rewrites")
        if own and self.backend != "onnxruntime":
            raise ArgumentError("only ONNX Runtime knows --operators onnxruntime; add --backend onnxruntime")
        operators: Operators = "onnxruntime" if own else "onnx"
        default = ONNXRUNTIME_FF_CHUNKS if own and on_cpu else DEFAULT_FF_CHUNKS
        chunks = default if self.ff_chunks is None else self.ff_chunks
        if not 1 <= chunks <= MOST_FF_CHUNKS:
            raise ArgumentError(f"--ff-chunks {chunks}: 1 to {MOST_FF_CHUNKS} are supported")
        if (
            chunks > _MOST_DYNAMIC_FF_CHUNKS
            and not own
            and not (_range(self.height).fixed and _range(self.width).fixed)
        ):
            raise ArgumentError(
                f"--ff-chunks {chunks}: up to {_MOST_DYNAMIC_FF_CHUNKS} are supported if height or width has a range"
            )
        if chunks > 1 and not self.rewrites:
            raise ArgumentError("--ff-chunks is one of the rewrites; leave out --no-rewrites")
        return GraphEntry(rewrites=self.rewrites, ff_chunks=chunks, operators=operators)


def graph_of(options: BuildOptions, deep_channels: int | None) -> GraphEntry:
    """How the networks of a checkpoint are written, whose UNet has ``deep_channels`` in its second level.

    Raises:
        ArgumentError: the options contradict each other, or the UNet has one level alone.
    """
    if not options.shallow_steps:
        return options.graph
    if deep_channels is None:
        raise ArgumentError("--shallow-steps leaves out deep levels, and this checkpoint's UNet has one; leave it out")
    return msgspec.structs.replace(options.graph, deep_channels=deep_channels)


def ranges_of(options: BuildOptions, model: ModelInfo) -> Ranges:
    """The ranges of the bundle: those of the options, with the checkpoint's defaults.

    Raises:
        ArgumentError: a range that no SVD can serve.
    """
    height, width, batch = _range(options.height), _range(options.width), _range(options.batch)
    most = model.num_frames
    frames = Range(min(2, most), most, most) if options.frames is None else _range(options.frames)
    safe = largest_chunk(model, height.max, width.max)
    if options.decode_chunk is None:
        largest = min(frames.max, safe)
        chunk = Range(1, chunk_choices(frames.opt, 1, Range(1, 1, largest), largest)[0], largest)
    else:
        chunk = _range(options.decode_chunk)
    for what, size in (("height", height), ("width", width)):
        for value in (size.min, size.opt, size.max):
            _require_multiple(value, model, f"--{what} {size}", shallow=options.shallow_steps)
        if size.max > LARGEST_SIDE:
            raise ArgumentError(f"--{what} {size}: sizes up to {LARGEST_SIDE} are supported")
    if frames.min < 2:
        raise ArgumentError(f"--frames {frames}: a video has at least 2 frames")
    for what, count in (("frames", frames), ("decode-chunk", chunk), ("batch", batch)):
        if count.max > LARGEST_COUNT:
            raise ArgumentError(f"--{what} {count}: counts up to {LARGEST_COUNT} are supported")
    if model.decoder_channels * height.max * width.max * chunk.max > MOST_ELEMENTS:
        _log.warning(
            "decode chunks of %d frames of %dx%d have tensors of over 2^31 elements, for which TensorRT "
            "documents limits: compare their frames with those of smaller chunks",
            chunk.max,
            width.max,
            height.max,
        )
    return Ranges(
        batch=batch,
        pictures=Range(1, 1, batch.max),
        branches=_branches(options),
        frames=frames,
        chunk=chunk,
        height=height,
        width=width,
    )


def _branches(options: BuildOptions) -> Range:
    if options.split_guidance or options.branches == 1:
        return Range(1, 1, 1)
    return Range(2, 2, 2) if options.branches == 2 else Range(1, 2, 2)


def exact_points(options: BuildOptions, ranges: Ranges, model: ModelInfo) -> list[dict[str, int]]:
    """The sizes that engines are compiled for besides the whole ranges, as values of all symbols; the optimum first.

    Raises:
        ArgumentError: one of them is outside ``ranges``.
    """
    counts, sizes = _counts(options.exact_frames), _sizes(options.exact_sizes)
    if not options.exact:
        if counts or sizes:
            raise ArgumentError("--no-exact leaves out what --exact-frames and --exact-sizes add; choose one")
        return []
    for frames in counts:
        _require(frames, ranges.frames, "--exact-frames", "--frames")
    for height, width in sizes:
        _require(height, ranges.height, "--exact-sizes: height", "--height")
        _require(width, ranges.width, "--exact-sizes: width", "--width")
        for value in (height, width):
            _require_multiple(value, model, f"--exact-sizes {height}x{width}", shallow=options.shallow_steps)
    best = {symbol: ranges.of(symbol).opt for symbol in SYMBOLS}
    points = [best]
    for (height, width), frames in product(((best["height"], best["width"]), *sizes), (best["frames"], *counts)):
        chunks = chunk_choices(frames, 1, ranges.chunk, largest_chunk(model, height, width))
        chunk = chunks[0] if chunks else best["chunk"]
        points.append(best | {"frames": frames, "height": height, "width": width, "chunk": chunk})
    return points


def _require(value: int, span: Range, what: str, option: str) -> None:
    if value not in span:
        raise ArgumentError(f"{what} {value} is outside {option} {span}; widen the range, or leave the value out")


def _require_multiple(value: int, model: ModelInfo, what: str, *, shallow: bool) -> None:
    multiple = size_multiple(model, shallow=shallow)
    if value % multiple:
        with_option = "with --shallow-steps, " if shallow else ""
        raise ArgumentError(f"{what}: {with_option}sizes are multiples of {multiple}")


def _counts(value: str | Iterable[int]) -> tuple[int, ...]:
    parts = [part for part in value.split(",") if part] if isinstance(value, str) else value
    try:
        return tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        raise ArgumentError(f"{value!r} is not a list of frame counts; write one like 14,25") from None


def _sizes(value: str | Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    pairs = [part.split("x") for part in value.split(",") if part] if isinstance(value, str) else value
    try:
        return tuple((int(height), int(width)) for height, width in pairs)
    except (TypeError, ValueError):
        raise ArgumentError(
            f"{value!r} is not a list of sizes; write height, x and width, like 576x1024,1024x576"
        ) from None


def _range(value: RangeLike) -> Range:
    return value if isinstance(value, Range) else Range.parse(str(value))
