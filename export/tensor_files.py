"""Tensors of weight files: names and shapes without loading them, and the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from svd_trt.errors import CheckpointError, first_line
from svd_trt.export.file_kinds import is_pickle, refuse_other_files

__all__ = ["metadata_of", "plain_names", "shapes_of", "tensors_of", "to_weight"]

# What torch.compile and torch's parallel wrappers put before every name.
_WRAPPERS = ("module.", "_orig_mod.")


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """``names`` by what they are without the prefixes of wrappers, if all of them have one."""
    plain = {name: name for name in names}
    while plain and (prefix := next((w for w in _WRAPPERS if all(name.startswith(w) for name in plain)), None)):
        plain = {name.removeprefix(prefix): full for name, full in plain.items()}
    return plain


def shapes_of(path: Path, *, pickles: bool = False) -> dict[str, tuple[int, ...]]:
    """Plain names and shapes of the tensors in a file, without reading any.

    Args:
        path: a safetensors file.
        pickles: allow ``.bin`` files of ``torch.save``, too.

    Raises:
        CheckpointError: it is something else, or is damaged.
    """
    if pickles and _is_bin(path):
        return {name: tuple(tensor.shape) for name, tensor in _unpickled(path, "meta").items()}
    with _opened(path) as file:
        return {name: tuple(file.get_slice(full).get_shape()) for name, full in plain_names(file.keys()).items()}


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file.

    Raises:
        CheckpointError: it is something else, or is damaged.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


def tensors_of(path: Path) -> dict[str, Any]:
    """Every tensor of a file by its plain name, mapped into memory: what is not used is not read.

    ``.bin`` files of ``torch.save`` are read without running any code that they may have.

    Raises:
        CheckpointError: it is neither, or is damaged.
    """
    if _is_bin(path):
        return dict(_unpickled(path, "cpu"))
    with _opened(path) as file:
        return {name: file.get_tensor(full) for name, full in plain_names(file.keys()).items()}


def to_weight(tensor: Any, dtype: Any, where: str) -> Any:
    """A tensor of a file as a parameter of ``dtype``.

    Raises:
        CheckpointError: it has whole numbers, as quantisers write them.
    """
    from torch import nn

    if not tensor.is_floating_point():
        raise CheckpointError(f"{where} is of {tensor.dtype}, which only a quantiser writes; give fp16 or fp32 weights")
    return nn.Parameter(tensor.to(dtype), requires_grad=False)


def _is_bin(path: Path) -> bool:
    """True for ``.bin`` files that are pickles. torch.load goes by the name itself: it takes others for safetensors."""
    return path.suffix == ".bin" and is_pickle(path)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file."""
    from safetensors import SafetensorError, safe_open

    refuse_other_files(path)
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file, or is damaged: {first_line(error)}; download or save it again"
        ) from error


def _unpickled(path: Path, device: str) -> Mapping[str, Any]:
    import zipfile

    import torch

    try:
        content = torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # the unpickler raises whatever a damaged file makes it raise
        raise CheckpointError(
            f"{path} cannot be read by torch's weights-only reader: {first_line(error)}; save it as safetensors"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} has no table of weights; save the model's state_dict")
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    return {name: tensors[full] for name, full in plain_names(tensors).items()}
