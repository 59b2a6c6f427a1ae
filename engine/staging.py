"""The folder in which a bundle grows until it is whole: beside its final place, resumable, published by a rename.

For a bundle ``out/svd`` the sibling ``out/.svd.building`` has the finished networks, each with a small record that is
written last and has its key and its files' hashes. A build that dies leaves that folder and nothing at ``out/svd``; the
next one takes from it whatever still has the right key and content. ``out/.svd.lock`` keeps two builds of one bundle
apart.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar, get_args

import msgspec
from filelock import FileLock, Timeout

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.manifest import (
    CHECKSUM_NAME,
    GOLDEN_FOLDER,
    MANIFEST_NAME,
    NOT_JSON,
    Manifest,
    OnnxEntry,
    PlanEntry,
    TensorRtName,
    read_manifest,
    write_manifest,
)
from svd_trt.engine.network_cache import NetworkCache
from svd_trt.engine.swap import swap
from svd_trt.errors import BundleError, LockedError, OutputError

__all__ = ["Staging"]

_log = logging.getLogger("svd_trt")

_Entry = TypeVar("_Entry", OnnxEntry, PlanEntry)
_RECORDS = "records"
# Everything at the top level of a bundle.
_BUNDLE_NAMES = {MANIFEST_NAME, CHECKSUM_NAME, GOLDEN_FOLDER, "onnx", *get_args(TensorRtName)}


class Staging:
    """The bundle that is being built for ``target``; a context manager that holds its lock.

    If another build of the same bundle is running, it waits for it, after a warning to the logger ``svd_trt``.

    Args:
        target: the bundle's final place.
        cache: another source of finished networks, to which new ones are added.
        timeout: seconds to wait for another build; negative waits without limit.

    Raises:
        LockedError: another build of the bundle did not finish in time.
        OutputError: ``target`` is something other than a bundle, or its folder cannot be written.
    """

    def __init__(self, target: Path, cache: NetworkCache | None = None, timeout: float = -1) -> None:
        absolute = target.resolve()  # through symbolic links: the bundle is replaced, not the link to it
        if not absolute.name:
            raise OutputError(f"{target} cannot be a bundle; name a folder with -o")
        self.target = absolute
        self.path = absolute.with_name(f".{absolute.name}.building")
        self._aside = absolute.with_name(f".{absolute.name}.replaced")
        self._lock = FileLock(absolute.with_name(f".{absolute.name}.lock"))
        self._cache = cache
        self._timeout = timeout

    def __enter__(self) -> Staging:
        with contextlib.suppress(FileNotFoundError):  # another build is replacing the target
            _refuse_foreign(self.target)
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(exist_ok=True)  # before the lock, which retries for ever if it cannot be written
            self._acquire()
            try:
                _refuse_foreign(self.target)  # again, because it may have changed during the wait
                self._recover()
            except BaseException:
                self._lock.release()
                raise
        except OSError as error:
            raise OutputError(
                f"cannot write beside {self.target}: {error.strerror or error}; choose another place with -o"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()
        self._lock.release()

    @property
    def vanished(self) -> bool:
        """True if another program removed the folder that the bundle grows in. Builds never do: they hold the lock."""
        return not self.path.is_dir()

    def existing(self) -> Manifest | None:
        """The manifest of the bundle that is at the target now; None if there is no readable one."""
        try:
            return read_manifest(self.target)
        except BundleError:
            return None

    def open_existing(self) -> Bundle | None:
        """The bundle at the target if it is whole and unaltered."""
        try:
            return Bundle.open(self.target)
        except BundleError:
            return None

    def reuse(self, name: str, key: str, kind: type[_Entry]) -> tuple[_Entry, bool] | None:
        """A finished network of this key, and whether it is from the cache; its files are then in the staging folder.

        It comes from an interrupted build, from the bundle at the target or from the cache. None if there is none, or
        if its files are not as recorded.
        """
        record = self._record(name, kind)
        if record is not None and record.key == key and record.is_whole(self.path):
            return record, False
        for root in (self.path, self.target):  # the staging folder has a manifest if a build died before its rename
            for entry in _published(root, name, kind):
                if entry.key == key and entry.is_whole(root):
                    for file in entry.files:
                        _link(root / file.path, self.path / file.path)
                    self._write_record(name, entry)
                    return entry, False
        if self._cache is not None and (cached := self._cache.take(key, kind, self.path)) is not None:
            self._write_record(name, cached)
            return cached, True
        return None

    @contextlib.contextmanager
    def making(self, key: str) -> Iterator[None]:
        """Hold the cache's lock of ``key``; if another build makes the same, wait for it and then call `reuse`."""
        with self._cache.locked(key) if self._cache is not None else contextlib.nullcontext():
            yield

    def finish(self, name: str, entry: OnnxEntry | PlanEntry) -> None:
        """Record that a network is complete, and add it to the cache; without a record it is not reused."""
        self._write_record(name, entry)
        if self._cache is not None:
            self._cache.store(entry, self.path)

    def discard(self) -> None:
        """Remove the staging folder, because the bundle at the target is up to date."""
        shutil.rmtree(self.path, ignore_errors=True)

    def publish(self, manifest: Manifest) -> Bundle:
        """Write the manifest and move the finished bundle to its place, where it replaces an older one."""
        kept = {file.path for file in manifest.files} | {MANIFEST_NAME, CHECKSUM_NAME}
        write_manifest(manifest, self.path)  # first: from here on it replaces the records
        for path in sorted(self.path.rglob("*"), reverse=True):
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self.path).as_posix() not in kept:
                path.unlink()
        if self.target.exists() and swap(self.path, self.target):
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self._rename()
        return Bundle.open(self.target, verify=False)

    def _rename(self) -> None:
        """Move the finished bundle to its place; in two steps if there is an older one, see `_recover`."""
        if self.target.exists():
            self.target.rename(self._aside)
        self.path.rename(self.target)
        shutil.rmtree(self._aside, ignore_errors=True)

    def _acquire(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            _log.warning("another build of %s is running; waiting for it (Ctrl-C gives up)", self.target)
            try:
                self._lock.acquire(timeout=self._timeout)
            except Timeout:
                raise LockedError(f"another process is building {self.target}; wait for it or stop it") from None

    def _recover(self) -> None:
        """Finish or undo the work of a build that died between the two renames of `_rename`."""
        if self._aside.exists():
            if self.target.exists():
                shutil.rmtree(self._aside, ignore_errors=True)
            else:
                self._aside.rename(self.target)
        self.path.mkdir(exist_ok=True)

    def _write_record(self, name: str, entry: OnnxEntry | PlanEntry) -> None:
        path = self._record_path(name, type(entry))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.encode(entry))
        temporary.replace(path)

    def _record_path(self, name: str, kind: type[OnnxEntry] | type[PlanEntry]) -> Path:
        return self.path / _RECORDS / f"{name}.{'onnx' if kind is OnnxEntry else 'plan'}.json"

    def _record(self, name: str, kind: type[_Entry]) -> _Entry | None:
        try:
            return msgspec.json.decode(self._record_path(name, kind).read_bytes(), type=kind)
        except (OSError, *NOT_JSON):
            return None


