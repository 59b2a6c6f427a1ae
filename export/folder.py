"""A checkpoint in diffusers format: a folder, or a repository of the hub in its cache."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svd_trt.engine.manifest import SourceInfo, sha256_of
from svd_trt.errors import CheckpointError
from svd_trt.export.checkpoint import Checkpoint, Component, describe
from svd_trt.export.file_kinds import refuse_quantised
from svd_trt.export.hub import download
from svd_trt.export.tensor_files import shapes_of, tensors_of, to_weight
from svd_trt.export.weight_files import Weights, find_weights

__all__ = ["FolderCheckpoint", "configurations_of", "find_folder", "open_folder"]

_log = logging.getLogger("svd_trt")

_PIPELINE = "StableVideoDiffusionPipeline"
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
        from svd_trt.export.random_checkpoint import empty_model

        found = {
            name: shape for file in self._files(component) for name, shape in shapes_of(file, pickles=True).items()
        }
        self._compare(component, empty_model(component, self.configurations[component]), found)

    def load(self, component: Component, dtype: Any) -> Any:
        """See `Checkpoint.load`."""
        from svd_trt.export.random_checkpoint import empty_model, parameters_of

        model = empty_model(component, self.configurations[component])
        tensors = {name: tensor for file in self._files(component) for name, tensor in tensors_of(file).items()}
        self._compare(component, model, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        for module, name, full in list(parameters_of(model)):
            setattr(module, name, to_weight(tensors[full], dtype, f"{self.path / component}: {full}"))
        return model

    def _files(self, component: Component) -> list[Path]:
        """The component's files that hold tensors."""
        names = self.source.files[component]
        return [self.path / name for name in names if not name.endswith(".json")]

    def _compare(self, component: Component, model: Any, found: Mapping[str, tuple[int, ...]]) -> None:
        from svd_trt.export.random_checkpoint import parameters_of

        wanted = {full: tuple(getattr(module, name).shape) for module, name, full in parameters_of(model)}
        if missing := sorted(wanted.keys() - found.keys()):
            raise CheckpointError(
                f"{self.path / component} lacks {len(missing)} weights that SVD has, {missing[0]} among them"
            )
        for name, shape in wanted.items():
            if found[name] != shape:
                raise CheckpointError(
                    f"{self.path / component}: {name} is {list(found[name])}, and its config.json has {list(shape)}"
                )


def open_folder(path: Path, variant: str | None, *, name: str, commit: str | None) -> FolderCheckpoint:
    """Check the folder ``path`` and hash its weights; ``name`` and ``commit`` go into the manifest.

    Which variant each component has is logged if they differ.

    Raises:
        CheckpointError: it is not SVD, is incomplete, or has a scheduler that is not supported.
    """
    _check_pipeline(path)
    configurations = configurations_of(path)
    weights = find_weights(path, variant)
    parameters = {component: _count(path / component, found) for component, found in weights.items()}
    description = describe(str(path), configurations)
    _tell_mixture(path, weights)
    return FolderCheckpoint(
        description=description,
        source=SourceInfo(
            model=name,
            commit=commit,
            # Not what was found in one component: in others, that variant may be other weights.
            variant=variant,
            digests={component: _digest(path / component, found) for component, found in weights.items()},
            files={c: tuple(f"{c}/{file}" for file in found.files) for c, found in weights.items()},
        ),
        parameters=parameters,
        configurations=configurations,
        folder=str(path),
    )


def configurations_of(path: Path) -> dict[str, dict[str, Any]]:
    """The configurations in the folder ``path``, by component.

    The scheduler's ``_class_name`` is the one in ``model_index.json``, if there is one, because diffusers goes by that.

    Raises:
        CheckpointError: one is missing, or cannot be read.
    """
    found = {component: _config(path, name) for component, name in _CONFIGURATIONS.items()}
    if (path / "model_index.json").exists():
        entry = _config(path, "model_index.json").get("scheduler")
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str):
            found["scheduler"]["_class_name"] = entry[1]
    return found


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
    return download(model, revision, variant, local_files_only)


def _config(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((path / name).read_bytes())  # bytes may begin with a byte order mark
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} lacks {name}, which a diffusers checkpoint of SVD has; copy it from the checkpoint that this one "
            "was made from"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / name} cannot be read: {error}; copy or download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path / name} is not a configuration: it holds no JSON object")
    return content


def _check_pipeline(path: Path) -> None:
    if not (path / "model_index.json").exists():
        raise CheckpointError(
            f"{path} has no model_index.json, so it is not a checkpoint in diffusers format{_hint(path)}"
        )
    kind = _config(path, "model_index.json").get("_class_name")
    if kind != _PIPELINE:
        raise CheckpointError(
            f"{path} holds a {kind}; svd-trt builds {_PIPELINE} only; if its networks are those of SVD, set that as "
            "_class_name in model_index.json"
        )


def _hint(path: Path) -> str:
    """What to do with a folder that is something else."""
    if (path / "config.json").exists():
        kind = _config(path, "config.json").get("_class_name", "a model")
        return (
            f" but {kind} alone; copy the folder of the checkpoint that it belongs to, replace the files of unet/, "
            "vae/ or image_encoder/ there by these, and build that folder"
        )
    if parts := [name for name in ("unet", "vae", "image_encoder") if (path / name / "config.json").exists()]:
        return (
            f" but only {' and '.join(parts)}; copy the folder of the checkpoint that it was trained from, replace "
            f"{' and '.join(f'{name}/' for name in parts)} there, and build that folder"
        )
    if files := sorted(path.glob("*.safetensors")):
        return f"; build one of its files, such as {files[0]}"
    return ""


def _count(folder: Path, weights: Weights) -> int:
    """Number of weights in the files, whose headers are checked."""
    total = 0
    for file in (folder / name for name in weights.files if not name.endswith(".json")):
        shapes = shapes_of(file, pickles=True)
        refuse_quantised(file, shapes)
        total += sum(map(math.prod, shapes.values()))
    return total


def _tell_mixture(path: Path, weights: Mapping[Component, Weights]) -> None:
    if len({found.variant for found in weights.values()}) > 1:
        kinds = ", ".join(
            f"{component}: {found.variant or 'without a variant'}" for component, found in weights.items()
        )
        _log.warning("%s: the components have weights of different variants (%s)", path, kinds)


def _digest(folder: Path, weights: Weights) -> str:
    total = hashlib.sha256()
    for file in (folder / "config.json", *(folder / name for name in weights.files)):
        total.update(f"{file.name}\0{sha256_of(file)}\n".encode())
    return total.hexdigest()
