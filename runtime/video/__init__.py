"""Frames to files: one writer per format, and only complete files at the path.

::

    check_output("out.mp4")                       # before the long work: can a video be written there?
    with open_writer("out.mp4", height=576, width=1024, fps=7, metadata={"seed": 42}) as writer:
        for chunk in decoded:                     # uint8 [N, H, W, 3], N may differ from chunk to chunk
            writer.write(chunk)
    read_metadata("out.mp4")                      # {"seed": 42}

A video is written to a hidden file beside its path and moved into place when it is complete, so the path holds either
the whole new video or what it held before. Every failure that a user can correct is an `OutputError`.
`BackgroundWriter` around a writer writes in a thread.
"""

from __future__ import annotations

from svd_trt.runtime.video._background import BackgroundWriter
from svd_trt.runtime.video._formats import FORMATS, STREAMS, Format, check_output, numbered, open_stream, open_writer
from svd_trt.runtime.video._metadata import read_metadata
from svd_trt.runtime.video._timing import exact_rate
from svd_trt.runtime.video._writer import VideoWriter

__all__ = [
    "FORMATS",
    "STREAMS",
    "BackgroundWriter",
    "Format",
    "VideoWriter",
    "check_output",
    "exact_rate",
    "numbered",
    "open_stream",
    "open_writer",
    "read_metadata",
]
