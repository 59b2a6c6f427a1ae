"""Exchanging or replacing a folder in one step, so that its name is never without a folder."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

from svd_trt.engine.temporary_files import REPLACED, hidden_sibling

__all__ = ["replace_folder", "swap"]

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


def replace_folder(new: Path, target: Path, beside: Path | None = None) -> None:
    """Replace the folder ``target`` by ``new``; after a failure ``target`` is what it was.

    Args:
        new: is afterwards the folder that was replaced, or nothing.
        target: exists, on the same file system.
        beside: the path beside which the old folder waits if the system cannot exchange two; None is ``target``.

    Raises:
        OSError: a folder cannot be moved.
    """
    if swap(new, target):
        return
    aside = hidden_sibling(beside or target, REPLACED)
    try:
        target.rename(aside)
        new.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
