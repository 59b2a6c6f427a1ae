"""Another UNet for a checkpoint: a file, a folder or a hub id that holds a UNet of the same architecture.

Few-step models and fine-tunes are published like that: AnimateLCM-SVD is one bare file in diffusers' names, others are
the folder ``unet/`` alone, or a UNet in the names of stabilityai's code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec

from svd_trt.engine.manifest import UnetInfo
from svd_trt.errors import CheckpointError
from svd_trt.export.file_kinds import refuse_quantised
from svd_trt.export.hub import download_files
from svd_trt.export.stability_names import places_of
from svd_trt.export.tensor_files import shapes_of, tensors_of, to_weight
from svd_trt.export.weight_files import find_component
from svd_trt.units import shorten

__all__ = ["OtherUnet", "find_unet", "original_modules"]

# The second part of an id is no file, so that a wrong path is not asked of the hub.
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.safetensors)(/[\w./-]+\.safetensors)?")
# How files begin the names of a UNet; diffusers' first layer is conv_in, and generative-models' is input_blocks.0.0.
_DIFFUSERS = ("", "unet.")
_STABILITY = ("model.diffusion_model.", "diffusion_model.", "", "model_ema.diffusion_model.")
_PUBLISHED = "model.diffusion_model."
# Of a configuration: what does not change the weights' names or shapes, nor what is computed with them.
_FREE = ("num_frames", "sample_size")


class OtherUnet(msgspec.Struct, frozen=True):
    """A UNet whose files were found; its weights are not in memory."""

    where: str
    """For messages."""
    files: tuple[str, ...]
    """That hold tensors."""
    config: dict[str, Any] | None
    """The configuration beside the weights, if there is one."""

    def check(self, configurations: Mapping[str, Mapping[str, Any]]) -> None:
        """Compare names and shapes with the UNet of a checkpoint's configurations, without loading weights.

        Raises:
            CheckpointError: it is another architecture; the message names the first field or tensor that differs.
        """
        from svd_trt.export.random_checkpoint import empty_model, parameters_of

        model = empty_model("unet", dict(configurations["unet"]))
        if self.config is not None:
            self._compare_fields(dict(cast("Any", model).config))
        wanted = {full: tuple(getattr(module, name).shape) for module, name, full in parameters_of(model)}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in map(Path, self.files):
            shapes |= shapes_of(file, pickles=True)
            refuse_quantised(file, shapes)
        names, prefix = self._names(shapes, wanted, configurations)
        for name, shape in wanted.items():
            place = names[name]
            if place not in shapes:
                raise CheckpointError(self._misfit(f"it lacks {place}, which is {list(shape)} in the checkpoint"))
            if shapes[place] != shape and shapes[place] != (*shape, 1, 1):
                what = f"its {place} is {list(shapes[place])}, and in the checkpoint {list(shape)}"
                raise CheckpointError(self._misfit(what))
        expected = set(names.values())
        if extra := sorted(name for name in shapes if name.startswith(prefix) and name not in expected):
            raise CheckpointError(
                f"{self.where} has {len(extra)} tensors that the checkpoint's UNet lacks, {shorten(extra[0])} among "
                "them, so it is another architecture; give a UNet that was trained from this checkpoint"
            )

    def load(self, configurations: Mapping[str, Mapping[str, Any]], dtype: Any) -> Any:
        """The model with weights of ``dtype`` (a torch dtype).

        Raises:
            CheckpointError: weights are damaged, or are not those of this architecture.
        """
        from svd_trt.export.random_checkpoint import empty_model, parameters_of

        self.check(configurations)
        model = empty_model("unet", dict(configurations["unet"]))
        tensors = {name: tensor for file in self.files for name, tensor in tensors_of(Path(file)).items()}
        places = list(parameters_of(model))
        names, _ = self._names(tensors, dict.fromkeys(full for _, _, full in places), configurations)
        for module, name, full in places:
            value = tensors[names[full]].reshape(getattr(module, name).shape)
            setattr(module, name, to_weight(value, dtype, f"{self.where}: {names[full]}"))
        return model

    def _names(
        self,
        found: Mapping[str, Any],
        wanted: Mapping[str, Any],
        configurations: Mapping[str, Mapping[str, Any]],
    ) -> tuple[dict[str, str], str]:
        """The name in the file of each weight, and how all of them begin."""
        for prefix in _DIFFUSERS:
            if f"{prefix}conv_in.weight" in found:
                return {name: prefix + name for name in wanted}, prefix
        for prefix in _STABILITY:
            if f"{prefix}input_blocks.0.0.weight" in found:
                places = places_of("unet", list(wanted), configurations)
                return {name: prefix + p.name.removeprefix(_PUBLISHED) for name, p in places.items()}, prefix
        raise CheckpointError(
            f"{self.where} has no UNet: it lacks conv_in.weight and input_blocks.0.0.weight, and has "
            f"{shorten(next(iter(sorted(found)), 'no tensors'))}; give the weights of a UNet of Stable Video Diffusion"
        )

    def _compare_fields(self, base: Mapping[str, Any]) -> None:
        """Refuse a configuration that differs from the checkpoint's; fields that one lacks have their defaults."""
        from svd_trt.export.random_checkpoint import empty_model

        assert self.config is not None
        kind = self.config.get("_class_name", "UNetSpatioTemporalConditionModel")
        if kind != "UNetSpatioTemporalConditionModel":
            raise CheckpointError(
                f"{self.where} is of the class {kind}, and SVD's UNet is of UNetSpatioTemporalConditionModel; give a "
                "UNet of Stable Video Diffusion"
            )
        own = dict(cast("Any", empty_model("unet", self.config)).config)
        for name in sorted(base.keys() | own.keys()):
            here, there = (json.dumps(config.get(name)) for config in (own, base))
            if name[0] != "_" and name not in _FREE and here != there:
                raise CheckpointError(
                    self._misfit(f"{name} is {shorten(here)}, and in the checkpoint {shorten(there)}")
                )

    def _misfit(self, what: str) -> str:
        return (
            f"{self.where} has another architecture: {what}; give a UNet that was trained from this checkpoint, or "
            "build the checkpoint that it was trained from"
        )


