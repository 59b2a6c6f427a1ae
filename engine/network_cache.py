"""A folder of finished networks and engines, shared by all builds that use it.

An entry is named after its key, which is a digest of everything it depends on: weights, recipe, packages, and the code
that writes it. So nothing in the cache is ever out of date; it only grows, until it is removed with ``rm -r``.

For a key ``ab12`` the entry is the folder ``ab12``, with a record ``entry.json`` and the files under the paths that
they have in a bundle. It appears by a rename, and its files are compared with the hashes in the record whenever it is
used. Files are copied into and out of the cache, never linked: a change to a bundle's file does not change the
cache, and a change to the cache does not change a bundle. File systems that can share blocks between copies do so
(Btrfs, XFS).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
from filelock import FileLock, Timeout

from svd_trt.engine.manifest import NOT_JSON, OnnxEntry, PlanEntry
from svd_trt.errors import OutputError

__all__ = ["NetworkCache"]

_Entry = TypeVar("_Entry", OnnxEntry, PlanEntry)
_RECORD = "entry.json"
_PARTIAL = ".partial"
_CHUNK = 1 << 30


class NetworkCache:
    """The cache in ``folder``, which is created if needed.

    Raises:
        OutputError: ``folder`` cannot be created or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        with self._writing():
            if self.folder.exists() and not self.folder.is_dir():
                raise OutputError(
                    f"cannot write to the cache {self.folder}: it is not a folder; choose another folder with --cache"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(None, "permission denied")
            self._remove_leftovers()

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold the lock of ``key``, so that two builds that want the same entry do not both make it."""
        with FileLock(self._lock_path(key)):
            yield

    def take(self, key: str, kind: type[_Entry], target: Path) -> _Entry | None:
        """Copy the files of an entry into the folder ``target``; None if there is none, or if it is damaged."""
        found = self.folder / key
        try:
            entry = msgspec.json.decode((found / _RECORD).read_bytes(), type=kind)
        except (OSError, *NOT_JSON):
            return None
        if entry.key != key or any(file.outside_bundle for file in entry.files):
            return None
        try:
            for file in entry.files:
                _copy(found / file.path, target / file.path)
        except FileNotFoundError:
            return None
        return entry if entry.is_whole(target) else None

    def store(self, entry: OnnxEntry | PlanEntry, source: Path) -> None:
        """Copy the files of ``entry`` from the folder ``source``; call it with the lock of the entry's key held.

        Raises:
            OutputError: the cache cannot be written.
        """
        final, partial = self.folder / entry.key, self.folder / f"{entry.key}{_PARTIAL}"
        with self._writing():
            _remove(partial)  # of a build that was killed or failed since this one started
            for file in entry.files:
                _copy(source / file.path, partial / file.path)
            (partial / _RECORD).write_bytes(msgspec.json.encode(entry))
            _remove(final)  # damaged, or `take` would have found it
            partial.rename(final)

    def _remove_leftovers(self) -> None:
        """Remove what builds left that were killed while they added an entry; they held its lock."""
        for partial in self.folder.glob(f"*{_PARTIAL}"):
            with (
                contextlib.suppress(Timeout),
                FileLock(self._lock_path(partial.name.removesuffix(_PARTIAL)), timeout=0),
            ):
                _remove(partial)

    def _lock_path(self, key: str) -> Path:
        return self.folder / f"{key}.lock"

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot write to the cache {self.folder}: {error.strerror or error}; "
                "free space, or choose another folder with --cache"
            ) from error


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # it may be a hard link to another bundle's file
    try:
        with source.open("rb") as read, target.open("wb") as write:
            while os.copy_file_range(read.fileno(), write.fileno(), _CHUNK):
                pass
    except OSError:  # the kernel cannot copy between these file systems
        shutil.copyfile(source, target)