def _published(root: Path, name: str, kind: type[_Entry]) -> list[_Entry]:
    """The entries of a network in the manifest of ``root``; none if there is no readable manifest."""
    try:
        networks = {str(n): entry for n, entry in read_manifest(root).networks.items()}
    except BundleError:
        return []
    forms = (networks[name].onnx, networks[name].plan) if name in networks else ()
    return [form for form in forms if isinstance(form, kind)]


def _link(source: Path, destination: Path) -> None:
    if source == destination:
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    destination.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), destination)  # not a link to a symbolic link, which may be relative
    except OSError:  # file systems without hard links
        shutil.copy2(source, destination)


def _refuse_foreign(target: Path) -> None:
    """Refuse to replace anything but a bundle, or a bundle that has other files in its folder.

    Raises:
        OutputError: see above; the message names the file.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target} exists and is not a bundle; remove it or choose another place with -o")
    strangers = sorted({path.name for path in target.iterdir()} - _BUNDLE_NAMES)
    if strangers:
        raise OutputError(
            f"{target} holds {strangers[0]}, which is not part of a bundle; move it, or choose another -o"
        )
    try:
        fields = msgspec.json.decode((target / MANIFEST_NAME).read_bytes())
    except (FileNotFoundError, *NOT_JSON):
        return  # an empty folder, or a damaged bundle
    if not isinstance(fields, dict) or "svd_trt_version" not in fields:
        raise OutputError(f"{target / MANIFEST_NAME} is not a bundle's; choose another place with -o")
