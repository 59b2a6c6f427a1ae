"""The files of a finished video: what is kept, and what is made from that when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from svd_trt.runtime.video import BackgroundWriter, open_writer

__all__ = ["CONTENT_TYPES", "KEPT", "VideoFiles", "converted", "preferred"]

CONTENT_TYPES: Mapping[str, str] = {
    "mp4": "video/mp4",
    "webm": "video/webm",
    "webp": "image/webp",
    "mkv": "video/x-matroska",
}
"""Formats of ``GET /v1/videos/{id}/content``, the default first, and their types."""

KEPT = ("mkv", "mp4")
"""What a video is written as while it is made: without loss, and as most clients ask for it."""


class VideoFiles:
    """Writers of one video in every format of `KEPT`; all are in place when the ``with`` ends without an exception."""

    def __init__(self, path: Path, *, height: int, width: int, fps: int, metadata: Mapping[str, Any]) -> None:
        self._open = {"height": height, "width": width, "fps": fps, "metadata": metadata}
        self._path = path
        self._stack = ExitStack()

    def __enter__(self) -> VideoFiles:
        with self._stack as stack:
            self._writers = [
                stack.enter_context(BackgroundWriter(open_writer(self._path.with_suffix(f".{kind}"), **self._open)))  # type: ignore[arg-type]
                for kind in KEPT
            ]
            self._stack = stack.pop_all()
        return self

    def write(self, frame: npt.NDArray[np.uint8]) -> None:
        """Append one frame, uint8 ``[H, W, 3]``."""
        for writer in self._writers:
            writer.write(frame[None])

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)


def converted(kept: Path, kind: str, fps: int, metadata: Mapping[str, Any]) -> Path:
    """The video ``kept``, a lossless one, in the format ``kind``; it is made the first time and then kept too.

    One call at a time.

    Raises:
        FileNotFoundError: the video was removed meanwhile.
        OutputError: it cannot be written.
    """
    target = kept.with_suffix(f".{kind}")
    if target.exists():
        return target
    frames = _frames(kept)
    first = next(frames)
    height, width, _ = first.shape
    with open_writer(target, height=height, width=width, fps=fps, metadata=metadata) as writer:
        writer.write(first[None])
        for frame in frames:
            writer.write(frame[None])
    if not kept.exists():  # it was removed while this ran
        target.unlink(missing_ok=True)
        raise FileNotFoundError(kept)
    return target


def preferred(accept: str) -> str:
    """The format that a header ``Accept`` asks for; mp4 if it asks for none of them."""
    wanted: list[tuple[float, str]] = []
    for part in accept.split(","):
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
        found = next((name for name, content in CONTENT_TYPES.items() if content == kind), None)
        if found and quality.replace(".", "", 1).isdigit():
            wanted.append((float(quality), found))
    best = max((quality for quality, _ in wanted), default=0.0)
    return next((name for quality, name in wanted if quality == best > 0), "mp4")


def _frames(path: Path) -> Iterator[npt.NDArray[np.uint8]]:
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
