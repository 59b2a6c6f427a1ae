"""Frames to files: one writer a format, finished files only.

::

    check_output("out.mp4")                       # before the long work: can this be written at all?
    with open_writer("out.mp4", height=576, width=1024, fps=7, metadata={"seed": 42}) as writer:
        for chunk in decoded:                     # uint8 [N, H, W, 3], N may differ from chunk to chunk
            writer.write(chunk)
    read_metadata("out.mp4")                      # {"seed": 42}

A video is written to a hidden sibling and moved into place once it is complete, so a path holds either the whole
new video or what it held before. Every failure that a user can mend is an `OutputError`. `WriteBehind` around a
writer has a thread do the writing.
"""

from __future__ import annotations

from svd_trt.runtime.video._behind import WriteBehind
from svd_trt.runtime.video._formats import FORMATS, Format, check_output, numbered, open_writer
from svd_trt.runtime.video._metadata import read_metadata
from svd_trt.runtime.video._writer import VideoWriter

__all__ = [
    "FORMATS",
    "Format",
    "VideoWriter",
    "WriteBehind",
    "check_output",
    "numbered",
    "open_writer",
    "read_metadata",
]
