"""The kinds of checkpoints that can be exported, and `open_checkpoint`, which finds the kind.

A kind is a `svd_trt.export.checkpoint.Checkpoint` in a module of its own: a folder or hub id in diffusers format
(``folder.py``), a single file as Stability publishes it (``single_file.py``), and random weights, ``random:svd-xt``
(``random_source.py``). Any of them may have another UNet or LoRAs (``changed_checkpoint.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from svd_trt.errors import CheckpointError
from svd_trt.export.changed_checkpoint import ChangedCheckpoint, change_unet
from svd_trt.export.folder import FolderCheckpoint, find_folder, open_folder
from svd_trt.export.random_source import PREFIX, RandomCheckpoint, open_random
from svd_trt.export.single_file import SingleFileCheckpoint, open_single_file

__all__ = ["AnyCheckpoint", "open_checkpoint"]

_OneSource: TypeAlias = FolderCheckpoint | SingleFileCheckpoint | RandomCheckpoint
AnyCheckpoint: TypeAlias = _OneSource | ChangedCheckpoint


def open_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
    config: str | None = None,
    unet: str | None = None,
    loras: Sequence[str] = (),
) -> AnyCheckpoint:
    """Find ``model`` and check that it is a Stable Video Diffusion that svd-trt can build.

    Args:
        model: a directory in diffusers format; a hub id such as
            ``stabilityai/stable-video-diffusion-img2vid-xt``, downloaded to (or found in) the hub's cache; a single
            file such as ``svd_xt.safetensors``; or ``random:PRESET``, ``random:PRESET@SEED``.
        revision: branch, tag or commit of a hub id.
        variant: weights to use, such as ``fp16``, in the components that have them, and the plain ones in the others;
            by default the plain ones, or the only ones there are.
        local_files_only: never download (as HF_HUB_OFFLINE=1).
        config: for a single file, ``svd`` or ``svd-xt``, the published architectures, or a folder in diffusers format
            with its configurations; by default the published architecture that the file's name or metadata tell.
        unet: another UNet of the same architecture, see `svd_trt.export.other_unet.find_unet`.
        loras: merged into the UNet, ``FILE`` or ``FILE:SCALE`` each.

    Raises:
        CheckpointError: it does not exist, is not SVD, is incomplete, or has a scheduler that is not supported.
        ArgumentError: no such preset.
    """
    base = _open_one(model, revision, variant, local_files_only, config)
    if unet is None and not loras:
        return base
    return change_unet(base, unet, loras, variant=variant, local_files_only=local_files_only)


def _open_one(
    model: str, revision: str | None, variant: str | None, local_files_only: bool, config: str | None
) -> _OneSource:
    """See `open_checkpoint`."""
    if model.startswith(PREFIX):
        _refuse(model, revision=revision, variant=variant, config=config)
        return open_random(model.removeprefix(PREFIX))
    path = Path(model).expanduser()
    if path.is_file():
        _refuse(model, revision=revision, variant=variant)
        return open_single_file(path, config)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"there is no file {model}")
    _refuse(model, config=config)
    folder, commit = find_folder(model, revision, variant, local_files_only)
    return open_folder(folder, variant, name=folder.resolve().name if commit is None else model, commit=commit)


def _refuse(model: str, **options: str | None) -> None:
    """Refuse options that belong to other kinds of checkpoints."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        kind = "a single file" if given[0] == "config" else "a folder or a hub id"
        raise CheckpointError(f"--{given[0]} works only with {kind}, and {model} is something else; leave it out")
