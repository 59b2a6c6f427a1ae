"""The tensors of a Triton model: the picture and the arguments of a generation in, frames out.

Every argument of a bundle is one optional input under its own name. Triton refuses other names and types itself; values
are checked by the pipeline, in its own words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from svd_trt.engine.host import ArgumentInfo
from svd_trt.errors import ArgumentError

__all__ = [
    "DETAILS",
    "FRAME",
    "IMAGE",
    "IMAGE_FILE",
    "INDEX",
    "OUTPUTS",
    "TOTAL",
    "Array",
    "TensorInfo",
    "input_tensors",
    "read_request",
]

Array: TypeAlias = npt.NDArray[Any]

IMAGE = "image"
IMAGE_FILE = "image_file"
FRAME = "frame"
INDEX = "index"
TOTAL = "total"
DETAILS = "details"

# A request makes one video: Triton shares the GPUs among requests, and each answer is then a frame of that video.
_LEFT_OUT = {"num_videos_per_prompt"}
_TYPES = {"integer": "INT64", "number": "FP64", "numbers": "FP64", "choice": "STRING", "text": "STRING"}
_LARGEST_INT64 = 2**63 - 1


class TensorInfo(NamedTuple):
    """One tensor.

    Attributes:
        name: its name.
        kind: its type in Triton's words, without ``TYPE_``.
        shape: -1 is any length.
    """

    name: str
    kind: str
    shape: tuple[int, ...]


OUTPUTS = (
    TensorInfo(FRAME, "UINT8", (-1, -1, 3)),
    TensorInfo(INDEX, "INT32", (1,)),
    TensorInfo(TOTAL, "INT32", (1,)),
    TensorInfo(DETAILS, "STRING", (1,)),
)


def input_tensors(arguments: Mapping[str, ArgumentInfo]) -> list[TensorInfo]:
    """The inputs of a bundle's model, all of them optional: the picture in two forms, and ``arguments``."""
    tensors = [TensorInfo(IMAGE, "UINT8", (-1, -1, -1)), TensorInfo(IMAGE_FILE, "STRING", (1,))]
    for name, info in arguments.items():
        if name not in _LEFT_OUT:
            large = info.kind == "integer" and info.max is not None and info.max > _LARGEST_INT64
            shape = (-1,) if info.kind == "numbers" else (1,)
            tensors.append(TensorInfo(name, "UINT64" if large else _TYPES[info.kind], shape))
    return tensors


def read_request(tensors: Mapping[str, Array]) -> tuple[Array | bytes, dict[str, Any]]:
    """The picture of a request, and its arguments as the pipeline takes them.

    Args:
        tensors: the inputs that the client sent, by name: uint8 ``[H, W, C]`` or ``[C, H, W]`` for ``image``, arrays of
            bytes for texts.

    Raises:
        ArgumentError: there is no picture or there are two, or a text is not UTF-8.
    """
    given = [name for name in (IMAGE, IMAGE_FILE) if name in tensors]
    if len(given) != 1:
        found = "two pictures were" if given else "no picture was"
        raise ArgumentError(
            f"{found} given; send {IMAGE}, uint8 [height, width, channels], or {IMAGE_FILE}, the bytes of a file"
        )
    picture = tensors[IMAGE] if given == [IMAGE] else _only(tensors[IMAGE_FILE])
    values = {name: _value(name, array) for name, array in tensors.items() if name not in (IMAGE, IMAGE_FILE)}
    return picture, values


def _value(name: str, array: Array) -> Any:
    """A number, a text or, for an argument of several numbers, a list of them."""
    if array.dtype == np.object_:
        try:
            return _only(array).decode()
        except UnicodeDecodeError:
            raise ArgumentError(f"{name} must be text in UTF-8, not {_only(array)[:40]!r}") from None
    return array.tolist() if name in ("sigmas", "guidance_interval") else _only(array)


def _only(array: Array) -> Any:
    """The value of an array ``[1]``, which Triton has checked, as one of Python's own types."""
    return array.reshape(-1)[0] if array.dtype == np.object_ else array.reshape(-1)[0].item()
