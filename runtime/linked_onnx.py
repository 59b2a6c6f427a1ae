"""ONNX files behind symbolic links, as in the cache of Hugging Face, whose files are links to files named by hashes.

Versions of ONNX Runtime differ in which links they follow from a graph to its weights (1.24.1 refuses those that lead
out of the graph's folder). So links are resolved here, and no version sees any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.spec import NetworkName

__all__ = ["FOLDER_OPTION", "find_onnx", "with_location"]

FOLDER_OPTION = "session.model_external_initializers_file_folder_path"
"""The option of an ONNX Runtime session that says where the weights of a graph in memory are."""

# Fields of protocol buffers, by the numbers in onnx.proto: ModelProto.graph, GraphProto.initializer,
# TensorProto.external_data; and a StringStringEntryProto's key and value.
_EXTERNAL_DATA = (7, 5, 13)
_KEY, _VALUE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def find_onnx(bundle: Bundle, network: NetworkName) -> tuple[str | bytes, Path | None]:
    """Find the graph of a network without links: its path; or its content, and the folder that its weights are in.

    Raises:
        OSError: a file cannot be read.
        ValueError: the graph is not a model in ONNX's format.
    """
    path = bundle.onnx_path(network).resolve()
    weights = [bundle.path / file.path for file in bundle.network(network).onnx.files[1:]]
    if all(file.resolve() == path.with_name(file.name) for file in weights):
        return str(path), None
    (only,) = weights
    target = only.resolve()
    return with_location(path.read_bytes(), target.name), target.parent


def with_location(model: bytes, name: str) -> bytes:
    """Make all weights of ``model``, a graph in ONNX's format, come from the file ``name``.

    Raises:
        ValueError: it is not in ONNX's format.
    """

    def move(entry: bytes) -> bytes:
        fields = {number: payload for number, _, payload, _ in _fields(entry)}
        if fields.get(_KEY) != b"location":
            return entry
        return _field(_KEY, b"location") + _field(_VALUE, name.encode())

    return _edited(model, _EXTERNAL_DATA, move)


def _edited(message: bytes, path: tuple[int, ...], edit: Callable[[bytes], bytes]) -> bytes:
    """``message`` with ``edit`` applied to every field that ``path`` leads to."""
    number, rest = path[0], path[1:]
    parts = []
    for found, kind, payload, whole in _fields(message):
        if found == number and kind == _BYTES:
            parts.append(_field(number, _edited(payload, rest, edit) if rest else edit(payload)))
        else:
            parts.append(whole)
    return b"".join(parts)


def _fields(message: bytes) -> Iterator[tuple[int, int, bytes, bytes]]:
    """Number, wire type, payload and whole encoding of each field."""
    position = 0
    while position < len(message):
        start = position
        tag, position = _varint(message, position)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            begin = position
            _, end = _varint(message, position)
        elif kind == _BYTES:
            size, begin = _varint(message, position)
            end = begin + size
        elif kind in (_FIXED64, _FIXED32):
            begin, end = position, position + (8 if kind == _FIXED64 else 4)
        else:
            raise ValueError("not a model in ONNX's format")
        if end > len(message):
            raise ValueError("the model is cut short")
        yield number, kind, message[begin:end], message[start:end]
        position = end


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """The number at ``position``, seven bits a byte with the lowest first, and the position after it."""
    value = shift = 0
    while True:
        if position >= len(message):
            raise ValueError("the model is cut short")
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _field(number: int, payload: bytes) -> bytes:
    """Encode a field of bytes."""
    return _encoded(number << 3 | _BYTES) + _encoded(len(payload)) + payload


def _encoded(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
