"""The command that builds a bundle again, for messages that advise it."""

from __future__ import annotations

import shlex
from pathlib import Path

from svd_trt.engine.manifest import Manifest, TensorRtName

__all__ = ["engine_options", "rebuild_command"]


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
    if source.config is not None:
        words += ["--config", source.config]
    if source.unet is not None:
        words += ["--unet", source.unet.path or source.unet.model]
    for lora in source.loras:
        words += ["--lora", f"{lora.path or lora.model}:{lora.scale:g}"]
    if source.path is None and source.commit is not None:
        words += ["--revision", source.commit]
    others = "other options" if options else "options"
    return f"`{shlex.join(words)}` with the {others} of the first build{remark}"


def engine_options(backend: TensorRtName, gpu: int) -> tuple[str, ...]:
    """Options of ``svd-trt build`` for engines of ``backend`` that run on the GPU with the index ``gpu``.

    TensorRT builds on that GPU, and for it. TensorRT for RTX builds without one, and takes no ``--device``.
    """
    return ("--backend", backend, *(("--device", f"cuda:{gpu}") if backend == "tensorrt" and gpu else ()))
