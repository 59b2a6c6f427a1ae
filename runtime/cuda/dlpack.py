"""Capsules of DLPack, which share memory between libraries; its structures are those before version 1."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

__all__ = ["CUDA", "HOST", "ManagedTensor", "make_capsule"]

HOST, CUDA = 1, 2
"""``DLDeviceType``."""

_UNSIGNED = 1  # of ``DLDataTypeCode``
_NAME = b"dltensor"  # a consumer renames the capsule and then calls the deleter itself


_CALLED = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Device(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class ManagedTensor(ctypes.Structure):
    """``DLManagedTensor``."""

    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _CALLED))


_held: dict[int, tuple[Any, ...]] = {}
"""What capsules and their consumers use, by the address of the `ManagedTensor`."""

# A library of its own: others set the types of arguments of `ctypes.pythonapi`, which all of them share.
_python = ctypes.PyDLL(None)
_python.PyCapsule_New.restype = ctypes.py_object
_python.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_python.PyCapsule_IsValid.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
_python.PyCapsule_GetPointer.restype = ctypes.c_void_p
_python.PyCapsule_GetPointer.argtypes = (ctypes.c_void_p, ctypes.c_char_p)


def _delete(address: int) -> None:
    """The consumer does not use the tensor any more."""
    _held.pop(address, None)


def _drop(capsule: int) -> None:
    """A capsule is collected; if nobody took its tensor, that is deleted too."""
    if _python.PyCapsule_IsValid(capsule, _NAME):
        _delete(_python.PyCapsule_GetPointer(capsule, _NAME))


_C_DELETE, _C_DROP = _CALLED(_delete), _CALLED(_drop)


def make_capsule(address: int, offset: int, shape: Sequence[int], device: tuple[int, int], *, owner: object) -> Any:
    """A capsule with a contiguous tensor of uint8.

    Args:
        address: of the memory.
        offset: bytes before the tensor.
        shape: of the tensor.
        device: its type and number.
        owner: is kept until the consumer deletes the tensor.
    """
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    tensor = _Tensor(address, _Device(*device), len(shape), _DataType(_UNSIGNED, 8, 1), sizes, None, offset)
    managed = ManagedTensor(tensor, None, _C_DELETE)
    place = ctypes.addressof(managed)
    _held[place] = (managed, sizes, owner)
    return _python.PyCapsule_New(place, _NAME, ctypes.cast(_C_DROP, ctypes.c_void_p))
