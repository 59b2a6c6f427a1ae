"""Arrays of any library become arrays of numpy, by the protocols that they share, without importing the library."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from svd_trt.errors import ArgumentError, first_line

__all__ = ["is_array", "to_numpy"]


def is_array(values: Any) -> bool:
    """True if ``values`` shares its elements by ``__dlpack__``, ``__array__`` or a like protocol."""
    names = ("__dlpack__", "__array__", "__array_interface__")
    return any(hasattr(values, name) for name in names) and not isinstance(values, type)


def to_numpy(values: Any, what: str) -> npt.NDArray[Any]:
    """The elements of ``values`` as an array in host memory, which is shared if it can be.

    Tensors of torch may have a gradient. bfloat16, which numpy does not have, becomes float32. What is on a GPU is
    copied, if its library can do that when it is asked for host memory.

    Raises:
        ArgumentError: ``values``, which is called ``what``, is not in host memory and its library does not copy it.
    """
    array = values if isinstance(values, np.ndarray) else _shared(values, what)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array  # as JAX gives it


def _shared(values: Any, what: str) -> npt.NDArray[Any]:
    try:
        if any(kind.__module__.partition(".")[0] == "torch" for kind in type(values).__mro__):
            return _from_torch(values)
        if hasattr(values, "__array__") or hasattr(values, "__array_interface__"):
            try:
                return np.asarray(values)
            except TypeError:  # as arrays of CuPy, whose copies to the host must be asked for
                if not hasattr(values, "__dlpack__"):
                    raise
        return _from_dlpack(values)
    except Exception as error:  # of any library
        reason = first_line(error)
        raise ArgumentError(
            f"{what} cannot be read as an array ({reason}); pass a copy in host memory, as by .cpu() or .get()"
        ) from error


def _from_torch(tensor: Any) -> npt.NDArray[Any]:
    host = tensor.detach().cpu()
    if str(host.dtype) == "torch.bfloat16":
        host = host.float()
    array: npt.NDArray[Any] = host.numpy()
    return array


def _from_dlpack(values: Any) -> npt.NDArray[Any]:
    try:
        return np.from_dlpack(values, device="cpu")  # type: ignore[call-arg,unused-ignore]
    except TypeError:  # numpy before 2.1, or an object that knows no devices
        return np.from_dlpack(values)
