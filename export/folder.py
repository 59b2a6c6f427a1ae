"""A checkpoint in diffusers format: a folder, or a repository of the hub in its cache."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

from svd_trt.engine.manifest import SourceInfo, sha256_of
from svd_trt.errors import CheckpointError, first_line
from svd_trt.export.checkpoint import Checkpoint, Component, describe

__all__ = ["FolderCheckpoint", "configurations_of", "find_folder", "open_folder", "safetensors_shapes"]

_PIPELINE = "StableVideoDiffusionPipeline"
_WEIGHTS: dict[Component, str] = {
    "image_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
_CONFIGURATIONS = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "image_encoder": "image_encoder/config.json",
    "feature_extractor": "feature_extractor/preprocessor_config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class FolderCheckpoint(Checkpoint, frozen=True, kw_only=True, tag="folder"):
    """A checked folder in diffusers format."""

    folder: str

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder)

    def check(self, component: Component) -> None:
        """See `Checkpoint.check`."""
        if component == "image_encoder":
            return  # transformers renames weights of older files itself
        from svd_trt.export.random_checkpoint import empty_model, parameters_of

        model = empty_model(component, self.configurations[component])
        wanted = {full: tuple(getattr(module, name).shape) for module, name, full in parameters_of(model)}
        found = _shapes(_weight_files(self.path, component, self.source.variant))
        self._refuse_missing(component, sorted(wanted.keys() - found.keys()))
        for name, shape in wanted.items():
            if found[name] != shape:
                raise CheckpointError(
                    f"{self.path / component}: {name} is {list(found[name])}, and its config.json has {list(shape)}"
                )

    def load(self, component: Component, dtype: Any) -> Any:
        """See `Checkpoint.load`."""
        from svd_trt.export.silence import silence_libraries

        try:
            with silence_libraries():
                model, info = _model_classes()[component].from_pretrained(
                    self.path,
                    subfolder=component,
                    variant=self.source.variant,
                    local_files_only=True,
                    output_loading_info=True,
                    **({"dtype": dtype} if component == "image_encoder" else {"torch_dtype": dtype}),
                )
        except Exception as error:  # the libraries raise a dozen kinds for a damaged file
            raise CheckpointError(f"{self.path / component} cannot be loaded: {first_line(error)}") from error
        self._refuse_missing(component, sorted(info["missing_keys"]))
        return model

    def _refuse_missing(self, component: Component, missing: list[str]) -> None:
        if missing:
            raise CheckpointError(
                f"{self.path / component} lacks {len(missing)} weights that SVD has, {missing[0]} among them"
            )


def open_folder(path: Path, variant: str | None, *, name: str, commit: str | None) -> FolderCheckpoint:
    """Check the folder ``path`` and hash its weights; ``name`` and ``commit`` go into the manifest.

    Raises:
        CheckpointError: it is not SVD, is incomplete, or has a scheduler that is not supported.
    """
    _check_pipeline(path)
    configurations = configurations_of(path)
    description = describe(str(path), configurations)
    variant = variant or _only_variant(path)
    files = {component: _weight_files(path, component, variant) for component in _WEIGHTS}
    digests: dict[str, str] = {c: _digest(path, c, variant, found) for c, found in files.items()}
    return FolderCheckpoint(
        description=description,
        source=SourceInfo(model=name, commit=commit, variant=variant, digests=digests),
        parameters={c: sum(map(math.prod, _shapes(found).values())) for c, found in files.items()},
        configurations=configurations,
        folder=str(path),
    )


def configurations_of(path: Path) -> dict[str, dict[str, Any]]:
    """The configurations in the folder ``path``, by component.

    Raises:
        CheckpointError: one is missing, or cannot be read.
    """
    return {component: _config(path, name) for component, name in _CONFIGURATIONS.items()}


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a file, from its header alone.

    Raises:
        CheckpointError: the file is not safetensors, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file, or is damaged: {first_line(error)}") from error


def find_folder(
    model: str, revision: str | None, variant: str | None, local_files_only: bool
) -> tuple[Path, str | None]:
    """The checkpoint's directory, and its commit if it came from the hub.

    Raises:
        CheckpointError: there is no such directory, and the hub has no such model or cannot be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path, None
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"there is no checkpoint at {model}, and it is not a hub id such as owner/name")
    return _download(model, revision, variant, local_files_only)


