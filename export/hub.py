"""Checkpoints of the Hugging Face hub, downloaded to its cache or found there."""

from __future__ import annotations

from pathlib import Path

from svd_trt.errors import CheckpointError, first_line
from svd_trt.export.weight_files import choose_weights

__all__ = ["download"]

_CONFIGURATIONS = ["model_index.json", "*/*.json"]
_ALL_WEIGHTS = ["*/*.safetensors", "*/*.bin"]


def download(model: str, revision: str | None, variant: str | None, local_files_only: bool) -> tuple[Path, str]:
    """The folder of ``model`` in the hub's cache, and its commit; only the weights that will be used are downloaded.

    Raises:
        CheckpointError: there is no such model, it may not be downloaded, or has no weights that can be used.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    names = None if local_files_only else _names_on_hub(model, revision)
    wanted = _ALL_WEIGHTS if names is None else _wanted(model, names, variant)
    try:
        found = snapshot_download(
            model, revision=revision, allow_patterns=_CONFIGURATIONS + wanted, local_files_only=local_files_only
        )
    except GatedRepoError as error:
        raise CheckpointError(f"{model} is gated: accept its licence on the hub, then run `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{model} has no revision {revision!r}") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{model} is not a folder here, is not in the hub's cache, and could not be downloaded "
            "(offline, or the hub cannot be reached); give a folder, or connect and try again"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"there is no folder {model} here and no model of that name on the hub") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{model} could not be downloaded: {first_line(error)}") from error
    return Path(found), Path(found).name


def _names_on_hub(model: str, revision: str | None) -> list[str] | None:
    """The files of the repository; None if they cannot be listed, of which the download then says the reason."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(model, revision=revision)
    except Exception:  # of the hub, of its HTTP client, or of the system, and the cache may still have the model
        return None


def _wanted(model: str, names: list[str], variant: str | None) -> list[str]:
    """The weight files to download; none if the repository is no checkpoint in diffusers format."""
    if "model_index.json" not in names:
        return []
    chosen = choose_weights(model, names, variant)
    return [f"{component}/{file}" for component, weights in chosen.items() for file in weights.files]
