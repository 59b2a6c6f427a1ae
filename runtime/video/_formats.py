"""The format that a path names, and whether a video can be written there."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path, PurePath
from typing import BinaryIO, NamedTuple

from svd_trt.engine.temporary_files import hidden_sibling
from svd_trt.errors import ArgumentError, OutputError
from svd_trt.runtime.video._gif import GifWriter
from svd_trt.runtime.video._libav import (
    ApngWriter,
    MkvStreamWriter,
    MkvWriter,
    MovWriter,
    Mp4StreamWriter,
    Mp4Writer,
    WebmWriter,
)
from svd_trt.runtime.video._metadata import encode
from svd_trt.runtime.video._png import PngFolderWriter, check_only_frames
from svd_trt.runtime.video._raw import NpyWriter, StdoutWriter, Y4m420Writer, Y4mWriter, binary_stdout
from svd_trt.runtime.video._timing import exact_rate
from svd_trt.runtime.video._webp import WebpWriter
from svd_trt.runtime.video._writer import STDOUT, VideoSpec, VideoWriter, explain, resolved

FOLDER = "/"


class Format(NamedTuple):
    """A way to write a video: its writer, and a line for ``--help``."""

    writer: type[VideoWriter]
    description: str


FORMATS: Mapping[str, Format] = {
    ".mp4": Format(Mp4Writer, "H.264 in MP4, plays everywhere"),
    ".mov": Format(MovWriter, "H.264 in QuickTime's container"),
    ".webm": Format(WebmWriter, "VP9 in WebM, for the web"),
    ".mkv": Format(MkvWriter, "FFV1 in Matroska, lossless"),
    ".gif": Format(GifWriter, "animated GIF, 256 colours a frame"),
    ".webp": Format(WebpWriter, "animated WebP, smaller and more accurate than GIF"),
    ".apng": Format(ApngWriter, "animated PNG, lossless"),
    ".npy": Format(NpyWriter, "NumPy array, uint8 [frames, height, width, 3]"),
    FOLDER: Format(PngFolderWriter, "folder of PNGs: no suffix, or a slash at the end"),
    STDOUT: Format(StdoutWriter, "standard output, in the format of --format"),
}

STREAMS: Mapping[str, Format] = {
    "raw": Format(StdoutWriter, "rgb24 frames, nothing else"),
    "y4m": Format(Y4mWriter, "YUV4MPEG2 4:4:4, which ffmpeg and GStreamer read without options"),
    "y4m420": Format(Y4m420Writer, "YUV4MPEG2 4:2:0, for readers that take no other"),
    "mkv": Format(MkvStreamWriter, "FFV1 in Matroska, lossless"),
    "mp4": Format(Mp4StreamWriter, "H.264 in fragmented MP4"),
}
"""Formats of standard output by the name that ``--format`` takes."""


def check_output(path: str | os.PathLike[str], stream: str = "raw") -> None:
    """Check that a video can be written to ``path``, before the long work that generates it.

    ``path`` is a file with a suffix in `FORMATS`, a folder for PNGs (no suffix, or a slash at the end), or ``-``, which
    is standard output in the format ``stream``, one of `STREAMS`.

    Raises:
        OutputError: unknown suffix; folder missing or not writable; a folder instead of a file, or the reverse;
            a folder that holds anything but frames written earlier; a terminal.
    """
    text = os.fspath(path)
    kind = _kind(text)
    reason = _writer(kind, stream).unavailable()
    if reason:
        raise OutputError(f"cannot write {text}: {reason}")
    if kind == STDOUT:
        binary_stdout()
        return
    try:
        target = resolved(text)
        _check_parent(text, target.parent)
        if kind == FOLDER:
            _check_folder(text, target)
        else:
            _check_file(text, target)
        _try_writing(target)
    except OSError as error:
        raise OutputError(explain(text, error)) from error


def numbered(path: str | os.PathLike[str], index: int, count: int) -> str:
    """The path of video ``index`` of ``count``: ``out.mp4`` becomes ``out-0.mp4``, a folder ``out`` becomes ``out-0``.

    Padded with zeros to equal width, so that names sort. A single video, and standard output, keep their path.

    Raises:
        ArgumentError: ``index`` is not from 0 to ``count - 1``.
    """
    if not 0 <= index < count:
        raise ArgumentError(f"index must be from 0 to {count - 1}, got {index}")
    text = os.fspath(path)
    kind = _kind(text)
    if count == 1 or kind == STDOUT:
        return text
    number = f"-{index:0{len(str(count - 1))}d}"
    if kind == FOLDER:
        # A slash at the end stays, because it may be the only sign that the path is a folder.
        name = text.rstrip(_SLASHES)
        return name + number + text[len(name) :]
    split = len(text) - len(kind)
    return text[:split] + number + text[split:]


def open_writer(
    path: str | os.PathLike[str],
    *,
    height: int,
    width: int,
    fps: float | Fraction,
    metadata: Mapping[str, object],
    stream: str = "raw",
) -> VideoWriter:
    """A writer for frames of ``height`` x ``width`` pixels at ``fps`` frames a second; use it in a ``with``.

    ``metadata`` (strings, numbers, booleans, None, and lists or dicts of them) is stored in the file as JSON if
    the format has a place for it. ``stream`` is the format of standard output. Nothing is created before the ``with``.

    Raises:
        ArgumentError: a size or rate that the format cannot have, or metadata that is not JSON.
        OutputError: as for `check_output`, which is called first.
    """
    if height < 1 or width < 1:
        raise ArgumentError(f"height and width must be at least 1, got {height}x{width}")
    spec = VideoSpec(height, width, exact_rate(fps), encode(metadata))
    check_output(path, stream)
    text = os.fspath(path)
    return _writer(_kind(text), stream)(text, spec)


def open_stream(
    sink: BinaryIO,
    stream: str,
    *,
    height: int,
    width: int,
    fps: float | Fraction,
    metadata: Mapping[str, object],
) -> VideoWriter:
    """A writer as `open_writer`'s of standard output that writes to ``sink``; ``stream`` is one of `STREAMS`.

    Raises:
        ArgumentError: a size or rate that the format cannot have, or metadata that is not JSON.
    """
    writer = _writer(STDOUT, stream)(STDOUT, VideoSpec(height, width, exact_rate(fps), encode(metadata)))
    assert isinstance(writer, StdoutWriter)
    writer.sink = sink
    return writer


_SLASHES = "".join({"/", os.sep})


def _writer(kind: str, stream: str) -> type[VideoWriter]:
    if stream not in STREAMS:
        raise ArgumentError(f"{stream} is not a format of standard output; choose one of {', '.join(STREAMS)}")
    return (STREAMS[stream] if kind == STDOUT else FORMATS[kind]).writer


def _kind(path: str) -> str:
    """The key into `FORMATS`."""
    if path == STDOUT:
        return STDOUT
    if PurePath(path).name in ("", ".."):
        raise OutputError(f"{path or 'an empty path'} cannot be written; name a file or a new folder")
    if path.endswith(tuple(_SLASHES)):
        return FOLDER
    suffix = PurePath(path).suffix.lower()
    if not suffix:
        return FOLDER
    if suffix not in FORMATS:
        known = ", ".join(key for key in FORMATS if key.startswith("."))
        raise OutputError(f"{path}: {suffix} is not known; use {known}, or {path}{FOLDER} for a folder of PNGs")
    return suffix


def _check_parent(path: str, parent: Path) -> None:
    if parent.exists() and not parent.is_dir():
        raise OutputError(f"cannot write {path}: {parent} is not a folder")
    if not parent.is_dir():
        raise OutputError(f"cannot write {path}: the folder {parent} does not exist; create it first")


def _check_file(path: str, target: Path) -> None:
    if target.is_dir():
        raise OutputError(f"{path} is a folder; for PNGs write {path}{FOLDER}, for a video name a file")
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        raise OutputError(f"{path} is a device or pipe, not a file; write to {STDOUT} and redirect that")


def _check_folder(path: str, target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{path} is a file, not a folder; for a video add a suffix, for PNGs name a new folder")
    if target.is_mount():
        raise OutputError(f"{path} is a mount point and cannot be replaced; name a folder inside it")
    check_only_frames(target)


def _try_writing(target: Path) -> None:
    """Create and remove a file beside ``target``: permission bits do not show read-only or full file systems."""
    probe = hidden_sibling(target, ".probe")
    try:
        probe.touch(exist_ok=False)
    finally:
        probe.unlink(missing_ok=True)
