"""Writing a bundle into a Triton model repository, whole or not at all.

A model grows in a hidden folder beside the repository and takes its place with one rename, so that a server that polls
the repository never sees a part of it. Every file that is written says so in its first line, with a digest of the rest:
a later run replaces what an earlier one wrote, and refuses to replace anything else.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.resources
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.manifest import CHECKSUM_NAME, MANIFEST_NAME
from svd_trt.engine.swap import replace_folder
from svd_trt.engine.temporary_files import create_folder, remove_leftovers
from svd_trt.errors import OutputError
from svd_trt.progress import Progress, ignore_progress
from svd_trt.serve.triton.triton_config import ModelOptions, check_name, config_text
from svd_trt.serve.triton.triton_model import BUNDLE

__all__ = ["CLIENT", "CONFIG", "MODEL_FILE", "WrittenModel", "write_model"]

CONFIG = "config.pbtxt"
CLIENT = "client.py"
VERSION = "1"
MODEL_FILE = f"{VERSION}/model.py"

_TEXTS = (CONFIG, CLIENT, MODEL_FILE)
_MODEL = '''"""The model of this folder; Triton's Python backend imports this file."""

from svd_trt.serve.triton.triton_model import TritonVideoModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_HEAD = "# Written by `svd-trt triton`, which replaces it only while it has this content: sha256 {}\n"
_HEADED = re.compile(re.escape(_HEAD).replace(r"\{\}", "([0-9a-f]{64})"))
_CACHES = {"__pycache__"}  # Triton's process imports model.py


@dataclass(frozen=True)
class WrittenModel:
    """A model in its repository.

    Attributes:
        name: of the model.
        repository: absolute, without symbolic links.
        bundle: what Triton opens: the copy, or what the link leads to.
        copied: the repository has a copy of the bundle, not a link to it.
        replaced: an earlier version of the model was there.
    """

    name: str
    repository: Path
    bundle: Path
    copied: bool
    replaced: bool

    @property
    def path(self) -> Path:
        """The model's folder."""
        return self.repository / self.name


def write_model(
    bundle: Path,
    repository: Path,
    *,
    name: str | None = None,
    options: ModelOptions | None = None,
    copy: bool = False,
    progress: Progress = ignore_progress,
) -> WrittenModel:
    """Write ``bundle`` as a model into ``repository``, which is made if it does not exist.

    Args:
        bundle: its folder.
        repository: Triton's model repository; other models in it stay.
        name: of the model; None is that of the bundle's folder.
        options: how Triton runs it.
        copy: copy the bundle's files; otherwise the model has a symbolic link to the bundle.
        progress: called as ``progress("copy", done, total)`` with bytes.

    Raises:
        ArgumentError: the name cannot be one, or GPUs are named that cannot run the bundle.
        BundleError: there is no whole bundle.
        OutputError: the repository cannot be written, or has something else in the model's place.
    """
    opened = Bundle.open(bundle, verify=copy)
    source, place = bundle.resolve(), repository.resolve()
    chosen = check_name(bundle.absolute().name if name is None else name)
    texts = {
        CONFIG: config_text(chosen, opened.manifest, options or ModelOptions()),
        CLIENT: _client_text(chosen),
        MODEL_FILE: _MODEL,
    }
    if place.is_relative_to(source):
        raise OutputError(f"{repository} is inside the bundle, which the next build replaces; choose another -o")
    if source.is_relative_to(place):
        raise OutputError(f"{bundle} is inside {repository}, where every folder is a model; choose another -o")
    target = place / chosen
    with _writable(repository):
        replaced = _check_replaceable(target)
        place.mkdir(parents=True, exist_ok=True)
        remove_leftovers(place.parent)
        staged, held = create_folder(place)
        try:
            for file, text in texts.items():
                _write(staged / file, _signed(text))
            if copy:
                _copy(opened, staged / VERSION / BUNDLE, progress)
            else:
                (staged / VERSION / BUNDLE).symlink_to(source)
            if replaced:
                replace_folder(staged, target, beside=place)
            else:
                staged.rename(target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)  # what it replaced, or what is unfinished
            os.close(held)
    return WrittenModel(chosen, place, target / VERSION / BUNDLE if copy else source, copy, replaced)


@contextmanager
def _writable(repository: Path) -> Iterator[None]:
    """Turn what the system refuses into an `OutputError`."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise OutputError(
                f"cannot write {repository}: it is another file system than its parent, where models grow; "
                "choose a folder inside it"
            ) from error
        raise OutputError(f"cannot write {repository}: {error.strerror or error}; choose another -o") from error


def _check_replaceable(target: Path) -> bool:
    """Whether an earlier run wrote a model to ``target``; False if nothing is there.

    Raises:
        OutputError: something else is there, or a file was changed since.
    """
    if not target.is_symlink() and not target.exists():
        return False
    advice = "move it, or choose another --name"
    if target.is_symlink() or not target.is_dir():
        raise OutputError(f"{target} exists and is not a model that `svd-trt triton` wrote; {advice}")
    version = target / VERSION
    names = {path.name for path in target.iterdir()}
    names |= {f"{VERSION}/{path.name}" for path in version.iterdir()} if version.is_dir() else set()
    known = {*_TEXTS, VERSION, f"{VERSION}/{BUNDLE}", *(f"{VERSION}/{name}" for name in _CACHES)}
    if strangers := sorted(names - known):
        raise OutputError(f"{target / strangers[0]} was not written by `svd-trt triton`; {advice}")
    if changed := [file for file in _TEXTS if file in names and not _is_signed(target / file)]:
        raise OutputError(f"{target / changed[0]} was changed after `svd-trt triton` wrote it; {advice}")
    copied = version / BUNDLE
    if copied.is_dir() and not copied.is_symlink() and not (copied / MANIFEST_NAME).is_file():
        raise OutputError(f"{copied} is not a bundle; {advice}")
    return True


def _copy(bundle: Bundle, target: Path, progress: Progress) -> None:
    """Copy the files of ``bundle``, and nothing else that is in its folder."""
    files = [*(file.path for file in bundle.manifest.files), MANIFEST_NAME, CHECKSUM_NAME]
    total, done = sum((bundle.path / file).stat().st_size for file in files), 0
    progress("copy", done, total)
    for file in files:
        copied = target / file
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / file, copied)
        done += copied.stat().st_size
        progress("copy", done, total)


def _client_text(name: str) -> str:
    """The example, for the model ``name``."""
    text = (importlib.resources.files(__package__) / "triton_client.py").read_text()
    changed = re.sub(r"^MODEL = .*$", f'MODEL = "{name}"', text, count=1, flags=re.MULTILINE)
    assert changed != text or f'MODEL = "{name}"' in text
    return changed


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _signed(text: str) -> str:
    return _HEAD.format(hashlib.sha256(text.encode()).hexdigest()) + text


def _is_signed(path: Path) -> bool:
    """Whether a file still has the content that it was written with."""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = _HEADED.match(text)
    return found is not None and found[1] == hashlib.sha256(text[found.end() :].encode()).hexdigest()
