"""The parameters that a video was generated with, as JSON inside its file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from svd_trt.errors import ArgumentError, OutputError
from svd_trt.runtime.video._png import KEYWORD, first_frame
from svd_trt.runtime.video._webp import user_comment


def encode(metadata: Mapping[str, object]) -> str:
    """``metadata`` as JSON in ASCII, the only encoding that every container keeps intact.

    Raises:
        ArgumentError: a value is not JSON, for instance NaN or infinity.
    """
    try:
        return json.dumps(dict(metadata), allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"metadata must be plain JSON values: {error}") from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The parameters stored in a video that svd-trt wrote: any format but .npy, or a folder of PNGs.

    Raises:
        OutputError: the file cannot be read, or holds no parameters.
    """
    source = Path(path)
    try:
        text = _stored_text(source)
    except OutputError:
        raise
    except Exception as error:  # on damaged files the decoders raise nearly anything, as `load_image` knows
        reason = getattr(error, "strerror", None) or "it is damaged, or its suffix is wrong"
        raise OutputError(f"cannot read {source}: {reason}") from error
    try:
        parameters = json.loads(text or "")
    except (ValueError, RecursionError):
        parameters = None
    if not isinstance(parameters, dict):
        raise OutputError(f"{source} holds no parameters; only videos that svd-trt wrote do, and not .npy")
    return parameters


def _stored_text(source: Path) -> str | None:
    if source.is_dir():
        source = first_frame(source)
    if source.suffix.lower() in (".mp4", ".mov", ".mkv", ".webm"):
        # An absolute path, because libav takes the text before a colon for a protocol.
        with av.open(str(source.absolute())) as container:
            return next((text for name, text in container.metadata.items() if name.lower() == "comment"), None)
    if source.suffix.lower() not in (".gif", ".webp", ".png", ".apng"):
        return None
    with Image.open(source) as picture:
        if picture.format == "WEBP":
            return user_comment(picture.getexif())
        comment = picture.info.get("comment" if picture.format == "GIF" else KEYWORD)
    return comment.decode("ascii", "replace") if isinstance(comment, bytes) else comment


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not one")
