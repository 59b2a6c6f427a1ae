"""Files and folders that grow under a hidden name until they are complete, and what killed processes left of them.

A process that is killed cannot remove its unfinished file. So it holds a lock on the file, which the system releases
when the process ends, however it ends; the next one that writes to the same folder removes what nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
from pathlib import Path
from typing import BinaryIO

__all__ = ["REPLACED", "create_file", "create_folder", "hidden_sibling", "remove_leftovers"]

REPLACED = ".replaced"
"""The suffix of what is moved aside to make room. It may be the only copy, so `remove_leftovers` keeps it."""

_NAME = re.compile(r"\.svd-trt-[0-9a-f]{12}(\.\w+)?")


def hidden_sibling(target: Path, suffix: str) -> Path:
    """An unused path beside ``target``, on the same file system so that a rename is enough.

    Its length does not depend on the name of the target, which may be as long as the file system allows.
    """
    return target.with_name(f".svd-trt-{secrets.token_hex(6)}{suffix}")


def create_file(target: Path, suffix: str) -> tuple[Path, BinaryIO]:
    """Create a hidden file beside ``target``; other processes leave it alone until the returned file is closed.

    Raises:
        OSError: it cannot be created.
    """
    while True:
        path = hidden_sibling(target, suffix)
        # Not tempfile: only the owner may read its files, and that would be so for what the file becomes.
        file = path.open("xb")
        if _hold(path, file.fileno()):
            return path, file
        file.close()


def create_folder(target: Path) -> tuple[Path, int]:
    """Create a hidden folder beside ``target``; other processes leave it alone until the descriptor is closed.

    Raises:
        OSError: it cannot be created.
    """
    while True:
        path = hidden_sibling(target, "")
        path.mkdir()
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            if _hold(path, descriptor):
                return path, descriptor
            os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the hidden files and folders in ``folder`` whose processes have ended.

    What cannot be locked or removed stays: it may belong to another user, or the file system may have no locks.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _NAME.fullmatch(entry.name) and not entry.name.endswith(REPLACED):
                _remove_if_left(Path(entry.path))


def _hold(path: Path, descriptor: int) -> bool:
    """Lock a new file or folder; False if another process took it for a leftover before that, and removed it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return True  # this file system has no locks, so nobody can take it for a leftover
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove_if_left(path: Path) -> None:
    with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
        kind = path.lstat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            return
        # NFS grants an exclusive lock only on a file that is open for writing.
        descriptor = os.open(path, os.O_NOFOLLOW | (os.O_RDONLY if stat.S_ISDIR(kind) else os.O_RDWR))
        opened.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_ISDIR(kind):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
