"""Names of stabilityai's generative-models code for the weights of diffusers' models, in several tools' layouts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from svd_trt.errors import CheckpointError
from svd_trt.export.checkpoint import Component

__all__ = ["Layout", "Place", "layout_of", "places_of", "shapes_in_file", "weight_in"]

_CLIP = "conditioner.embedders.0.open_clip.model.visual."
# The encoder that conditions on the picture is a VAE of its own in the file; diffusers' VAE has its encoder from
# there and its decoder from the first stage.
_VAE_ENCODER = "conditioner.embedders.3.encoder."
_VAE_DECODER = "first_stage_model."
_QUANT_CONV = "quant_conv."

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
class Layout:
    """Where a file has the networks, which depends on the tool that saved it; the defaults are as published."""

    unet: Literal["model", "ema", "ema without dots"] = "model"
    """``ema``: only averaged weights are there, under names with or, as generative-models has them, without dots."""
    vae_encoder: str = _VAE_ENCODER
    """ComfyUI saves one VAE, that of the first stage."""
    quant_conv: bool = True
    """Without it, the VAE encoder's last convolution is its last layer; diffusers' layer after it changes nothing."""
    clip: Literal["open_clip", "transformers"] = "open_clip"
    """The image encoder's names, under the same prefix."""


@dataclass(frozen=True)
class Place:
    """The tensor of the file that holds a weight; the weight is all of it, one third of it, or its transpose."""

    name: str
    third: int | None = None
    transposed: bool = False


def layout_of(names: Collection[str]) -> Layout:
    """The layout of a file with tensors of these names."""

    def have(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    ema = have("model_ema.") and not have("model.diffusion_model.")
    own_encoder = have(_VAE_ENCODER)
    encoder = _VAE_ENCODER if own_encoder else _VAE_DECODER
    return Layout(
        unet="model" if not ema else "ema" if have("model_ema.diffusion_model.") else "ema without dots",
        vae_encoder=encoder,
        quant_conv=own_encoder or have(encoder + _QUANT_CONV),
        clip="transformers" if have(_CLIP + "vision_model.") else "open_clip",
    )


def places_of(
    component: Component,
    names: list[str],
    found: Mapping[str, Mapping[str, Any]],
    layout: Layout = Layout(),
) -> dict[str, Place]:
    """The places in the file of the weights that diffusers' model calls ``names``.

    Args:
        component: the model that has them.
        names: the full names of all its parameters.
        found: configurations, by component.
        layout: of the file; a weight that it does not have is not in the answer.

    Raises:
        CheckpointError: a configuration lacks a value.
    """
    try:
        layers, levels = int(found["unet"]["layers_per_block"]), len(found["vae"]["block_out_channels"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"a configuration lacks a value that determines SVD's layout: {error!r}") from error
    if component == "unet":
        # The last layer of an up block is its upsampler, after a resnet or after a resnet and an attention.
        attentive = _with_attention(names)
        return {name: Place(_unet_prefix(layout, _unet_name(name, layers, attentive))) for name in names}
    if component == "image_encoder":
        return {name: Place(_CLIP + name) if layout.clip == "transformers" else _clip_place(name) for name in names}
    there = [name for name in names if layout.quant_conv or not name.startswith(_QUANT_CONV)]
    return {name: Place(_vae_prefix(layout, name) + _vae_name(name, levels)) for name in there}


def _unet_prefix(layout: Layout, name: str) -> str:
    """The full name of a weight that generative-models' UNet calls ``name``."""
    if layout.unet == "ema without dots":
        return "model_ema." + f"diffusion_model.{name}".replace(".", "")
    return f"{'model_ema' if layout.unet == 'ema' else 'model'}.diffusion_model.{name}"


def _vae_prefix(layout: Layout, name: str) -> str:
    return layout.vae_encoder if name.startswith(("encoder.", _QUANT_CONV)) else _VAE_DECODER


def _with_attention(names: list[str]) -> str:
    """The numbers of the up blocks that have attention, as one string of digits."""
    return "".join(sorted({match[1] for name in names if (match := re.match(r"up_blocks\.(\d)\.attentions", name))}))


def shapes_in_file(shape: tuple[int, ...], place: Place) -> list[tuple[int, ...]]:
    """Shapes that a weight of ``shape`` may have in the file."""
    if place.third is not None:
        return [(3 * shape[0], *shape[1:])]
    if place.transposed:
        return [shape[::-1]]
    return [shape, (*shape, 1, 1)] if ".attn_1." in place.name and len(shape) == 2 else [shape]


def weight_in(tensor: Any, place: Place) -> Any:
    """The weight at ``place`` of the tensor that the file has there."""
    if place.third is not None:
        return tensor.chunk(3)[place.third]
    return tensor.t() if place.transposed else tensor


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
