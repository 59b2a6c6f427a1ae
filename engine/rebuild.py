"""The command that builds a bundle again, for messages that advise it."""

from __future__ import annotations

import shlex
from pathlib import Path

from svd_trt.engine.manifest import Manifest

__all__ = ["rebuild_command"]


def rebuild_command(manifest: Manifest, path: Path, *options: str) -> str:
    """The command that builds the bundle at ``path`` again, with ``options`` of ``svd-trt build``.

    A checkpoint that is no longer where it was is called ``MODEL``, and a remark says which one it was.
    """
    source = manifest.source
    model, remark = source.model, ""
    if source.path is not None:
        model = source.path
        if not Path(model).exists():
            model, remark = "MODEL", f" (MODEL was {source.path})"
    words = ["svd-trt", "build", model, "-o", str(path), *options]
    if source.variant is not None:
        words += ["--variant", source.variant]
    return f"`{shlex.join(words)}` with the options of the first build{remark}"
