"""Stability's single files: names compared with published ones; the miniature written with them and read back."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import safetensors.torch
import torch

from svd_trt import BuildOptions, VideoPipeline, build_bundle
from svd_trt.errors import CheckpointError
from svd_trt.export import single_file as single_file_module
from svd_trt.export.checkpoint import COMPONENT_OF, Component
from svd_trt.export.checkpoint_kinds import open_checkpoint
from svd_trt.export.file_kinds import is_pickle
from svd_trt.export.folder import configurations_of
from svd_trt.export.presets import PRESETS, configurations
from svd_trt.export.published import guess_architecture
from svd_trt.export.random_checkpoint import empty_model, parameters_of
from svd_trt.export.stability_names import places_of
from svd_trt.export.tensor_files import shapes_of

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


def load(path: Path, **options: Any) -> dict[str, Any]:
    """All weights of a single file of the miniature's size."""
    found = open_checkpoint(str(path), **({"config": str(MINIATURE)} | options))
    return {
        f"{component}/{name}": weight
        for component in COMPONENTS
        for name, weight in found.load(component, torch.float32).named_parameters()
    }


Tensors: TypeAlias = dict[str, Any]
ENCODER = "conditioner.embedders.3.encoder."
UNET = "model.diffusion_model."
VISUAL = "conditioner.embedders.0.open_clip.model.visual."


def one_vae(tensors: Tensors) -> Tensors:
    """The VAE of the first stage with its encoder, as some tools save it; no copy under the conditioner."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(ENCODER)}
    moved = {name.replace(ENCODER, "first_stage_model."): t for name, t in tensors.items() if name.startswith(ENCODER)}
    return kept | moved


def comfy_ui(tensors: Tensors) -> Tensors:
    """One VAE, and the image encoder in transformers' names."""
    weights = safetensors.torch.load_file(MINIATURE / "image_encoder" / "model.safetensors")
    kept = {name: tensor for name, tensor in one_vae(tensors).items() if not name.startswith(VISUAL)}
    return kept | {VISUAL + name: weight for name, weight in weights.items()}


def averaged(tensors: Tensors) -> Tensors:
    return {name.replace(UNET, f"model_ema.{UNET.removeprefix('model.')}"): tensor for name, tensor in tensors.items()}


def averaged_without_dots(tensors: Tensors) -> Tensors:
    """generative-models names the buffers of averaged weights like this."""

    def name_of(name: str) -> str:
        return "model_ema." + name.removeprefix("model.").replace(".", "") if name.startswith(UNET) else name

    return {name_of(name): tensor for name, tensor in tensors.items()}


def wrapped(tensors: Tensors) -> Tensors:
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def averaged_too(tensors: Tensors) -> Tensors:
    """The plain weights count if both are there."""
    return {name: -tensor for name, tensor in averaged(tensors).items() if "model_ema." in name} | tensors


@pytest.mark.parametrize("change", [one_vae, comfy_ui, averaged, averaged_without_dots, averaged_too, wrapped])
def test_layouts_of_other_tools(change: Callable[[Tensors], Tensors], single_file: Path, tmp_path: Path) -> None:
    """To the bit the weights of the folder."""
    other = tmp_path / "svd.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(single_file)), other)
    assert other.read_bytes() != single_file.read_bytes()
    found, wanted = load(other), load(MINIATURE, config=None)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_vae_that_ends_with_its_encoder(single_file: Path, tmp_path: Path) -> None:
    """ComfyUI's own VAE has no layer after the encoder: diffusers' layer there then changes nothing."""
    tensors = comfy_ui(safetensors.torch.load_file(single_file))
    other = tmp_path / "svd.safetensors"
    safetensors.torch.save_file({name: tensor for name, tensor in tensors.items() if "quant_conv" not in name}, other)
    vae = open_checkpoint(str(other), config=str(MINIATURE)).load("vae", torch.float32)
    moments = torch.randn(1, 8, 4, 4)
    assert torch.equal(vae.quant_conv(moments), moments)
    assert torch.equal(vae.encoder.conv_in.weight, load(single_file)["vae/encoder.conv_in.weight"])


@pytest.mark.parametrize(
    ("name", "metadata", "architecture", "reason"),
    [
        ("svd", {}, "svd", "its name has the word svd"),
        ("svd_xt", {}, "svd-xt", "its name has the word xt"),
        ("svd_xt_1_1", {}, "svd-xt", "its name has the word xt"),
        ("SVD-XT", {}, "svd-xt", "its name has the word xt"),
        ("svdxt", {}, "svd-xt", "its name has the word svdxt"),
        ("stable-video-diffusion-img2vid-xt", {}, "svd-xt", "its name has the word xt"),
        ("my svd context", {}, "svd", "its name has the word svd"),
        ("svd texture nextgen", {}, "svd", "its name has the word svd"),
        ("svd", {"modelspec.title": "SVD-XT"}, "svd", "its name has the word svd"),
        ("merge", {"modelspec.title": "Stable Video Diffusion XT 1.1"}, "svd-xt", "metadata (modelspec.title)"),
    ],
)
def test_the_architecture_is_told_by_whole_words(
    name: str, metadata: dict[str, str], architecture: str, reason: str
) -> None:
    found, why = guess_architecture(Path(f"{name}.safetensors"), metadata)
    assert found == architecture
    assert reason in why


