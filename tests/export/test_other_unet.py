"""``svd-trt build --unet``: the miniature with another UNet, from files, folders and the hub's cache."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from svd_trt.errors import CheckpointError
from svd_trt.export import other_unet
from svd_trt.export.checkpoint_kinds import open_checkpoint
from svd_trt.export.folder import configurations_of
from svd_trt.export.stability_names import places_of

MINIATURE = Path(__file__).parents[2] / "examples" / "tiny" / "checkpoint"
PUBLISHED = "model.diffusion_model."
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> Tensors:
    """Of another UNet: twice those of the miniature."""
    own = safetensors.torch.load_file(MINIATURE / "unet" / "diffusion_pytorch_model.safetensors")
    return {name: tensor * 2 for name, tensor in own.items()}


def save(tensors: Tensors, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def bare(tensors: Tensors, folder: Path) -> Path:
    return save(tensors, folder / "AnimateLCM-SVD.safetensors")


def prefixed(tensors: Tensors, folder: Path) -> Path:
    return save({f"module.unet.{name}": tensor for name, tensor in tensors.items()}, folder / "few.safetensors")


def original(tensors: Tensors, folder: Path, prefix: str = "") -> Path:
    places = places_of("unet", list(tensors), configurations_of(MINIATURE))
    renamed = {prefix + places[name].name.removeprefix(PUBLISHED): tensor for name, tensor in tensors.items()}
    return save(renamed, folder / "unet.safetensors")


def whole_file(tensors: Tensors, folder: Path) -> Path:
    """Only its UNet is taken."""
    path = original(tensors, folder, PUBLISHED)
    return save(safetensors.torch.load_file(path) | {"first_stage_model.decoder.x": torch.zeros(1)}, path)


def component(tensors: Tensors, folder: Path) -> Path:
    """As ``unet.save_pretrained`` writes it; a configuration may leave out what has its default."""
    save(tensors, folder / "fine" / "diffusion_pytorch_model.safetensors")
    config = json.loads((MINIATURE / "unet" / "config.json").read_text())
    del config["out_channels"]
    (folder / "fine" / "config.json").write_text(json.dumps(config | {"num_frames": 5, "sample_size": 96}))
    return folder / "fine"


def checkpoint(tensors: Tensors, folder: Path) -> Path:
    component(tensors, folder).rename(folder / "unet")
    (folder / "model_index.json").write_text("{}")
    return folder


LAYOUTS: list[Callable[[Tensors, Path], Path]] = [bare, prefixed, original, whole_file, component, checkpoint]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_are_those_of_the_other_unet(
    layout: Callable[[Tensors, Path], Path], weights: Tensors, tmp_path: Path
) -> None:
    path = layout(weights, tmp_path)
    base, changed = open_checkpoint(str(MINIATURE)), open_checkpoint(str(MINIATURE), unet=str(path))
    changed.check("unet")
    model = changed.load("unet", torch.float32)
    found = dict(model.named_parameters())
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name].float()) for name in weights)
    frames = 5 if path.is_dir() else 8
    assert changed.description.model.num_frames == frames  # as diffusers would take it from the UNet
    assert model.config["num_frames"] == frames
    assert changed.load("vae", torch.float32).config == base.load("vae", torch.float32).config
    source = changed.source
    assert source.unet is not None
    assert source.unet.path == str(path)
    assert source.digests["unet"] != base.source.digests["unet"]
    assert source.digests["vae"] == base.source.digests["vae"]
    assert "unet" not in source.files


def test_the_digest_follows_the_content(weights: Tensors, tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        return open_checkpoint(str(MINIATURE), unet=str(path)).source.digests["unet"]

    one, same = bare(weights, tmp_path), save(weights, tmp_path / "same.safetensors")
    other = save(weights | {"conv_in.bias": torch.zeros(64)}, tmp_path / "other.safetensors")
    assert digest(one) == digest(same) != digest(other)


def cached(weights: Tensors, home: Path, name: str, make: Callable[[Path], object]) -> str:
    """Put a repository into the hub's cache; its commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = home / "hub" / f"models--{name.replace('/', '--')}"
    make(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    return commit


@pytest.mark.parametrize("text", ["someone/few", "someone/few/AnimateLCM-SVD.safetensors"])
def test_a_hub_id_is_found_in_the_cache(
    text: str, weights: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = cached(weights, tmp_path, "someone/few", lambda folder: bare(weights, folder))
    changed = open_checkpoint(str(MINIATURE), unet=text, local_files_only=True)
    assert torch.equal(changed.load("unet", torch.float32).conv_in.weight, weights["conv_in.weight"].float())
    assert changed.source.unet is not None
    assert (changed.source.unet.model, changed.source.unet.commit) == (text, commit)
    assert changed.source.unet.files == ("AnimateLCM-SVD.safetensors",)


def wider(tensors: Tensors, folder: Path) -> Path:
    return bare(tensors | {"mid_block.attentions.0.norm.weight": torch.ones(128)}, folder)


def lacking(tensors: Tensors, folder: Path) -> Path:
    return bare({n: t for n, t in tensors.items() if n != "conv_out.bias"}, folder)


def with_more(tensors: Tensors, folder: Path) -> Path:
    return bare(tensors | {"pose_net.conv.weight": torch.ones(1)}, folder)


def other_heads(tensors: Tensors, folder: Path) -> Path:
    """The same weights, with which another number of heads computes something else."""
    path = component(tensors, folder)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_attention_heads": [2, 4, 2]}))
    return path


def other_class(tensors: Tensors, folder: Path) -> Path:
    path = component(tensors, folder)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"_class_name": "UNet3DConditionModel"}))
    return path


