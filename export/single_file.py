"""Stability's single files, ``svd.safetensors`` and ``svd_xt.safetensors``, read without converting them first.

The file has the networks under the names of stabilityai's generative-models code. `places_of` gives the tensor of the
file for every weight of diffusers' model; the tensors are read one by one into the model. Other tools save the file in
other layouts, which `layout_of` recognises.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svd_trt.engine.manifest import SourceInfo, sha256_of
from svd_trt.errors import CheckpointError
from svd_trt.export.checkpoint import COMPONENT_OF, Checkpoint, Component, describe
from svd_trt.export.file_kinds import refuse_parts_of_svd, refuse_quantised
from svd_trt.export.folder import configurations_of
from svd_trt.export.presets import PRESETS, configurations
from svd_trt.export.published import PUBLISHED, guess_architecture
from svd_trt.export.stability_names import Layout, layout_of, places_of, shapes_in_file, weight_in
from svd_trt.export.tensor_files import metadata_of, shapes_of, tensors_of, to_weight

__all__ = ["SingleFileCheckpoint", "open_single_file"]

_log = logging.getLogger("svd_trt")


class SingleFileCheckpoint(Checkpoint, frozen=True, kw_only=True, tag="single file"):
    """A checked single file, with the configurations that it is read with."""

    file: str

    def check(self, component: Component) -> None:
        """See `Checkpoint.check`; `open_single_file` has done it for all components."""

    def load(self, component: Component, dtype: Any) -> Any:
        """See `Checkpoint.load`."""
        from svd_trt.export.random_checkpoint import empty_model, parameters_of

        model = empty_model(component, self.configurations[component])
        tensors = tensors_of(Path(self.file))
        layout = layout_of(tensors)
        places = places_of(component, [path for _, _, path in parameters_of(model)], self.configurations, layout)
        for module, name, path in list(parameters_of(model)):
            shape = getattr(module, name).shape
            if path in places:
                value = weight_in(tensors[places[path].name], places[path]).reshape(
                    shape
                )  # 1x1 convolutions are linear here
            else:
                value = _identity(shape)
            setattr(module, name, to_weight(value, dtype, f"{self.file}: {path}"))
        return model


def open_single_file(path: Path, config: str | None) -> SingleFileCheckpoint:
    """Check a single file's names and shapes from its header, and hash it.

    Args:
        path: a safetensors file with stabilityai's names.
        config: ``svd`` or ``svd-xt``, the published architectures, or a folder with configurations in diffusers format.
            Both published ones have weights of the same names and shapes and differ in the number of frames they were
            trained for. By default words of the file's name tell, or its metadata, and what they tell is logged.

    Raises:
        CheckpointError: it is not a whole safetensors file, or not SVD of these configurations; the message names a
            weight. Or nothing tells which architecture it has.
    """
    shapes = shapes_of(path)
    refuse_parts_of_svd(path, shapes)
    refuse_quantised(path, shapes)
    layout = layout_of(shapes)
    known = config is None or config in PUBLISHED
    # Names and shapes are those of both: a file that is something else is refused before anyone is asked which it is.
    found = configurations(PRESETS[config or "svd"]) if known else configurations_of(_config_folder(str(config)))
    counts = {c: _check(path, c, shapes, found, layout) for c in dict.fromkeys(COMPONENT_OF.values())}
    reason = ""
    if config is None:
        config, reason = guess_architecture(path, metadata_of(path))
        found = configurations(PRESETS[config])
    description = describe(str(path) if known else config, found)
    content = sha256_of(path)
    digests: dict[str, str] = {
        c: hashlib.sha256(f"{content} {json.dumps(found[c])}".encode()).hexdigest() for c in counts
    }
    _tell(path, config, reason, layout)
    return SingleFileCheckpoint(
        description=description,
        source=SourceInfo(model=path.name, commit=None, variant=None, digests=digests, config=config),
        parameters=counts,
        configurations=found,
        file=str(path),
    )


def _config_folder(config: str) -> Path:
    folder = Path(config).expanduser()
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no folder {config}; --config takes a folder of configurations in diffusers format, or the name "
            f"of a published architecture, {' or '.join(PUBLISHED)}"
        )
    return folder


def _tell(path: Path, config: str, reason: str, layout: Layout) -> None:
    """Log what was assumed about the file."""
    if reason:
        frames = PRESETS[config].num_frames
        other = next(name for name in PUBLISHED if name != config)
        _log.warning(
            "%s is taken for %s (%d frames) because %s; --config %s takes it for the other one",
            path.name,
            config.upper(),
            frames,
            reason,
            other,
        )
    if layout.unet != "model":
        _log.warning("%s has only averaged weights of the UNet (model_ema), which are used", path.name)


def _check(
    path: Path,
    component: Component,
    shapes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, Mapping[str, Any]],
    layout: Layout,
) -> int:
    """Number of weights of one component, after all of them were found.

    Raises:
        CheckpointError: one is missing or has another shape.
    """
    from svd_trt.export.random_checkpoint import empty_model, parameters_of

    model = empty_model(component, dict(found[component]))
    places = places_of(component, [name for _, _, name in parameters_of(model)], found, layout)
    missing = sorted({place.name for place in places.values()} - shapes.keys())
    if missing:
        raise CheckpointError(
            f"{path} is not SVD as stabilityai publishes it: {len(missing)} of {len(places)} weights of the "
            f"{component.replace('_', ' ')} are not there, {missing[0]} among them; for another size of SVD, give its "
            "configurations with --config"
        )
    for module, name, full in parameters_of(model):
        if full not in places:
            continue
        wanted, there = tuple(getattr(module, name).shape), shapes[places[full].name]
        if there not in shapes_in_file(wanted, places[full]):
            raise CheckpointError(
                f"{path}: {places[full].name} is {list(there)} and in SVD {list(wanted)}; for another size of SVD, "
                "give its configurations with --config"
            )
    return sum(math.prod(shapes[name]) for name in {place.name for place in places.values()})


def _identity(shape: Any) -> Any:
    """The weights, or the bias, of a 1x1 convolution that changes nothing."""
    import torch

    return torch.eye(shape[0]).reshape(shape) if len(shape) > 1 else torch.zeros(shape)
