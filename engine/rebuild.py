"""The command that builds a bundle again, for messages that advise it."""

from __future__ import annotations

import shlex
from pathlib import Path

from svd_trt.engine.bundle import Bundle

__all__ = ["rebuild_command"]


def rebuild_command(bundle: Bundle, *options: str) -> str:
    """The command that builds ``bundle`` again from its checkpoint, with ``options`` of ``svd-trt build``.

    A checkpoint that is no longer where it was is called ``MODEL``, and a remark says which one it was.
    """
    source = bundle.manifest.source
    model, remark = source.model, ""
    if source.path is not None:
        model = source.path
        if not Path(model).exists():
            model, remark = "MODEL", f" (MODEL was {source.path})"
    words = ["svd-trt", "build", model, "-o", str(bundle.path), *options]
    if source.variant is not None:
        words += ["--variant", source.variant]
    return f"`{shlex.join(words)}` with the options of the first build{remark}"
