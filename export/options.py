"""What to build: the options, their limits, and the ranges and graphs that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from svd_trt.engine.manifest import GraphEntry, Operators, Precision
from svd_trt.engine.spec import LARGEST_COUNT, LARGEST_SIDE, ModelInfo, Range, Ranges
from svd_trt.engine.tensorrt_import import BuildBackend
from svd_trt.errors import ArgumentError

__all__ = ["DEFAULT_FF_CHUNKS", "MOST_FF_CHUNKS", "ONNXRUNTIME_FF_CHUNKS", "BuildOptions", "ranges_of"]

DEFAULT_FF_CHUNKS = 2
ONNXRUNTIME_FF_CHUNKS = 8
MOST_FF_CHUNKS = 16
# The smallest picture that a range may hold has 2x2 pixels at the deepest level, and a part must have one.
_MOST_DYNAMIC_FF_CHUNKS = 4


@dataclass(frozen=True)
class BuildOptions:
    """What to build; every default is the checkpoint's own or diffusers'.

    Attributes:
        height, width: frame size in pixels, multiples of 8; a fixed one makes a smaller, faster network.
        frames: frames of one video, from 2 up; None is 2 up to what the checkpoint was trained for.
        decode_chunk: frames decoded together, from 1 up; None is 1 up to the most frames.
        batch: videos denoised together.
        precision: of all networks but the VAE encoder, which stays in fp32 as the checkpoints ask.
        rewrites: apply the exact rewrites of `svd_trt.export.rewrites`; without them the networks compute what
            diffusers computes, for comparison.
        ff_chunks: parts into which the widest feed-forwards of the denoiser are cut; more take less memory. Needs
            rewrites.
        operators: ``onnx`` keeps to the standard's operators; ``auto`` uses ONNX Runtime's own, which are faster on a
            processor, where nothing else will run the networks: no engines, fp32 and rewrites.
        split_guidance: build the denoiser for one guidance branch at a time: half the memory, two passes a step.
        weight_streaming: build the denoiser's engine so that its weights may stay in host memory and be copied in as
            they are used; slower. How much of them does is decided where it runs. Needs engines.
        skip_checks: start even if disk or memory look too small.
        backend: which engines to build beside the ONNX networks, which every bundle holds.
        revision, variant, local_files_only: as in diffusers' ``from_pretrained``.
        config: for a single file, a folder in diffusers format with its configurations.
    """

    height: Range = Range(576, 576, 576)
    width: Range = Range(1024, 1024, 1024)
    frames: Range | None = None
    decode_chunk: Range | None = None
    batch: Range = Range(1, 1, 1)
    precision: Precision = "fp16"
    rewrites: bool = True
    ff_chunks: int | None = None
    operators: Literal["auto", "onnx"] = "auto"
    split_guidance: bool = False
    weight_streaming: bool = False
    skip_checks: bool = False
    backend: BuildBackend = "auto"
    revision: str | None = None
    variant: str | None = None
    local_files_only: bool = False
    config: str | None = None

    @property
    def graph(self) -> GraphEntry:
        """How the networks are to be written.

        Raises:
            ArgumentError: the options contradict each other.
        """
        own = self.backend == "onnxruntime" and self.precision == "fp32" and self.rewrites and self.operators == "auto"
        operators: Operators = "onnxruntime" if own else "onnx"
        default = (ONNXRUNTIME_FF_CHUNKS if own else DEFAULT_FF_CHUNKS) if self.rewrites else 1
        chunks = default if self.ff_chunks is None else self.ff_chunks
        if not 1 <= chunks <= MOST_FF_CHUNKS:
            raise ArgumentError(f"--ff-chunks {chunks}: 1 to {MOST_FF_CHUNKS} are supported")
        if chunks > _MOST_DYNAMIC_FF_CHUNKS and not own and not (self.height.fixed and self.width.fixed):
            raise ArgumentError(
                f"--ff-chunks {chunks}: up to {_MOST_DYNAMIC_FF_CHUNKS} are supported where height or width has a range"
            )
        if chunks > 1 and not self.rewrites:
            raise ArgumentError("--ff-chunks is one of the rewrites; leave out --no-rewrites")
        return GraphEntry(rewrites=self.rewrites, ff_chunks=chunks, operators=operators)


def ranges_of(options: BuildOptions, model: ModelInfo) -> Ranges:
    """The ranges of the bundle: what was asked, with the checkpoint's defaults.

    Raises:
        ArgumentError: a range that no SVD can serve.
    """
    most = model.num_frames
    frames = options.frames or Range(min(2, most), most, most)
    largest = frames.max
    chunk = options.decode_chunk or Range(1, min(8, largest), largest)
    factor = model.vae_scale_factor
    for what, size in (("height", options.height), ("width", options.width)):
        if any(value % 8 or value % factor for value in (size.min, size.opt, size.max)):
            raise ArgumentError(f"--{what} {size}: sizes are multiples of {max(8, factor)}")
        if size.max > LARGEST_SIDE:
            raise ArgumentError(f"--{what} {size}: sizes up to {LARGEST_SIDE} are supported")
    if frames.min < 2:
        raise ArgumentError(f"--frames {frames}: a video has at least 2 frames")
    for what, count in (("frames", frames), ("decode-chunk", chunk), ("batch", options.batch)):
        if count.max > LARGEST_COUNT:
            raise ArgumentError(f"--{what} {count}: counts up to {LARGEST_COUNT} are supported")
    return Ranges(
        batch=options.batch,
        pictures=Range(1, 1, options.batch.max),
        branches=Range(1, 1, 1) if options.split_guidance else Range(1, 2, 2),
        frames=frames,
        chunk=chunk,
        height=options.height,
        width=options.width,
    )
