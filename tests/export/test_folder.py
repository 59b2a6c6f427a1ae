"""Folders in diffusers format, as people have them: the weights that diffusers loads, or a refusal that helps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import StableVideoDiffusionPipeline

from svd_trt.errors import CheckpointError
from svd_trt.export import folder as folder_module
from svd_trt.export import hub
from svd_trt.export.checkpoint import COMPONENT_OF, Component
from svd_trt.export.checkpoint_kinds import open_checkpoint
from svd_trt.export.silence import silence_libraries
from svd_trt.export.weight_files import choose_weights
from tests.export.test_single_file import MINIATURE

COMPONENTS: list[Component] = list(dict.fromkeys(COMPONENT_OF.values()))
STEMS: dict[Component, str] = {
    "image_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
UNET = "unet/diffusion_pytorch_model"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the miniature, in a folder whose name has a dot."""
    return shutil.copytree(MINIATURE, tmp_path / "svd.v1")


def take(folder: Path, component: Component) -> dict[str, Any]:
    """Remove the weights of a component and return them."""
    path = folder / component / f"{STEMS[component]}.safetensors"
    weights = safetensors.torch.load(path.read_bytes())
    path.unlink()
    return weights


def negated(weights: dict[str, Any]) -> dict[str, Any]:
    """Other weights, so that it shows which ones were loaded."""
    return {name: -weight for name, weight in weights.items()}


def save(path: Path, weights: dict[str, Any]) -> None:
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


def save_shards(folder: Path, component: Component, weights: dict[str, Any], form: str, index: str) -> None:
    """Two files named after ``form``, such as ``.fp16{}``, where {} is the number of the shard."""
    names, table = sorted(weights), {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = STEMS[component] + form.format(f"-{number:05d}-of-00002") + ".safetensors"
        save(folder / component / file, {name: weights[name] for name in part})
        table |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": table})
    (folder / component / f"{STEMS[component]}.safetensors.index{index}.json").write_text(text)


def only_the_unet_has_fp16(folder: Path) -> None:
    save(folder / f"{UNET}.fp16.safetensors", negated(take(folder, "unet")))


def the_unet_has_fp16_too(folder: Path) -> None:
    weights = take(folder, "unet")
    save(folder / f"{UNET}.safetensors", weights)
    save(folder / f"{UNET}.fp16.safetensors", negated(weights))


def shards(folder: Path) -> None:
    for component in COMPONENTS:
        save_shards(folder, component, take(folder, component), "{}", "")


def shards_of_fp16(folder: Path) -> None:
    for component in COMPONENTS:
        save_shards(folder, component, negated(take(folder, component)), "{}.fp16", ".fp16")


def shards_of_fp16_in_old_names(folder: Path) -> None:
    save_shards(folder, "unet", negated(take(folder, "unet")), ".fp16{}", ".fp16")


def shards_of_an_earlier_save(folder: Path) -> None:
    """diffusers goes by the index of the UNet, and transformers by the whole file of the image encoder."""
    for component in ("unet", "image_encoder"):
        weights = take(folder, component)
        save_shards(folder, component, negated(weights), "{}", "")
        save(folder / component / f"{STEMS[component]}.safetensors", weights)
        save(folder / component / f"{STEMS[component]}-00003-of-00003.safetensors", {"left": torch.zeros(1)})


def pickles(folder: Path) -> None:
    for component in COMPONENTS:
        name = "pytorch_model.bin" if component == "image_encoder" else "diffusion_pytorch_model.bin"
        torch.save(negated(take(folder, component)), folder / component / name)


def an_old_pickle(folder: Path) -> None:
    torch.save(negated(take(folder, "unet")), folder / f"{UNET}.bin", _use_new_zipfile_serialization=False)


def a_pickle_of_fp16(folder: Path) -> None:
    torch.save(negated(take(folder, "vae")), folder / "vae" / "diffusion_pytorch_model.fp16.bin")


def other_types(folder: Path) -> None:
    weights = take(folder, "unet")
    save(folder / f"{UNET}.safetensors", {name: w.to(torch.bfloat16) for name, w in weights.items()})
    weights = take(folder, "vae")
    save(folder / "vae" / "diffusion_pytorch_model.safetensors", {name: w.double() for name, w in weights.items()})


def more_tensors(folder: Path) -> None:
    """As diffusers' EMA models are saved."""
    weights = take(folder, "unet")
    save(folder / f"{UNET}.safetensors", weights | {"decay": torch.tensor(0.9), "optimization_step": torch.tensor(7)})


@pytest.mark.parametrize(
    ("make", "variant"),
    [
        (only_the_unet_has_fp16, "fp16"),
        (the_unet_has_fp16_too, "fp16"),
        (the_unet_has_fp16_too, None),
        (shards, None),
        (shards_of_fp16, "fp16"),
        (shards_of_fp16_in_old_names, "fp16"),
        (shards_of_an_earlier_save, None),
        (pickles, None),
        (an_old_pickle, None),
        (a_pickle_of_fp16, "fp16"),
        (other_types, None),
        (more_tensors, None),
    ],
)
def test_weights_are_those_that_diffusers_loads(
    make: Callable[[Path], None], variant: str | None, checkpoint: Path
) -> None:
    """To the bit, in half precision, as most bundles have them."""
    make(checkpoint)
    with silence_libraries():  # of old names and of mixtures, which are the point here
        theirs = StableVideoDiffusionPipeline.from_pretrained(checkpoint, variant=variant, dtype=torch.float16)
    ours = open_checkpoint(str(checkpoint), variant=variant)
    for component in COMPONENTS:
        ours.check(component)
        found = ours.load(component, torch.float16).state_dict()
        wanted = getattr(theirs, component).state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), component


