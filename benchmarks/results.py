"""Reading and writing result files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from svd_trt.benchmarks.schema import SCHEMA, Result
from svd_trt.errors import OutputError, ResultError

__all__ = ["encode_result", "read_result", "write_result", "write_whole"]

_DIGITS = 6


def encode_result(result: Result) -> bytes:
    """The file's content: JSON in which numbers have six digits, a line each."""
    rounded = _rounded(msgspec.to_builtins(result))
    return msgspec.json.format(msgspec.json.encode(rounded), indent=1) + b"\n"


def write_result(path: Path, result: Result) -> None:
    """Put ``result`` at ``path`` as a whole; what was there stays until then.

    Raises:
        OutputError: it cannot be written.
    """
    write_whole(path, encode_result(result))


def write_whole(path: Path, content: bytes) -> None:
    """The same with any content. What is no file, such as a pipe or ``/dev/stdout``, is written to in place."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        try:
            partial.write_bytes(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; free space or choose another place") from error


def read_result(path: Path) -> Result:
    """A result of ``svd-trt bench``.

    Raises:
        ResultError: the file is missing, damaged, something else, or of another version.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror}") from error
    try:
        raw = msgspec.json.decode(content)
    except msgspec.DecodeError as error:
        raise ResultError(f"{path} is not JSON, or cut short: {error}") from error
    if not isinstance(raw, dict) or raw.get("benchmark") != "side-by-side":
        raise ResultError(f"{path} is no result of `svd-trt bench`")
    if raw.get("schema") != SCHEMA:
        raise ResultError(f"{path} has schema {raw.get('schema')}, and this svd-trt reads {SCHEMA}; measure again")
    try:
        return msgspec.convert(raw, Result)
    except msgspec.ValidationError as error:
        raise ResultError(f"{path} is damaged: {error}") from error


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
