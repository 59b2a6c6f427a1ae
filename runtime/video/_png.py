"""A folder of PNGs: frame_0000.png, frame_0001.png and so on."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from svd_trt.engine.swap import replace_folder
from svd_trt.engine.temporary_files import create_folder, remove_leftovers
from svd_trt.errors import OutputError
from svd_trt.runtime.video._writer import VideoSpec, VideoWriter, resolved

# The keyword of the text chunk that holds the parameters; it also shows that svd-trt wrote the frame.
KEYWORD = "svd-trt"
_FRAME_NAME = re.compile(r"frame_\d{4,}\.png")


class PngFolderWriter(VideoWriter):
    """One lossless PNG per frame, each with the parameters in a text chunk; holds one frame.

    The folder appears when the video is complete. It replaces a folder with an earlier video of svd-trt, so no old
    frame remains; a folder that holds anything else is refused.
    """

    def __init__(self, path: str, spec: VideoSpec) -> None:
        super().__init__(path, spec)
        self._target = resolved(path)
        self._opened: tuple[Path, int] | None = None
        self._text = PngInfo()
        self._text.add_text(KEYWORD, spec.parameters)

    @property
    def _temporary(self) -> Path:
        assert self._opened is not None, "only used between _start and _finish"
        return self._opened[0]

    def _start(self) -> None:
        remove_leftovers(self._target.parent)
        self._opened = create_folder(self._target)

    def _append(self, frame: NDArray[np.uint8]) -> None:
        with (self._temporary / f"frame_{self._count:04d}.png").open("xb") as file:
            iio.imwrite(file, frame, extension=".png", plugin="pillow", pnginfo=self._text)
            file.flush()
            os.fsync(file.fileno())

    def _finish(self) -> None:
        if not self._target.exists():
            self._temporary.rename(self._target)
        else:
            check_only_frames(self._target)  # again: files may have been added since the first check
            replace_folder(self._temporary, self._target)
        self._discard()

    def _discard(self) -> None:
        """Remove what is under the hidden name: unfinished frames, or the video that was replaced."""
        if self._opened is None:
            return
        shutil.rmtree(self._temporary, ignore_errors=True)
        os.close(self._opened[1])
        self._opened = None


def check_only_frames(folder: Path) -> None:
    """Check that ``folder`` may be replaced: it is empty, or holds only frames that svd-trt wrote.

    Raises:
        OutputError: it holds something else, which the message names.
    """
    for entry in sorted(folder.iterdir()):
        if not _is_own_frame(entry):
            raise OutputError(f"{folder} holds {entry.name}, which svd-trt did not write; name a new folder")


def first_frame(folder: Path) -> Path:
    """The first frame in ``folder``.

    Raises:
        OutputError: there is none.
    """
    frames = [entry for entry in folder.iterdir() if _FRAME_NAME.fullmatch(entry.name)]
    if not frames:
        raise OutputError(f"{folder} holds no frames (frame_0000.png and so on)")
    return min(frames, key=lambda frame: (len(frame.name), frame.name))


def _is_own_frame(path: Path) -> bool:
    # The name is not enough: other programs number their frames in the same way.
    if not _FRAME_NAME.fullmatch(path.name) or not path.is_file():
        return False
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return KEYWORD in picture.info
    except OSError:
        return False