def original_modules(configurations: Mapping[str, Mapping[str, Any]], names: list[str]) -> dict[str, str]:
    """The modules of the UNet by their names in stabilityai's code; ``names`` are those of all its weights."""
    places = {name: place.name for name, place in places_of("unet", names, configurations).items()}
    return {p.removeprefix(_PUBLISHED).rpartition(".")[0]: name.rpartition(".")[0] for name, p in places.items()}


def find_unet(text: str, variant: str | None, local_files_only: bool) -> tuple[OtherUnet, UnetInfo]:
    """Find the UNet ``text``: a file, a folder, or a hub id; and what the manifest says of it, without digests.

    Args:
        text: a safetensors file; a folder with ``config.json`` and weights, or with ``unet/``; a hub id such as
            ``owner/name``, or ``owner/name/file.safetensors``, found in the hub's cache or downloaded.
        variant: weights to use, such as ``fp16``, if the folder has them.
        local_files_only: never download.

    Raises:
        CheckpointError: there is no such UNet, or several files could be meant.
    """
    path = Path(text).expanduser()
    if path.exists():
        files, config = _in_folder(path, variant) if path.is_dir() else ((path,), None)
        info = UnetInfo(model=path.resolve().name, commit=None, path=str(path.resolve()), files=_names(files, path))
    else:
        if path.suffix == ".safetensors" and not _HUB_ID.fullmatch(text):
            raise CheckpointError(f"there is no file {text}; give a file, a folder or a hub id such as owner/name")
        if not _HUB_ID.fullmatch(text):
            raise CheckpointError(f"there is no UNet at {text}, and it is not a hub id such as owner/name")
        owner, name, *inner = text.split("/")
        wanted = "/".join(inner)
        folder, commit = download_files(
            f"{owner}/{name}", lambda names: [wanted] if wanted else _choose(text, names, variant), local_files_only
        )
        files, config = ((folder / wanted,), None) if wanted else _in_folder(folder, variant)
        if wanted and not files[0].exists():
            raise CheckpointError(f"{owner}/{name} has no {wanted} in the hub's cache; connect and try again")
        info = UnetInfo(model=text, commit=commit, path=None, files=_names(files, folder))
    return OtherUnet(text, tuple(str(f) for f in files if f.suffix != ".json"), config), info


def _names(files: tuple[Path, ...], root: Path) -> tuple[str, ...]:
    return tuple(file.relative_to(root).as_posix() if file != root else file.name for file in files)


def _choose(where: str, names: list[str], variant: str | None) -> list[str]:
    """Of the files of a repository, those that hold its UNet."""
    for folder in ("unet/", ""):
        inside = [
            name.removeprefix(folder) for name in names if name.startswith(folder) and "/" not in name[len(folder) :]
        ]
        if "config.json" in inside:
            weights = find_component(where, "unet", inside, variant)
            return [f"{folder}{name}" for name in ("config.json", *weights.files)]
    return [_only(where, [name for name in names if name.endswith(".safetensors") and "/" not in name])]


def _in_folder(path: Path, variant: str | None) -> tuple[tuple[Path, ...], dict[str, Any] | None]:
    """The files of a folder that hold its UNet, and its configuration."""
    names = [p.relative_to(path).as_posix() for p in sorted([*path.glob("*"), *path.glob("unet/*")]) if p.is_file()]
    chosen = tuple(path / name for name in _choose(str(path), names, variant))
    if chosen[0].name != "config.json":
        return chosen, None
    try:
        config = json.loads(chosen[0].read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{chosen[0]} cannot be read: {error}; copy or download it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{chosen[0]} is not a configuration: it holds no JSON object")
    return chosen, config


def _only(where: str, files: list[str]) -> str:
    if len(files) > 1:
        raise CheckpointError(f"{where} has several files, {', '.join(files[:6])}; give one: {where}/{files[0]}")
    if not files:
        raise CheckpointError(
            f"{where} has no UNet: neither unet/config.json, config.json nor one safetensors file; give its file"
        )
    return files[0]