def a_vae(tensors: Tensors, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return Path(shutil.copy(MINIATURE / "vae" / "diffusion_pytorch_model.safetensors", folder / "vae.safetensors"))


def two_files(tensors: Tensors, folder: Path) -> Path:
    save(tensors, folder / "a.safetensors")
    return save(tensors, folder / "b.safetensors").parent


def cut_off(tensors: Tensors, folder: Path) -> Path:
    path = bare(tensors, folder)
    path.write_bytes(path.read_bytes()[:-100])
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (wider, r"its mid_block\.attentions\.0\.norm\.weight is \[128\], and in the checkpoint \[64\]; give a UNet"),
        (lacking, r"it lacks conv_out\.bias, which is \[4\] in the checkpoint"),
        (with_more, r"has 1 tensors that the checkpoint's UNet lacks, pose_net\.conv\.weight among them"),
        (other_heads, r"num_attention_heads is \[2, 4, 2\], and in the checkpoint \[2, 2, 2\]"),
        (other_class, "is of the class UNet3DConditionModel, and SVD's .* of UNetSpatioTemporalConditionModel; give"),
        (a_vae, r"has no UNet: it lacks conv_in\.weight and input_blocks\.0\.0\.weight, and has decoder\."),
        (two_files, r"has several files, a\.safetensors, b\.safetensors; give one"),
        (lambda _, folder: folder, "has no UNet: neither unet/config.json, config.json nor one safetensors file"),
        (lambda _, folder: folder / "none.safetensors", "there is no file .*none.safetensors"),
        (lambda _, folder: folder / "a" / "b", "there is no UNet at .*, and it is not a hub id"),
        (cut_off, "is cut off .* download or save it again"),
    ],
)
def test_other_architectures_and_damaged_files_are_refused(
    make: Callable[[Tensors, Path], Path], words: str, weights: Tensors, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(MINIATURE), unet=str(make(weights, tmp_path)))


@pytest.mark.parametrize(
    "text", ["few.safetensors", "weights/few.safetensors", "../weights/few.safetensors", "./weights/few.safetensors"]
)
def test_a_wrong_path_is_not_asked_of_the_hub(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_unet, "download_files", None)
    with pytest.raises(CheckpointError, match=f"there is no file {re.escape(text)}; give a file"):
        open_checkpoint(str(MINIATURE), unet=text)


def test_fields_are_compared_before_weights(weights: Tensors, tmp_path: Path) -> None:
    """The first field of a configuration says more than the hundredth tensor."""
    path = other_heads(weights, tmp_path)
    save({"conv_in.weight": torch.zeros(1)}, path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        open_checkpoint(str(MINIATURE), unet=str(path))
