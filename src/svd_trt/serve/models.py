"""The bundles that a server opens, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from svd_trt.engine.spec import Range
from svd_trt.errors import ArgumentError
from svd_trt.runtime.pipeline import VideoPipeline
from svd_trt.runtime.quality_presets import QUALITIES
from svd_trt.serve.limits import Limits, argument_limits

__all__ = ["Open", "model_object", "named_bundles", "open_models"]

Open = Callable[[Path], VideoPipeline]


def named_bundles(bundles: Sequence[Path]) -> dict[str, Path]:
    """Bundles by the names of their folders, or of links to them, in their order; the first is the default.

    Raises:
        ArgumentError: two have the same name.
    """
    named: dict[str, Path] = {}
    for path in bundles:
        name = path.name if path.name not in ("", "..") else path.resolve().name
        if name in named:
            raise ArgumentError(f"{named[name]} and {path} are both named {name}; rename or link one of the folders")
        named[name] = path
    return named


def open_models(bundles: Mapping[str, Path], open_bundle: Open, batch: int = 1) -> dict[str, VideoPipeline]:
    """Open every bundle; if one cannot be opened, close the others.

    Raises:
        SvdTrtError: as `VideoPipeline.open`.
        ArgumentError: a bundle cannot make ``batch`` videos together.
    """
    with ExitStack() as opened:
        pipes = {name: opened.enter_context(open_bundle(path)) for name, path in bundles.items()}
        for name, pipe in pipes.items():
            _require_batch(name, pipe.bundle.manifest.ranges.batch, batch)
        opened.pop_all()
    return pipes


def _require_batch(name: str, span: Range, batch: int) -> None:
    if batch > span.max:
        raise ArgumentError(
            f"--batch {batch} is more than {name} was built for ({span.words} together); "
            f"choose at most {span.max}, or build one with another --batch"
        )


def model_object(name: str, pipe: VideoPipeline, limits: Limits, *, default: bool) -> dict[str, Any]:
    """What ``GET /v1/models`` says of a model."""
    manifest = pipe.bundle.manifest
    return {
        "id": name,
        "object": "model",
        "default_model": default,
        "source": manifest.source.model,
        "precision": manifest.precision,
        "backend": pipe.device.name,
        "limits": argument_limits(manifest, limits),
        "presets": QUALITIES,
    }