def _shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in all of ``files``, which may have an index among them."""
    weights = [file for file in files if file.suffix == ".safetensors"]
    return {name: shape for file in weights for name, shape in safetensors_shapes(file).items()}


def _model_classes() -> dict[Component, Any]:
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
    from transformers import CLIPVisionModelWithProjection

    return {
        "image_encoder": CLIPVisionModelWithProjection,
        "unet": UNetSpatioTemporalConditionModel,
        "vae": AutoencoderKLTemporalDecoder,
    }


def _download(model: str, revision: str | None, variant: str | None, local_files_only: bool) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    infix = f".{variant}" if variant else ""
    # Without a variant both plain and variant weights match "*.safetensors"; the hub's fp16 ones are left out.
    skip = None if variant else ["*.fp16.safetensors"]
    wanted = ["model_index.json", "*/*.json"] + [f"{c}/{w}*{infix}*.safetensors" for c, w in _WEIGHTS.items()]
    try:
        found = snapshot_download(
            model, revision=revision, allow_patterns=wanted, ignore_patterns=skip, local_files_only=local_files_only
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


def _config(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((path / name).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} lacks {name}, which a diffusers checkpoint of SVD has") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path / name} is not a configuration: it holds no JSON object")
    return content


def _check_pipeline(path: Path) -> None:
    if not (path / "model_index.json").exists():
        raise CheckpointError(f"{path} has no model_index.json, so it is not a checkpoint in diffusers format")
    kind = _config(path, "model_index.json").get("_class_name")
    if kind != _PIPELINE:
        raise CheckpointError(f"{path} holds a {kind}; svd-trt builds {_PIPELINE} only")


def _weight_files(path: Path, component: Component, variant: str | None) -> list[Path]:
    """Weight files of one component and variant, whole or in shards with their index."""
    stem = _WEIGHTS[component]
    tag = f".{variant}" if variant else ""
    shard = re.compile(rf"{stem}({re.escape(tag)})?-\d+-of-\d+({re.escape(tag)})?\.safetensors")
    whole = path / component / f"{stem}{tag}.safetensors"
    if whole.exists():
        return [whole]
    index = sorted((path / component).glob(f"{stem}.safetensors.index{tag}.json"))
    return index + sorted(p for p in (path / component).glob(f"{stem}*.safetensors") if shard.fullmatch(p.name))


def _only_variant(path: Path) -> str | None:
    """None if there are plain weights; else the UNet's only variant, such as fp16."""
    if _weight_files(path, "unet", None):
        return None
    stem = _WEIGHTS["unet"]
    names = (p.name for p in (path / "unet").glob(f"{stem}.*.safetensors"))
    variants = {name.removeprefix(f"{stem}.").removesuffix(".safetensors") for name in names}
    return variants.pop() if len(variants) == 1 else None


def _digest(path: Path, component: Component, variant: str | None, files: list[Path]) -> str:
    if not files:
        what = f"{variant} weights" if variant else "weights (safetensors)"
        others = sorted(p.name for p in (path / component).glob("*.*") if p.suffix in {".safetensors", ".bin"})
        hint = f"; there are {', '.join(others)} (see --variant)" if others else " (see --variant)"
        raise CheckpointError(f"{path / component} has no {what}{hint}")
    total = hashlib.sha256()
    for file in [path / component / "config.json", *files]:
        total.update(f"{file.name}\0{sha256_of(file)}\n".encode())
    return total.hexdigest()
