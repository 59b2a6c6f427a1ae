"""Capsules of DLPack, which share memory between libraries; its structures are those before version 1."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["CUDA", "HOST", "ManagedTensor", "make_capsule"]

HOST, CUDA = 1, 2
"""``DLDeviceType``."""

_NAME = b"dltensor"  # a consumer renames the capsule and then calls the deleter itself


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

    _fields_ = (
        ("tensor", _Tensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    )


# A library of its own: others set the types of arguments of `ctypes.pythonapi`, which all of them share.
_python = ctypes.PyDLL(None)
_python.PyCapsule_GetPointer.restype = ctypes.c_void_p
_python.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


class _Memory:
    """Memory as numpy takes it; ``owner`` is kept as long as an array of it exists."""

    def __init__(self, address: int, shape: Sequence[int], owner: object) -> None:
        self.owner = owner
        self.__array_interface__ = {"data": (address, False), "shape": tuple(shape), "typestr": "|u1", "version": 3}


def make_capsule(address: int, offset: int, shape: Sequence[int], device: tuple[int, int], *, owner: object) -> Any:
    """A capsule with a contiguous tensor of uint8.

    numpy makes it, as if the memory was the host's, and here it gets its true device. So what frees it is numpy's C
    code: a destructor in Python would run while the error of a consumer that refuses the device is set.

    Args:
        address: of the memory.
        offset: bytes before the tensor.
        shape: of the tensor.
        device: its type and number.
        owner: is kept until the consumer deletes the tensor, or the capsule is dropped.
    """
    assert math.prod(shape) > 0, "numpy may replace the address of an empty array"
    array = np.asarray(_Memory(address + offset, shape, owner))
    capsule = array.__dlpack__()
    managed = ManagedTensor.from_address(_python.PyCapsule_GetPointer(capsule, _NAME))
    managed.tensor.device = _Device(*device)
    return capsule
