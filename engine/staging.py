"""Where a bundle grows until it is whole: beside its final place, resumable, published by a rename.

For a bundle ``out/svd`` the sibling ``out/.svd.building`` holds the finished networks, each with a small record that
is written last and names its key and its files' hashes. A build that dies leaves that folder and nothing at
``out/svd``; the next one takes from it whatever still has the right key and content. ``out/.svd.lock`` keeps two
builds of one bundle apart.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, get_args

import msgspec
from filelock import FileLock, Timeout

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    OnnxEntry,
    PlanEntry,
    TensorRtName,
    read_manifest,
    sha256_of,
    write_manifest,
)
from svd_trt.errors import BundleError, LockedError, OutputError

__all__ = ["Staging"]

_Entry = TypeVar("_Entry", OnnxEntry, PlanEntry)
_RECORDS = "records"
# All that a bundle has at its top.
_OURS = {MANIFEST_NAME, "onnx", *get_args(TensorRtName)}


class Staging:
    """The bundle that is being built for ``target``; a context manager that holds its lock.

    Args:
        target: the bundle's final place.
        on_wait: called once if another build of the same bundle is running, before waiting for it.
        timeout: seconds to wait for it; negative waits as long as it takes.

    Raises:
        LockedError: another build of the bundle did not finish in time.
        OutputError: ``target`` is something other than a bundle, or its folder cannot be written.
    """

    def __init__(self, target: Path, on_wait: Callable[[], None] | None = None, timeout: float = -1) -> None:
        absolute = target.resolve()  # through symbolic links: the bundle is replaced, not the link to it
        if not absolute.name:
            raise OutputError(f"{target} cannot be a bundle; name a folder with -o")
        self.target = absolute
        self.path = absolute.with_name(f".{absolute.name}.building")
        self._aside = absolute.with_name(f".{absolute.name}.replaced")
        self._lock = FileLock(absolute.with_name(f".{absolute.name}.lock"))
        self._on_wait = on_wait or (lambda: None)
        self._timeout = timeout

    def __enter__(self) -> Staging:
        _refuse_foreign(self.target)
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(exist_ok=True)  # before the lock, which tries for ever where it cannot be written
            self._acquire()
            self._recover()
        except OSError as error:
            raise OutputError(
                f"cannot write beside {self.target}: {error.strerror or error}; choose another place with -o"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()
        self._lock.release()

    def existing(self) -> Manifest | None:
        """The manifest of the bundle that stands at the target now; None where there is no readable one."""
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

    def reuse(self, name: str, key: str, kind: type[_Entry]) -> _Entry | None:
        """A finished network of this key, from an interrupted build or from the bundle at the target.

        Its files are then in the staging folder. None where there is none, or where its files are not as recorded.
        """
        record = self._record(name, kind)
        if record is not None and record.key == key and self._whole(self.path, record):
            return record
        for root in (self.path, self.target):  # ours has a manifest if it died just short of its renaming
            for entry in _published(root, name, kind):
                if entry.key == key and self._whole(root, entry):
                    for file in _files(entry):
                        _link(root / file.path, self.path / file.path)
                    self.finish(name, entry)
                    return entry
        return None

    def finish(self, name: str, entry: OnnxEntry | PlanEntry) -> None:
        """Record that a network is whole; what has no record is not reused."""
        path = self._record_path(name, type(entry))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.encode(entry))
        temporary.replace(path)

    def discard(self) -> None:
        """Remove what is staged; the bundle at the target is what was wanted."""
        shutil.rmtree(self.path, ignore_errors=True)

    def publish(self, manifest: Manifest) -> Bundle:
        """Write the manifest and move the finished bundle to its place, instead of what stood there."""
        kept = {file.path for file in manifest.files} | {MANIFEST_NAME}
        write_manifest(manifest, self.path)  # first: from here on it, and no record, says what is finished
        for path in sorted(self.path.rglob("*"), reverse=True):
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(self.path).as_posix() not in kept:
                path.unlink()
        if self.target.exists():
            self.target.rename(self._aside)
        self.path.rename(self.target)
        shutil.rmtree(self._aside, ignore_errors=True)
        return Bundle.open(self.target, verify=False)

    def _acquire(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            self._on_wait()
            try:
                self._lock.acquire(timeout=self._timeout)
            except Timeout:
                raise LockedError(f"another process is building {self.target}; wait for it or stop it") from None

    def _recover(self) -> None:
        """Put things right after a death between publish()'s two renames."""
        if self._aside.exists():
            if self.target.exists():
                shutil.rmtree(self._aside, ignore_errors=True)
            else:
                self._aside.rename(self.target)
        self.path.mkdir(exist_ok=True)

    def _record_path(self, name: str, kind: type[OnnxEntry] | type[PlanEntry]) -> Path:
        return self.path / _RECORDS / f"{name}.{'onnx' if kind is OnnxEntry else 'plan'}.json"

    def _record(self, name: str, kind: type[_Entry]) -> _Entry | None:
        try:
            return msgspec.json.decode(self._record_path(name, kind).read_bytes(), type=kind)
        except (OSError, msgspec.MsgspecError):
            return None

    def _whole(self, root: Path, entry: OnnxEntry | PlanEntry) -> bool:
        try:
            return all(
                (root / f.path).stat().st_size == f.size and sha256_of(root / f.path) == f.sha256 for f in _files(entry)
            )
        except OSError:
            return False


def _published(root: Path, name: str, kind: type[_Entry]) -> list[_Entry]:
    """What the manifest in ``root`` says of a network; nothing where there is no readable one."""
    try:
        networks = {str(n): entry for n, entry in read_manifest(root).networks.items()}
    except BundleError:
        return []
    forms = (networks[name].onnx, networks[name].plan) if name in networks else ()
    return [form for form in forms if isinstance(form, kind)]


def _files(entry: OnnxEntry | PlanEntry) -> tuple[FileEntry, ...]:
    return entry.files if isinstance(entry, OnnxEntry) else (entry.file,)


def _link(source: Path, destination: Path) -> None:
    if source == destination:
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    destination.unlink(missing_ok=True)
    try:
        os.link(source, destination)
    except OSError:  # file systems without hard links
        shutil.copy2(source, destination)


def _refuse_foreign(target: Path) -> None:
    """Never replace, nor delete along with a bundle, what is not ours."""
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target} exists and is not a bundle; remove it or choose another place with -o")
    strangers = sorted({path.name for path in target.iterdir()} - _OURS)
    if strangers:
        raise OutputError(
            f"{target} holds {strangers[0]}, which is not part of a bundle; move it, or choose another -o"
        )
    try:
        fields = msgspec.json.decode((target / MANIFEST_NAME).read_bytes())
    except (FileNotFoundError, msgspec.DecodeError):
        return  # an empty folder, or a bundle damaged
    if not isinstance(fields, dict) or "svd_trt_version" not in fields:
        raise OutputError(f"{target / MANIFEST_NAME} is not a bundle's; choose another place with -o")
