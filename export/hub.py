"""Checkpoints of the Hugging Face hub, downloaded to its cache or found there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from svd_trt.errors import CheckpointError, first_line
from svd_trt.export.weight_files import choose_weights

__all__ = ["download", "download_files"]

_log = logging.getLogger("svd_trt")

_CONFIGURATIONS = ["model_index.json", "*/*.json"]


def download(model: str, revision: str | None, variant: str | None, local_files_only: bool) -> tuple[Path, str]:
    """The folder of ``model`` in the hub's cache, and its commit; only the weights that will be used are downloaded.

    If the hub does not list the model's files, nothing is downloaded, because nothing tells which weights will be
    used: the model in the cache is taken, and a warning says so.

    Raises:
        CheckpointError: there is no such model, it may not be downloaded, or has no weights that can be used.
    """
    return _download(model, revision, lambda names: _CONFIGURATIONS + _wanted(model, names, variant), local_files_only)


def download_files(model: str, choose: Callable[[list[str]], list[str]], local_files_only: bool) -> tuple[Path, str]:
    """As `download`, but the files that ``choose`` takes from the repository's list.

    Raises:
        CheckpointError: as `download`, or ``choose`` refuses the list.
    """
    return _download(model, None, choose, local_files_only)


def _download(
    model: str, revision: str | None, choose: Callable[[list[str]], list[str]], local_files_only: bool
) -> tuple[Path, str]:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    names, failure = None, None
    if not local_files_only:
        try:
            names = HfApi().list_repo_files(model, revision=revision)
        except Exception as error:  # of the hub, of its HTTP client, or of the system
            failure = error
    # Of a model in the cache, only some weights may ever have been downloaded, and asking for others would refuse it.
    wanted = _CONFIGURATIONS if names is None else choose(names)
    try:
        found = snapshot_download(model, revision=revision, allow_patterns=wanted, local_files_only=names is None)
    except Exception as error:
        reason = failure or error
        raise CheckpointError(_explain(model, revision, reason)) from reason
    if failure is not None and not isinstance(failure, OfflineModeIsEnabled):
        _log.warning("%s: the hub does not answer (%s), so the cache is used", model, first_line(failure))
    return Path(found), Path(found).name


def _explain(model: str, revision: str | None, error: Exception) -> str:
    """Why there is no model, and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return f"{model} is gated: accept its licence on the hub, then run `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"{model} has no revision {revision!r}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no folder {model} here and no model of that name on the hub"
    if isinstance(error, HfHubHTTPError | ValueError):
        return f"{model} could not be downloaded: {first_line(error)}"
    detail = "" if isinstance(error, LocalEntryNotFoundError) else f": {first_line(error)}"
    return (
        f"{model} is not a folder here, is not in the hub's cache, and could not be downloaded (offline, or the hub "
        f"cannot be reached{detail}); give a folder, or connect and try again"
    )


def _wanted(model: str, names: list[str], variant: str | None) -> list[str]:
    """The weight files to download; none if the repository is no checkpoint in diffusers format."""
    if "model_index.json" not in names:
        return []
    chosen = choose_weights(model, names, variant)
    return [f"{component}/{file}" for component, weights in chosen.items() for file in weights.files]
