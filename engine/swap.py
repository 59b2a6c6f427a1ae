"""Exchanging two folders in one step, so that neither name is without a folder at any time."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

__all__ = ["swap"]

_HERE = -100  # AT_FDCWD: relative paths are relative to the current folder
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
# The kernel or the file system (NFS, some of FUSE) cannot do it.
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTTY, errno.EOPNOTSUPP}


def swap(one: Path, other: Path) -> bool:
    """Exchange what is at two paths of one file system; False, and nothing is done, if the system cannot do that.

    Raises:
        OSError: one of the paths does not exist, or may not be changed.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:  # a C library without the function
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))