@pytest.mark.parametrize("name", ["context", "texture", "nextgen", "model", "xtreme", "stable-video-diffusion-img2vid"])
def test_nothing_is_guessed_if_nothing_tells(name: str) -> None:
    """Nor from what ComfyUI writes into the header of either."""
    metadata = {"modelspec.architecture": "stable-video-diffusion-img2vid-v1", "modelspec.title": "ComfyUI 1", "": "xt"}
    with pytest.raises(CheckpointError, match=r"--config svd or --config svd-xt \(in Python, config=\)"):
        guess_architecture(Path(f"{name}.safetensors"), metadata)


@pytest.mark.parametrize(
    ("name", "config", "frames", "told"),
    [
        ("svd", None, 14, "svd.safetensors is taken for SVD (14 frames) because its name has the word svd; --config"),
        ("svd_xt_1_1", None, 25, "taken for SVD-XT (25 frames) because its name has the word xt; --config svd takes"),
        ("nextgen", "svd-xt", 25, None),
        ("svd_xt", "svd", 14, None),
    ],
)
def test_the_architecture_is_told_or_said(
    name: str, config: str | None, frames: int, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SVD and SVD-XT have the same names and shapes, of 2,254 M weights."""
    messages = list[str]()
    monkeypatch.setattr(single_file_module._log, "warning", lambda text, *values: messages.append(text % values))
    monkeypatch.setattr(single_file_module, "sha256_of", lambda _: "not read, for 2 GB would take seconds")
    write_full_size_header(path := tmp_path / f"{name}.safetensors")
    checkpoint = open_checkpoint(str(path), config=config)
    assert checkpoint.description.model.num_frames == frames
    assert checkpoint.source.config == ("svd-xt" if frames == 25 else "svd")
    assert checkpoint.parameters == PRESETS["svd"].parameters
    assert [told in message for message in messages] == [True] if told else not messages


def test_refusals(single_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="weights of the image encoder are not there"):
        open_checkpoint(str(single_file))  # without --config it is taken for the full size
    with pytest.raises(CheckpointError, match=r"there is no folder svd-xxl; --config takes .*svd or svd-xt"):
        open_checkpoint(str(single_file), config="svd-xxl")
    other = tmp_path / "svd.safetensors"
    safetensors.torch.save_file({"conditioner.x": torch.zeros(4)}, other)
    with pytest.raises(CheckpointError, match="not SVD as stabilityai publishes it"):
        open_checkpoint(str(other))


@pytest.mark.parametrize("change", ["names", "shapes"])
def test_what_is_no_svd_is_not_asked_for_its_architecture(change: str, tmp_path: Path) -> None:
    """The names and shapes of both published ones are the same, so they are checked without an answer."""
    write_full_size_header(path := tmp_path / "nextgen.safetensors")
    with pytest.raises(CheckpointError, match="--config svd or --config svd-xt"):
        open_checkpoint(str(path))
    renamed, turned = (b"label_emb.0.0.weight", b"label_emb.9.0.weight"), (b"[1280, 768]", b"[768, 1280]")
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size)
        file.seek(8)
        file.write(header.replace(*(renamed if change == "names" else turned)))
    words = "not SVD as stabilityai publishes it" if change == "names" else r"is \[768, 1280\] and in SVD \[1280, 768\]"
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(path))


def without_time(tensors: Tensors) -> Tensors:
    """As in the published svd_image_decoder.safetensors."""
    times = ("time_stack", "time_mix_conv", "mix_factor")
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (name.startswith("first_stage_model.decoder.") and any(word in name for word in times))
    }


def weights_of(component: Component) -> Tensors:
    return safetensors.torch.load_file(next((MINIATURE / component).glob("*.safetensors")))


def unet_in_own_names(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name.removeprefix(UNET): tensor for name, tensor in tensors.items() if name.startswith(UNET)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_time, "decoder of pictures.*give the file without image_decoder in its name"),
        (lambda _: weights_of("unet"), r"a UNet alone; build the checkpoint .* --unet .*svd\.safetensors"),
        (lambda _: weights_of("vae"), r"a VAE alone; .*there as vae/diffusion_pytorch_model\.safetensors"),
        (lambda _: weights_of("image_encoder"), r"an image encoder alone; .*there as image_encoder/model\.safetensors"),
        (lambda t: unet_in_own_names(t, ""), "a UNet alone; build .* with --unet"),
        (lambda t: unet_in_own_names(t, UNET), "a UNet alone; build .* with --unet"),
        (lambda t: {n: x for n, x in t.items() if "time_stack" not in n}, "a diffusion model for pictures"),
        (lambda _: {"unet.down.lora_A.weight": torch.zeros(1)}, "is a LoRA and .* with --lora"),
        (lambda t: t | {"scaled_fp8": torch.zeros(1)}, r"is quantised \(it has scaled_fp8\)"),
    ],
)
def test_what_a_file_is_instead(
    change: Callable[[Tensors], Tensors], words: str, single_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by the names in its header, before it is hashed."""
    monkeypatch.setattr(single_file_module, "sha256_of", lambda path: pytest.fail(f"{path} was hashed"))
    other = tmp_path / "svd.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(single_file)), other)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(other), config=str(MINIATURE))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9999999\n"


def pickled(**options: Any) -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": {"conv_in.weight": torch.zeros(9)}, "epoch": 3}, file, **options)
    return file.getvalue()


OLD = {"_use_new_zipfile_serialization": False}


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("svd.safetensors", "x" * 100)
    return file.getvalue()


CONTENTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "is empty; download it again"),
    "pointer": (lambda _: POINTER, "is a pointer of git-lfs and not the weights; run `git lfs pull`"),
    "page": (lambda _: b"\n<!DOCTYPE html><html><body>Log in", "is a web page.*`hf auth login`"),
    "pickle": (lambda _: pickled(), "is a pickle and not safetensors; convert it"),
    "old pickle": (lambda _: pickled(**OLD), "is a pickle and not"),
    "new pickle": (lambda _: pickled(**OLD, pickle_protocol=4), "is a pickle of protocol 4.*save.*safetensors"),
    "zip": (lambda _: zipped(), "is a zip archive and not safetensors; unpack it"),
    "gguf": (lambda _: b"GGUF" + bytes(100), "is a GGUF file"),
    "cut off": (lambda whole: whole[:-1], r"is damaged: it is cut off after [\d,]+ of [\d,]+ bytes"),
    "cut off early": (lambda whole: whole[:5000], "is cut off in its header, after 5"),
    "no tensors": (lambda _: (2).to_bytes(8, "little") + b"{}", "has no tensors; download or save it again"),
    "no offsets": (lambda _: (8).to_bytes(8, "little") + b'{"a":{}}', "or is damaged: .*; download or save it again"),
    "short": (lambda _: b"x", "is not a safetensors file, or is damaged"),
    "noise": (lambda _: bytes(range(256)) * 9, "is not a safetensors file, or is damaged"),
    "nested": (lambda _: (200_000).to_bytes(8, "little") + b'{"a":' + b"[" * 200_000, "not a safetensors file, or is"),
}


