"""Stability's single files, ``svd.safetensors`` and ``svd_xt.safetensors``, read without converting them first.

The file has the networks under the names of stabilityai's generative-models code. `places_of` gives the tensor of the
file for every weight of diffusers' model; the tensors are read one by one into the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svd_trt.engine.manifest import SourceInfo, sha256_of
from svd_trt.errors import CheckpointError, first_line
from svd_trt.export.checkpoint import COMPONENT_OF, Checkpoint, Component, describe
from svd_trt.export.folder import configurations_of, safetensors_shapes
from svd_trt.export.presets import configurations, find_preset

__all__ = ["Place", "SingleFileCheckpoint", "open_single_file", "places_of"]

_UNET = "model.diffusion_model."
_CLIP = "conditioner.embedders.0.open_clip.model.visual."
# The encoder that conditions on the picture is a VAE of its own in the file; diffusers' VAE has its encoder from
# there and its decoder from the first stage.
_VAE_ENCODER = "conditioner.embedders.3.encoder."
_VAE_DECODER = "first_stage_model."

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_CLIP_REST = {
    "vision_model.embeddings.class_embedding": "class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.pre_layrnorm.weight": "ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "ln_pre.bias",
    "vision_model.post_layernorm.weight": "ln_post.weight",
    "vision_model.post_layernorm.bias": "ln_post.bias",
}
_UNET_REST = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_THIRD = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


@dataclass(frozen=True)
class Place:
    """The tensor of the file that holds a weight; the weight is all of it, one third of it, or its transpose."""

    name: str
    third: int | None = None
    transposed: bool = False


class SingleFileCheckpoint(Checkpoint, frozen=True, kw_only=True, tag="single file"):
    """A checked single file, with the configurations that it is read with."""

    file: str

    def check(self, component: Component) -> None:
        """See `Checkpoint.check`; `open_single_file` has done it for all components."""

    def load(self, component: Component, dtype: Any) -> Any:
        """See `Checkpoint.load`."""
        from safetensors import SafetensorError, safe_open
        from torch import nn

        from svd_trt.export.random_checkpoint import empty_model, parameters_of

        model = empty_model(component, self.configurations[component])
        places = places_of(component, [path for _, _, path in parameters_of(model)], self.configurations)
        try:
            with safe_open(self.file, "pt") as file:
                for module, name, path in parameters_of(model):
                    tensor = _cut(file.get_tensor(places[path].name), places[path])
                    value = tensor.reshape(getattr(module, name).shape).to(dtype)  # 1x1 convolutions are linear here
                    setattr(module, name, nn.Parameter(value, requires_grad=False))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.file} cannot be read: {first_line(error)}") from error
        return model


def open_single_file(path: Path, config: Path | None) -> SingleFileCheckpoint:
    """Check a single file's names and shapes from its header, and hash it.

    Args:
        path: a safetensors file with stabilityai's names.
        config: a folder with configurations in diffusers format; by default those of SVD-XT if the file's name
            has "xt" in it, else of SVD. Both have weights of the same names and shapes and differ in the number of
            frames they were trained for.

    Raises:
        CheckpointError: it is not a safetensors file, or not SVD of these configurations; the message names a weight.
    """
    shapes = safetensors_shapes(path)
    preset = "svd-xt" if "xt" in path.stem.lower() else "svd"
    found = configurations_of(config) if config else configurations(find_preset(preset))
    description = describe(str(config or path), found)
    counts = {c: _check(path, c, shapes, found) for c in dict.fromkeys(COMPONENT_OF.values())}
    content = sha256_of(path)
    digests: dict[str, str] = {
        c: hashlib.sha256(f"{content} {json.dumps(found[c])}".encode()).hexdigest() for c in counts
    }
    return SingleFileCheckpoint(
        description=description,
        source=SourceInfo(model=path.name, commit=None, variant=None, digests=digests),
        parameters=counts,
        configurations=found,
        file=str(path),
    )


def _check(
    path: Path,
    component: Component,
    shapes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, Mapping[str, Any]],
) -> int:
    """Number of weights of one component, after all of them were found.

    Raises:
        CheckpointError: one is missing or has another shape.
    """
    from svd_trt.export.random_checkpoint import empty_model, parameters_of

    model = empty_model(component, dict(found[component]))
    places = places_of(component, [name for _, _, name in parameters_of(model)], found)
    missing = sorted({place.name for place in places.values()} - shapes.keys())
    if missing:
        raise CheckpointError(
            f"{path} is not SVD as stabilityai publishes it: {len(missing)} of {len(places)} weights of the "
            f"{component.replace('_', ' ')} are not there, {missing[0]} among them; for another size of SVD, give its "
            "configurations with --config"
        )
    for module, name, full in parameters_of(model):
        wanted, there = tuple(getattr(module, name).shape), shapes[places[full].name]
        if there not in _shapes_of(wanted, places[full]):
            raise CheckpointError(
                f"{path}: {places[full].name} is {list(there)} and in SVD {list(wanted)}; for another size of SVD, "
                "give its configurations with --config"
            )
    return sum(math.prod(shapes[name]) for name in {place.name for place in places.values()})


def places_of(component: Component, names: list[str], found: Mapping[str, Mapping[str, Any]]) -> dict[str, Place]:
    """The places in the file of the weights that diffusers' model calls ``names``.

    Args:
        component: the model that has them.
        names: the full names of all its parameters.
        found: configurations, by component.

    Raises:
        CheckpointError: a configuration lacks a value.
    """
    try:
        layers, levels = int(found["unet"]["layers_per_block"]), len(found["vae"]["block_out_channels"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"a configuration lacks a value that determines SVD's layout: {error!r}") from error
    # The last layer of an up block is its upsampler, after a resnet or after a resnet and an attention.
    return {name: _place(component, name, layers, levels, _with_attention(names)) for name in names}


def _with_attention(names: list[str]) -> str:
    """The numbers of the up blocks that have attention, as one string of digits."""
    return "".join(sorted({match[1] for name in names if (match := re.match(r"up_blocks\.(\d)\.attentions", name))}))


def _shapes_of(shape: tuple[int, ...], place: Place) -> list[tuple[int, ...]]:
    """Shapes that a weight of ``shape`` may have in the file."""
    if place.third is not None:
        return [(3 * shape[0], *shape[1:])]
    if place.transposed:
        return [shape[::-1]]
    return [shape, (*shape, 1, 1)] if ".attn_1." in place.name and len(shape) == 2 else [shape]


def _cut(tensor: Any, place: Place) -> Any:
    if place.third is not None:
        return tensor.chunk(3)[place.third]
    return tensor.t() if place.transposed else tensor


def _place(component: Component, name: str, layers_per_block: int, levels: int, attentive: str) -> Place:
    if component == "unet":
        return Place(_UNET + _unet_name(name, layers_per_block, attentive))
    if component == "image_encoder":
        return _clip_place(name)
    if name.startswith(("encoder.", "quant_conv.")):
        return Place(_VAE_ENCODER + _vae_name(name, levels))
    return Place(_VAE_DECODER + _vae_name(name, levels))


def _unet_name(name: str, layers: int, attentive: str) -> str:
    stem, _, leaf = name.rpartition(".")
    if stem in _UNET_REST:
        return f"{_UNET_REST[stem]}.{leaf}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, index, rest = match[1], int(match[2]), match[3]
        return f"middle_block.{2 * index if kind == 'resnets' else 1}.{_block_name(kind, rest)}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    assert match is not None, name
    way, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{leaf}"
    if kind == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if str(block) in attentive else 1}.conv.{leaf}"
    index = block * (layers + 1) + layer
    blocks = f"input_blocks.{index + 1}" if way == "down" else f"output_blocks.{index}"
    return f"{blocks}.{0 if kind == 'resnets' else 1}.{_block_name(kind, rest)}"


def _block_name(kind: str, rest: str) -> str:
    """A name inside a resnet or a transformer of the UNet."""
    if kind == "attentions":
        rest = rest.replace("temporal_transformer_blocks", "time_stack")
        return rest.replace("time_pos_embed.linear_1", "time_pos_embed.0").replace(
            "time_pos_embed.linear_2", "time_pos_embed.2"
        )
    part, _, inner = rest.partition(".")
    if part == "time_mixer":
        return rest
    layer, _, leaf = inner.rpartition(".")
    return f"{'time_stack.' if part == 'temporal_res_block' else ''}{_RESNET[layer]}.{leaf}"


def _vae_name(name: str, levels: int) -> str:
    half, _, rest = name.partition(".")
    stem, _, leaf = rest.rpartition(".")
    plain = {"conv_norm_out": "norm_out", "time_conv_out": "conv_out.time_mix_conv"}
    if half == "quant_conv":
        return name
    if "." not in stem:
        return f"{half}.{plain.get(stem, stem)}.{leaf}"
    match = re.fullmatch(r"(mid_block|down_blocks\.(\d+)|up_blocks\.(\d+))\.(\w+)\.(\d+)\.(.*)", rest)
    assert match is not None, name
    where, down, up, kind, index, inner = match.groups()
    if kind == "attentions":
        layer, _, leaf = inner.rpartition(".")
        return f"{half}.mid.attn_1.{_VAE_ATTENTION[layer]}.{leaf}"
    level = f"down.{down}" if down else f"up.{levels - 1 - int(up)}" if up else "mid"
    if kind in ("downsamplers", "upsamplers"):
        return f"{half}.{level}.{kind.removesuffix('rs')}.conv.{leaf}"
    block = f"mid.block_{int(index) + 1}" if where == "mid_block" else f"{level}.block.{index}"
    return f"{half}.{block}.{_vae_resnet_name(inner)}"


def _vae_resnet_name(inner: str) -> str:
    part, _, rest = inner.partition(".")
    if part == "time_mixer":
        return rest
    layer, _, leaf = rest.rpartition(".")
    if part == "temporal_res_block":
        return f"time_stack.{_RESNET[layer]}.{leaf}"
    plain = rest if part == "spatial_res_block" else inner
    return plain.replace("conv_shortcut", "nin_shortcut")


def _clip_place(name: str) -> Place:
    if name in _CLIP_REST:
        return Place(_CLIP + _CLIP_REST[name])
    if name == "visual_projection.weight":
        return Place(f"{_CLIP}proj", transposed=True)
    match = re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name)
    assert match is not None, name
    block = f"{_CLIP}transformer.resblocks.{match[1]}"
    layer, leaf = match[2], match[3]
    if layer in _CLIP_LAYER:
        return Place(f"{block}.{_CLIP_LAYER[layer]}.{leaf}")
    return Place(f"{block}.attn.in_proj_{leaf}", third=_THIRD[layer.removeprefix("self_attn.")])
