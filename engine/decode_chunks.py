"""How many frames are decoded together.

The decoder's temporal layers see only the frames of their chunk, so the size of the chunks changes the seams between
them. diffusers decodes all frames together unless the caller says otherwise. The default here does the same as far as
no tensor gets too many elements for TensorRT to count.
"""

from __future__ import annotations

from svd_trt.engine.spec import ModelInfo, Range
from svd_trt.errors import ArgumentError

__all__ = ["MOST_ELEMENTS", "chunk_choices", "chunk_sizes", "largest_chunk"]

MOST_ELEMENTS = 2**31 - 1
"""TensorRT documents limits at 2^31 elements of one tensor (its issues 1948 and 4123); no GPU has run more here."""

# An even division into smaller chunks than this has more seams than one with a shorter last chunk.
_SMALLEST_EVEN = 4


def largest_chunk(model: ModelInfo, height: int, width: int) -> int:
    """The most frames of a chunk for which no tensor has more than `MOST_ELEMENTS`; at least 1, and 14 at 576x1024.

    The largest tensor is ``[N, decoder_channels, H, W]``.
    """
    return max(1, MOST_ELEMENTS // (model.decoder_channels * height * width))


def chunk_sizes(total: int, chunk: int, span: Range) -> list[int]:
    """Sizes of the decode chunks of ``total`` frames: equal ones, then the rest, as in diffusers.

    Raises:
        ArgumentError: one of them is outside ``span``, the range that the bundle was built for.
    """
    sizes = [min(chunk, total - start) for start in range(0, total, chunk)]
    for size in sizes:
        if size not in span:
            raise ArgumentError(
                f"decoding {total} frames by {chunk} needs a chunk of {size}, and this bundle decodes {span.words} "
                "frames at a time; choose another decode_chunk_size, or build with another --decode-chunk"
            )
    return sizes


def chunk_choices(frames: int, videos: int, span: Range, largest: int) -> list[int]:
    """Chunk sizes that split ``videos`` times ``frames`` frames into chunks within ``span``, largest first.

    The first is the default: all frames of a video if ``largest`` allows it; else the largest of 4 or more that divides
    the frames evenly, because a shorter last chunk is another shape for the decoder; else the smallest that needs no
    more chunks than ``largest`` does. Empty if there is none.
    """
    sizes = [
        size
        for size in range(min(frames, span.max, largest), span.min - 1, -1)
        if (rest := frames * videos % size) == 0 or rest in span
    ]
    if not sizes:
        return []
    fewest = -(-frames // sizes[0])
    even = [size for size in sizes if frames % size == 0 and size >= min(_SMALLEST_EVEN, frames)]
    default = even[0] if even else min(size for size in sizes if -(-frames // size) == fewest)
    return [size for size in sizes if size <= default]
