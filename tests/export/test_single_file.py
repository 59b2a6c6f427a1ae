"""Stability's single files: names compared with published ones; the miniature written with them and read back."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from svd_trt import BuildOptions, VideoPipeline, build_bundle
from svd_trt.errors import CheckpointError
from svd_trt.export.checkpoint import COMPONENT_OF, Component
from svd_trt.export.checkpoint_kinds import open_checkpoint
from svd_trt.export.folder import configurations_of
from svd_trt.export.presets import PRESETS, configurations
from svd_trt.export.random_checkpoint import empty_model, parameters_of
from svd_trt.export.single_file import places_of

MINIATURE = Path(__file__).parents[2] / "examples" / "tiny" / "checkpoint"
COMPONENTS: list[Component] = list(dict.fromkeys(COMPONENT_OF.values()))

# Names in svd_xt.safetensors for weights of diffusers' models, as in the conversions of diffusers
# (scripts/convert_svd_to_diffusers.py) and DiffSynth-Studio (diffsynth/models/svd_*.py).
PUBLISHED: dict[Component, dict[str, str]] = {
    "unet": {
        "time_embedding.linear_2.bias": "time_embed.2.bias",
        "add_embedding.linear_1.weight": "label_emb.0.0.weight",
        "conv_in.weight": "input_blocks.0.0.weight",
        "conv_norm_out.bias": "out.0.bias",
        "conv_out.weight": "out.2.weight",
        "down_blocks.0.resnets.1.spatial_res_block.conv1.weight": "input_blocks.2.0.in_layers.2.weight",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "down_blocks.1.resnets.0.spatial_res_block.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
        "down_blocks.1.resnets.0.temporal_res_block.conv2.bias": "input_blocks.4.0.time_stack.out_layers.3.bias",
        "down_blocks.1.resnets.0.time_mixer.mix_factor": "input_blocks.4.0.time_mixer.mix_factor",
        "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight": (
            "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight"
        ),
        "down_blocks.2.attentions.1.temporal_transformer_blocks.0.ff_in.net.0.proj.weight": (
            "input_blocks.8.1.time_stack.0.ff_in.net.0.proj.weight"
        ),
        "down_blocks.2.attentions.1.time_pos_embed.linear_2.bias": "input_blocks.8.1.time_pos_embed.2.bias",
        "down_blocks.3.resnets.1.spatial_res_block.norm1.weight": "input_blocks.11.0.in_layers.0.weight",
        "mid_block.resnets.1.spatial_res_block.time_emb_proj.bias": "middle_block.2.emb_layers.1.bias",
        "mid_block.attentions.0.proj_in.weight": "middle_block.1.proj_in.weight",
        "up_blocks.0.resnets.2.spatial_res_block.conv2.weight": "output_blocks.2.0.out_layers.3.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.bias": "output_blocks.5.2.conv.bias",
        "up_blocks.3.attentions.2.norm.weight": "output_blocks.11.1.norm.weight",
    },
    "vae": {
        "quant_conv.weight": "conditioner.embedders.3.encoder.quant_conv.weight",
        "encoder.conv_norm_out.weight": "conditioner.embedders.3.encoder.encoder.norm_out.weight",
        "encoder.down_blocks.1.resnets.0.conv_shortcut.bias": (
            "conditioner.embedders.3.encoder.encoder.down.1.block.0.nin_shortcut.bias"
        ),
        "encoder.down_blocks.0.downsamplers.0.conv.weight": (
            "conditioner.embedders.3.encoder.encoder.down.0.downsample.conv.weight"
        ),
        "encoder.mid_block.attentions.0.to_out.0.weight": (
            "conditioner.embedders.3.encoder.encoder.mid.attn_1.proj_out.weight"
        ),
        "encoder.mid_block.resnets.1.conv1.weight": "conditioner.embedders.3.encoder.encoder.mid.block_2.conv1.weight",
        "decoder.time_conv_out.weight": "first_stage_model.decoder.conv_out.time_mix_conv.weight",
        "decoder.conv_out.bias": "first_stage_model.decoder.conv_out.bias",
        "decoder.mid_block.resnets.0.time_mixer.mix_factor": "first_stage_model.decoder.mid.block_1.mix_factor",
        "decoder.mid_block.resnets.0.temporal_res_block.conv1.weight": (
            "first_stage_model.decoder.mid.block_1.time_stack.in_layers.2.weight"
        ),
        "decoder.mid_block.attentions.0.group_norm.bias": "first_stage_model.decoder.mid.attn_1.norm.bias",
        "decoder.up_blocks.3.resnets.0.spatial_res_block.conv_shortcut.weight": (
            "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight"
        ),
        "decoder.up_blocks.0.upsamplers.0.conv.weight": "first_stage_model.decoder.up.3.upsample.conv.weight",
    },
    "image_encoder": {
        "vision_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.pre_layrnorm.bias": "ln_pre.bias",
        "vision_model.encoder.layers.7.mlp.fc1.weight": "transformer.resblocks.7.mlp.c_fc.weight",
        "vision_model.encoder.layers.7.self_attn.k_proj.bias": "transformer.resblocks.7.attn.in_proj_bias",
        "vision_model.encoder.layers.31.self_attn.out_proj.weight": "transformer.resblocks.31.attn.out_proj.weight",
        "visual_projection.weight": "proj",
    },
}
PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "",
    "image_encoder": "conditioner.embedders.0.open_clip.model.visual.",
}


@pytest.mark.parametrize("component", COMPONENTS)
def test_published_names(component: Component) -> None:
    found = configurations(PRESETS["svd-xt"])
    names = [name for _, _, name in parameters_of(empty_model(component, found[component]))]
    places = places_of(component, names, found)
    for ours, theirs in PUBLISHED[component].items():
        assert places[ours].name == PREFIX[component] + theirs
    # Every weight has its own tensor, except for the three of CLIP in one.
    assert len({(place.name, place.third) for place in places.values()}) == len(names)


def write_single_file(folder: Path, path: Path) -> None:
    """The folder's weights with Stability's names and shapes, and with some that diffusers does not use."""
    found = configurations_of(folder)
    tensors: dict[str, Any] = {"first_stage_model.encoder.conv_in.weight": torch.zeros(1)}
    for component in COMPONENTS:
        weights = safetensors.torch.load_file(next((folder / component).glob("*.safetensors")))
        thirds: dict[str, list[Any]] = {}
        for name, place in places_of(component, list(weights), found).items():
            weight = weights[name]
            if place.third is not None:
                thirds.setdefault(place.name, [None] * 3)[place.third] = weight
                continue
            if ".attn_1." in place.name and weight.ndim == 2:
                weight = weight[:, :, None, None]  # 1x1 convolutions there
            tensors[place.name] = (weight.t() if place.transposed else weight).contiguous()
        tensors |= {name: torch.cat(parts) for name, parts in thirds.items()}
    safetensors.torch.save_file(tensors, path)


@pytest.fixture(scope="module")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "svd_mini.safetensors"
    write_single_file(MINIATURE, path)
    return path


@pytest.mark.parametrize("component", COMPONENTS)
def test_weights_are_those_of_the_folder(component: Component, single_file: Path) -> None:
    ours = open_checkpoint(str(single_file), config=str(MINIATURE))
    theirs = open_checkpoint(str(MINIATURE))
    assert ours.description == theirs.description
    assert ours.parameters[component] == theirs.parameters[component]
    found, wanted = (dict(c.load(component, torch.float32).named_parameters()) for c in (ours, theirs))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_the_video_is_that_of_the_folder(single_file: Path, picture_file: Path, cache: Path, tmp_path: Path) -> None:
    """Built from the file, without rewrites and without engines: the frames are those that diffusers makes."""
    from diffusers import StableVideoDiffusionPipeline

    options = BuildOptions(
        height=32,
        width=32,
        frames=4,
        decode_chunk=4,
        precision="fp32",
        backend="onnxruntime",
        rewrites=False,
        config=str(MINIATURE),
        cache=cache,
    )
    build_bundle(single_file, tmp_path / "bundle", options)
    arguments: dict[str, Any] = {"num_frames": 4, "num_inference_steps": 3, "height": 32, "width": 32}
    with VideoPipeline.open(tmp_path / "bundle") as pipe:
        ours = pipe(picture_file, seed=1, output_type="np", **arguments).frames[0]
    reference = StableVideoDiffusionPipeline.from_pretrained(MINIATURE).to(dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    import PIL.Image

    picture = PIL.Image.open(picture_file)
    theirs = reference(picture, generator=torch.Generator().manual_seed(1), output_type="np", **arguments).frames[0]
    assert abs(ours.astype(float) - (theirs * 255).round()).max() <= 1


def test_refusals(single_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="weights of the image encoder are not there"):
        open_checkpoint(str(single_file))  # without --config it is taken for the full size
    other = tmp_path / "sd15.safetensors"
    safetensors.torch.save_file({"model.diffusion_model.out.0.bias": torch.zeros(4)}, other)
    with pytest.raises(CheckpointError, match="not SVD as stabilityai publishes it"):
        open_checkpoint(str(other))
    other.write_bytes(single_file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="not a safetensors file, or is damaged"):
        open_checkpoint(str(other), config=str(MINIATURE))


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("out.2.bias", (9,), r"out\.2\.bias is \[9\] and in SVD \[4\]"),
        ("out.2.weight", None, r"out\.2\.weight is \["),
    ],
)
def test_a_tensor_of_another_shape_is_named(
    name: str, shape: tuple[int, ...] | None, words: str, single_file: Path, tmp_path: Path
) -> None:
    """Found in the header, before anything is loaded, even if the number of elements is right."""
    tensors = safetensors.torch.load_file(single_file)
    key = f"model.diffusion_model.{name}"
    tensors[key] = tensors[key].transpose(0, 1).contiguous() if shape is None else torch.zeros(shape)
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file(tensors, other)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(other), config=str(MINIATURE))


def test_configurations_are_part_of_what_is_built(single_file: Path, tmp_path: Path) -> None:
    """The same file with other configurations is another checkpoint, so a bundle of the first is not up to date."""
    other = shutil.copytree(MINIATURE, tmp_path / "config")
    settings = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps(settings | {"scaling_factor": 0.5}))
    before, after = (open_checkpoint(str(single_file), config=str(c)).source.digests for c in (MINIATURE, other))
    assert before["unet"] == after["unet"]
    assert before["vae"] != after["vae"]


@pytest.mark.parametrize(
    ("component", "changes"),
    [
        ("unet", {"layers_per_block": None}),
        ("unet", {"layers_per_block": "two"}),
        ("unet", {"num_attention_heads": None}),
        ("unet", {"down_block_types": ["Foo"]}),
        ("vae", {"block_out_channels": [16, 16]}),
        ("vae", {"block_out_channels": 7}),
    ],
)
def test_other_configurations_are_refused(
    component: str, changes: dict[str, Any], single_file: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(MINIATURE, tmp_path / "config")
    path = other / component / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    with pytest.raises(CheckpointError):
        open_checkpoint(str(single_file), config=str(other))


def write_full_size_header(path: Path) -> None:
    """A sparse file with the published names and shapes; each weight has one byte, and none takes space on disk."""
    found = configurations(PRESETS["svd"])
    header: dict[str, Any] = {}
    end = 0
    for component in COMPONENTS:
        sizes = {
            n: list(getattr(m, leaf).shape) for m, leaf, n in parameters_of(empty_model(component, found[component]))
        }
        for name, place in places_of(component, list(sizes), found).items():
            shape = sizes[name][::-1] if place.transposed else sizes[name]
            if place.name in header:
                continue
            shape = [3 * shape[0], *shape[1:]] if place.third is not None else shape
            start, end = end, end + math.prod(shape)
            header[place.name] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "frames"), [("svd.safetensors", 14), ("svd_xt_1_1.safetensors", 25)])
def test_frames_follow_the_file_name(name: str, frames: int, tmp_path: Path) -> None:
    """SVD and SVD-XT have the same names and shapes, of 2,254 M weights; only the file name differs."""
    write_full_size_header(tmp_path / name)
    checkpoint = open_checkpoint(str(tmp_path / name))
    assert checkpoint.description.model.num_frames == frames
    assert checkpoint.parameters == PRESETS["svd"].parameters