@pytest.mark.parametrize("place", ["svd.safetensors", "svd.ckpt", "folder"])
@pytest.mark.parametrize("content", CONTENTS)
def test_files_are_recognised_by_their_content(content: str, place: str, single_file: Path, tmp_path: Path) -> None:
    """Whatever they are called, and in folders too."""
    make, words = CONTENTS[content]
    if place == "folder":
        checkpoint = shutil.copytree(MINIATURE, tmp_path / "svd")
        path = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
        path.write_bytes(make(path.read_bytes()))
    else:
        checkpoint = path = tmp_path / place
        path.write_bytes(make(single_file.read_bytes()))
    with pytest.raises(CheckpointError, match=words) as refused:
        open_checkpoint(str(checkpoint), **({} if place == "folder" else {"config": str(MINIATURE)})).check("vae")
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def run_advice(path: Path, folder: Path) -> None:
    """Run the command in the message that refuses ``path``."""
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(str(path))
    command = str(refused.value).partition("`")[2].rpartition("`")[0]
    subprocess.run(command.replace("python ", f"{sys.executable} ", 1), shell=True, check=True, cwd=folder)


@pytest.mark.parametrize("options", [{}, pytest.param(OLD, marks=pytest.mark.slow)])
def test_the_advice_for_a_pickle_works(options: dict[str, Any], single_file: Path, tmp_path: Path) -> None:
    """And it keeps what has the name already."""
    path = tmp_path / "my svd's.ckpt"
    torch.save({"state_dict": safetensors.torch.load_file(single_file), "epoch": 3}, path, **options)
    wanted = load(single_file)
    results = [tmp_path / f"my svd's{end}.safetensors" for end in ("", "-converted", "-converted-2")]
    for count, result in enumerate(results):
        run_advice(path, tmp_path)
        found = load(result)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert all(earlier.read_bytes() == b"precious" for earlier in results[:count])
        result.write_bytes(b"precious")


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


def test_a_size_that_begins_as_a_pickle_does(tmp_path: Path) -> None:
    """A header of 640 bytes: 0x80 and 2."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(0x280)
    (tmp_path / "model.bin").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert not is_pickle(tmp_path / "model.bin")
    assert shapes_of(tmp_path / "model.bin") == {"a": (1,)}


def test_a_damaged_archive_is_no_pickle(tmp_path: Path) -> None:
    """Names in its directory that are not text, although its flags say so."""
    content = bytearray(pickled())
    at = content.index(b"PK\x01\x02")
    content[at + 8 : at + 10] = (0x800).to_bytes(2, "little")  # names are UTF-8
    content[at + 46] = 0xFF
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(UnicodeDecodeError):
        zipfile.ZipFile(tmp_path / "model.bin")
    assert not is_pickle(tmp_path / "model.bin")
