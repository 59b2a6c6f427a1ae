"""The bundles that svd-trt's contenders run: found where an earlier run left them, else built."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

import svd_trt.engine
import svd_trt.export
from svd_trt.benchmarks.contenders import BundleKind
from svd_trt.benchmarks.schema import Subject
from svd_trt.engine.bundle import Bundle
from svd_trt.engine.spec import Range
from svd_trt.errors import OutputError

__all__ = ["Bundles"]

_OPTIONS: dict[BundleKind, dict[str, Any]] = {
    "default": {"backend": "onnxruntime"},
    "portable": {"backend": "onnxruntime", "operators": "onnx"},
    "plain": {"backend": "onnxruntime", "rewrites": False},
    "tensorrt": {"backend": "tensorrt"},
    "tensorrt-plain": {"backend": "tensorrt", "rewrites": False},
    "tensorrt-rtx-plain": {"backend": "tensorrt-rtx", "rewrites": False},
    "tensorrt-rtx": {"backend": "tensorrt-rtx"},
}


class _Built(msgspec.Struct, frozen=True):
    """How a bundle was built, kept beside it: the next run uses the bundle again if it would be built alike."""

    sources: str
    seconds: float | None


@dataclass
class Bundles:
    """Bundles of one model and precision, for one size or a range of them.

    Attributes:
        subject: model, precision, sizes.
        folder: where they are kept.
        given: a bundle to use instead of the one with its kind of engines, or of the default one where it has none.
        progress: told of the kind that is built.
        sizes: heights and widths; None is the subject's alone.
    """

    subject: Subject
    folder: Path
    given: Path | None
    progress: Callable[[str], None]
    sizes: tuple[Range, Range] | None = None

    def get(self, kind: BundleKind) -> tuple[Path, float | None]:
        """The bundle and the seconds that it once took to build; None where that is not known.

        Raises:
            SvdTrtError: it cannot be built.
        """
        if self.given is not None and kind in _kinds_of(self.given):
            return self.given, None
        from svd_trt.export.build import build_bundle
        from svd_trt.export.options import BuildOptions

        s = self.subject
        height, width = self.sizes or (Range(s.height, s.height, s.height), Range(s.width, s.width, s.width))
        options = BuildOptions(
            height=height,
            width=width,
            frames=Range(2, s.frames, s.frames),
            decode_chunk=Range(1, s.decode_chunk_size, s.frames),
            precision=s.precision,
            **_OPTIONS[kind],
        )
        name = f"{s.model}-{s.precision}-{s.frames}x{height}x{width}-{kind}"
        path = self.folder / "".join(c if c.isalnum() or c in "-." else "-" for c in name)
        record = path.with_suffix(".built.json")
        self.progress(f"build {kind} bundle")
        try:
            before, sources = _read(record), _sources()
            if before is None or before.sources != sources:
                # Made by other code, which what a build compares does not show.
                _remove(path)
                _remove(path.with_name(f".{path.name}.building"))
            started = time.perf_counter()
            result = build_bundle(s.model, path, options)
            seconds: float | None = round(time.perf_counter() - started, 1)
            if result.up_to_date:
                return path, None if before is None else before.seconds
            if any(stage.reused for stage in result.stages):  # the rest of a build that was interrupted, say
                seconds = None
            record.write_bytes(msgspec.json.encode(_Built(sources, seconds)))
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.folder}: {error.strerror}; choose another place with --cache"
            ) from error
        return path, seconds


def _read(record: Path) -> _Built | None:
    try:
        return msgspec.json.decode(record.read_bytes(), type=_Built)
    except (OSError, msgspec.DecodeError):
        return None


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _sources() -> str:
    """Digest of the code that makes bundles: two versions of it, compared, must not measure one's bundle twice."""
    digest = hashlib.sha256()
    for package in (svd_trt.export, svd_trt.engine):
        for path in sorted(Path(package.__file__ or "").parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _kinds_of(path: Path) -> tuple[BundleKind, ...]:
    """What the bundle can stand for: any has ONNX networks, which ONNX Runtime takes."""
    tensorrt = Bundle.open(path, verify=False).manifest.tensorrt
    return ("default",) if tensorrt is None else ("default", tensorrt.name)
