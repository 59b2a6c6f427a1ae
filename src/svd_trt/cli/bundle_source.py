"""The checkpoint that a bundle was built from, for commands that need it again."""

from __future__ import annotations

import click

from svd_trt.engine.bundle import Bundle

__all__ = ["findable_changes", "findable_source"]


def findable_source(bundle: Bundle) -> str:
    """The hub id or the random weights that ``bundle`` was built from, which any machine can find.

    Raises:
        UsageError: it was built from a folder or a file.
    """
    source = bundle.manifest.source
    if source.commit is None and not source.model.startswith("random:"):
        raise click.UsageError(
            f"give --model, the path of the checkpoint that {bundle.path} was built from ({source.model})"
        )
    return source.model


def findable_changes(bundle: Bundle) -> tuple[str | None, list[str]]:
    """The values of ``--unet`` and ``--lora`` that ``bundle`` was built with; files are where they were then."""
    source = bundle.manifest.source
    unet = None if source.unet is None else source.unet.path or source.unet.model
    return unet, [f"{lora.path}:{lora.scale:g}" for lora in source.loras]