def test_the_source_says_what_was_used(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = list[str]()
    monkeypatch.setattr(folder_module._log, "warning", lambda text, *values: messages.append(text % values))
    plain = open_checkpoint(str(checkpoint)).source
    assert (plain.variant, messages) == (None, [])
    only_the_unet_has_fp16(checkpoint)
    for variant in (None, "fp16"):
        source = open_checkpoint(str(checkpoint), variant=variant).source
        assert source.variant == variant  # which of them was found is in the names of the files
        assert source.files["unet"] == ("unet/diffusion_pytorch_model.fp16.safetensors",)
        assert source.files["vae"] == ("vae/diffusion_pytorch_model.safetensors",)
        assert source.digests["vae"] == plain.digests["vae"]
        assert "(image_encoder: without a variant, unet: fp16, vae: without a variant)" in messages.pop()
    sharded = shutil.copytree(MINIATURE, checkpoint.with_name("shards"))
    shards(sharded)
    files = open_checkpoint(str(sharded)).source.files["image_encoder"]
    assert files[0] == "image_encoder/model.safetensors.index.json"
    assert len(files) == 3


def names(**components: list[str]) -> list[str]:
    plain = {component: [f"{stem}.safetensors"] for component, stem in STEMS.items()}
    return [f"{component}/{name}" for component, own in (plain | components).items() for name in own]


@pytest.mark.parametrize(
    ("unet", "variant", "words"),
    [
        (["diffusion_pytorch_model.fp16.safetensors"], "bf16", "has no bf16 weights; there are weights of fp16"),
        (["diffusion_pytorch_model.safetensors"], "fp16", "has no fp16 weights.*leave out --variant"),
        (
            ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model-00001-of-00002.bf16.safetensors"],
            None,
            "unet has weights of bf16, fp16; choose one with --variant",
        ),
        (["diffusion_pytorch_model-00001-of-00002.safetensors"], None, "shards of weights without their index"),
        (["config.json"], None, "unet has no weights such as diffusion_pytorch_model.safetensors; copy or download"),
        (["diffusion_flax_model.msgpack"], None, "there are diffusion_flax_model.msgpack"),
    ],
)
def test_weights_that_cannot_be_chosen(unet: list[str], variant: str | None, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        choose_weights("someone/svd", names(unet=unet), variant)


def test_what_is_downloaded_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the weights that will be used."""
    unets = ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"]
    listed = ["model_index.json", "svd.safetensors", "unet/config.json", *names(unet=unets)]
    asked: dict[str, Any] = {}

    def pretend(model: str, **options: Any) -> str:
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", pretend)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: listed)
    assert hub.download("someone/svd", None, "fp16", local_files_only=False) == (tmp_path, tmp_path.name)
    assert sorted(asked["allow_patterns"]) == [
        "*/*.json",
        "image_encoder/model.safetensors",
        "model_index.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    hub.download("someone/svd", None, None, local_files_only=False)
    assert "unet/diffusion_pytorch_model.safetensors" in asked["allow_patterns"]
    assert "unet/diffusion_pytorch_model.fp16.safetensors" not in asked["allow_patterns"]
    hub.download("someone/svd", None, "fp16", local_files_only=True)
    assert (asked["allow_patterns"], asked["local_files_only"]) == (["model_index.json", "*/*.json"], True)
    with pytest.raises(CheckpointError, match="someone/svd has no bf16 weights"):
        hub.download("someone/svd", None, "bf16", local_files_only=False)


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (ConnectionError("no route to host"), "the hub cannot be reached: no route to host"),
        (ValueError("Server error 503"), "could not be downloaded: Server error 503"),
    ],
)
def test_a_hub_that_does_not_list_files(
    failure: Exception, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is downloaded, since it would be every variant; the cache has the model, or the reason is said."""

    def fail(*_: Any, **__: Any) -> None:
        raise failure

    messages = list[str]()
    monkeypatch.setattr(hub._log, "warning", lambda text, *values: messages.append(text % values))
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=words):
        hub.download("someone/svd", None, None, local_files_only=False)
    assert messages == []
    repo = tmp_path / "models--someone--svd"
    shutil.copytree(MINIATURE, repo / "snapshots" / "0123")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123")
    assert hub.download("someone/svd", None, None, local_files_only=False) == (repo / "snapshots" / "0123", "0123")
    assert messages == [f"someone/svd: the hub does not answer ({failure}), so the cache is used"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_left_out(prefix: str, checkpoint: Path) -> None:
    weights = take(checkpoint, "unet")
    save(checkpoint / f"{UNET}.safetensors", {prefix + name: weight for name, weight in weights.items()})
    ours = open_checkpoint(str(checkpoint))
    ours.check("unet")
    found = ours.load("unet", torch.float16).state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


def test_marks_of_windows_editors_are_read(checkpoint: Path) -> None:
    """A byte order mark and CR LF in every JSON file, through to the model."""
    for path in checkpoint.rglob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_text().replace("\n", "\r\n").encode())
    ours, plain = open_checkpoint(str(checkpoint)), open_checkpoint(str(MINIATURE))
    assert ours.description == plain.description
    found, wanted = (c.load("image_encoder", torch.float32).state_dict() for c in (ours, plain))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_scheduler_is_the_pipelines(checkpoint: Path) -> None:
    """diffusers creates the class in model_index.json with the values in the other file, whatever class that names."""
    path = checkpoint / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "DDIMScheduler"}))
    assert open_checkpoint(str(checkpoint)).description == open_checkpoint(str(MINIATURE)).description
    index = json.loads((checkpoint / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"is DDIMScheduler.*EulerDiscreteScheduler in model_index\.json"):
        open_checkpoint(str(checkpoint))


def quantised(folder: Path) -> None:
    weights = take(folder, "unet")
    save(folder / f"{UNET}.safetensors", weights | {"conv_in.SCB": torch.zeros(1)})


def dangling(folder: Path) -> None:
    """As in a hub's cache whose files were removed and whose links were not."""
    take(folder, "unet")
    (folder / f"{UNET}.bin").symlink_to("../../blobs/0123456789abcdef")


def a_folder_of_that_name(folder: Path) -> None:
    take(folder, "unet")
    (folder / f"{UNET}.bin").mkdir()


def another_pipeline(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "MyPipeline"}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (quantised, r"unet/diffusion_pytorch_model\.safetensors is quantised \(it has conv_in\.SCB\).*fp16 or fp32"),
        (another_pipeline, "holds a MyPipeline.*set that as _class_name in model_index.json"),
        (lambda c: shutil.rmtree(c / "feature_extractor"), "lacks feature_extractor/preprocessor_config.json.*copy it"),
        (lambda c: (shards(c), next(c.glob("unet/*2-of*")).unlink()), "lacks .*00002-of-00002.*index.json names"),
        (lambda c: (shards(c), next(c.glob("vae/*index.json")).write_text("[]")), "is not an index of weights"),
        (lambda c: (c / "unet" / "config.json").write_text("[" * 100_000), "config.json cannot be read"),
        (dangling, r"unet/diffusion_pytorch_model\.bin cannot be read: it is a link to a file that is gone; download"),
        (a_folder_of_that_name, r"unet/diffusion_pytorch_model\.bin cannot be read: it is a folder"),
    ],
)
def test_folders_that_are_refused(damage: Callable[[Path], Any], words: str, checkpoint: Path) -> None:
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(checkpoint))


def test_an_index_does_not_lead_out_of_its_folder(checkpoint: Path) -> None:
    shards(checkpoint)
    index = checkpoint / f"{UNET}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../vae/x.safetensors"}}))
    with pytest.raises(CheckpointError, match="not a file in its folder"):
        open_checkpoint(str(checkpoint))


def test_parts_of_checkpoints_say_where_they_belong(checkpoint: Path, tmp_path: Path) -> None:
    """The output folders of a UNet's training: one level up or down from a checkpoint."""
    with pytest.raises(CheckpointError, match="but UNetSpatioTemporalConditionModel alone; copy the folder"):
        open_checkpoint(str(checkpoint / "unet"))
    shutil.copytree(checkpoint / "unet", tmp_path / "output" / "unet")
    with pytest.raises(CheckpointError, match=r"but only unet; copy the folder .* replace unet/ there"):
        open_checkpoint(str(tmp_path / "output"))
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "svd_xt.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"build one of its files, such as .*svd_xt\.safetensors"):
        open_checkpoint(str(tmp_path / "downloads"))
