"""LoRAs in the names of several tools, merged into the miniature's UNet: ``W + scale * alpha / rank * up @ down``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from svd_trt.errors import CheckpointError
from svd_trt.export import changed_checkpoint
from svd_trt.export.checkpoint_kinds import open_checkpoint
from svd_trt.export.folder import configurations_of
from svd_trt.export.stability_names import places_of

MINIATURE = Path(__file__).parents[2] / "examples" / "tiny" / "checkpoint"
RANK = 3
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
# A linear layer, one over time, a 3x3 and a 1x1 convolution, and one over time, of 3x1x1.
MODULES = (
    f"{BLOCK}.attn1.to_q",
    "up_blocks.1.attentions.0.temporal_transformer_blocks.0.ff.net.2",
    "down_blocks.0.resnets.0.spatial_res_block.conv1",
    "up_blocks.0.resnets.0.spatial_res_block.conv_shortcut",
    "mid_block.resnets.1.temporal_res_block.conv2",
)
Tensors = dict[str, torch.Tensor]
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def weights() -> Tensors:
    return {name: weight.detach() for name, weight in load().items()}


@pytest.fixture(scope="module")
def pairs(weights: Tensors) -> Pairs:
    """Down and up of each module: a convolution's first matrix has its kernel, and the second is 1x1."""
    draw = torch.Generator().manual_seed(0)

    def pair(shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        down = torch.randn((RANK, *shape[1:]), generator=draw)
        return down, torch.randn((shape[0], RANK, *(1 for _ in shape[2:])), generator=draw)

    return {module: pair(weights[f"{module}.weight"].shape) for module in MODULES}


def load(*loras: str, dtype: torch.dtype = torch.float32) -> Tensors:
    """All weights of the UNet with these LoRAs."""
    model = open_checkpoint(str(MINIATURE), loras=loras).load("unet", dtype)
    return {name: weight.detach() for name, weight in model.named_parameters()}


def expected(weights: Tensors, pairs: Pairs, factor: float) -> Tensors:
    merged = dict(weights)
    for module, (down, up) in pairs.items():
        change = torch.einsum("or,ri->oi", up.flatten(1).double(), down.flatten(1).double())
        merged[f"{module}.weight"] = (
            weights[f"{module}.weight"].double() + factor * change.reshape(weights[f"{module}.weight"].shape)
        ).float()
    return merged


def assert_merged(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-5)


def save(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> str:
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return str(path)


def named(pairs: Pairs, down: str, up: str, rename: Callable[[str], str] = str) -> Tensors:
    return {
        f"{rename(module)}.{suffix}.weight": tensor
        for module, both in pairs.items()
        for suffix, tensor in zip((down, up), both, strict=True)
    }


def with_alpha(tensors: Tensors, alpha: float) -> Tensors:
    modules = {name.rpartition(".lora_")[0] or name.rpartition(".lora.")[0] for name in tensors}
    return tensors | {f"{module}.alpha": torch.tensor(alpha) for module in modules}


def kohya(module: str) -> str:
    return "lora_unet_" + module.replace(".", "_")


def kohya_original(module: str) -> str:
    """In the names of stabilityai's code, as trainers of single files write them."""
    places = places_of("unet", [f"{m}.weight" for m in MODULES], configurations_of(MINIATURE))
    name = places[f"{module}.weight"].name.removeprefix("model.diffusion_model.").removesuffix(".weight")
    return kohya(name)


def processors(pairs: Pairs) -> Tensors:
    """As diffusers once wrote the attention alone."""
    found = {}
    for module in (f"{BLOCK}.attn1.to_q",):
        owner, _, projection = module.rpartition(".")
        for way, tensor in zip(("down", "up"), pairs[module], strict=True):
            found[f"unet.{owner}.processor.{projection}_lora.{way}.weight"] = tensor
    return found


FORMS: dict[str, tuple[Callable[[Pairs], Tensors], float]] = {
    "peft in diffusers": (lambda p: named(p, "lora_A", "lora_B", "unet.{}".format), 1.0),
    "peft without a prefix": (lambda p: named(p, "lora_A", "lora_B"), 1.0),
    "peft of an adapter": (lambda p: named(p, "lora_A.default", "lora_B.default", "base_model.model.{}".format), 1.0),
    "diffusers of old": (lambda p: named(p, "lora.down", "lora.up", "unet.{}".format), 1.0),
    "diffusers with alpha": (lambda p: with_alpha(named(p, "lora.down", "lora.up", "unet.{}".format), 6.0), 2.0),
    "kohya": (lambda p: with_alpha(named(p, "lora_down", "lora_up", kohya), 1.5), 0.5),
    "kohya in original names": (lambda p: with_alpha(named(p, "lora_down", "lora_up", kohya_original), 1.5), 0.5),
}


@pytest.mark.parametrize("form", FORMS)
def test_names_of_every_tool(form: str, weights: Tensors, pairs: Pairs, tmp_path: Path) -> None:
    make, factor = FORMS[form]
    lora = save(make(pairs), tmp_path / "lora.safetensors")
    assert_merged(load(lora), expected(weights, pairs, factor))


def test_attention_processors_of_old(weights: Tensors, pairs: Pairs, tmp_path: Path) -> None:
    lora = save(processors(pairs), tmp_path / "lora.safetensors")
    module = f"{BLOCK}.attn1.to_q"
    assert_merged(load(lora), expected(weights, {module: pairs[module]}, 1.0))


def test_scales_and_several_loras_add_up(weights: Tensors, pairs: Pairs, tmp_path: Path) -> None:
    tensors = named(pairs, "lora_A", "lora_B")
    one, two = (save(tensors, tmp_path / name) for name in ("one.safetensors", "with:colon.safetensors"))
    assert_merged(load(f"{one}:0.5", f"{two}:-2"), expected(weights, pairs, -1.5))
    assert_merged(load(two), expected(weights, pairs, 1.0))


@pytest.mark.parametrize("place", ["metadata", "file"])
def test_alphas_of_peft_are_in_its_settings(place: str, weights: Tensors, pairs: Pairs, tmp_path: Path) -> None:
    convolution = MODULES[2]
    own = {"lora_alpha": 12, "alpha_pattern": {convolution.removeprefix("down_blocks."): 3}}
    tensors = named(pairs, "lora_A", "lora_B")
    if place == "file":
        lora = save(tensors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(own))
    else:
        settings = json.dumps({f"unet.{name}": value for name, value in own.items()})
        lora = save(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": settings})
    others = {module: pair for module, pair in pairs.items() if module != convolution}
    wanted = expected(expected(weights, others, 4.0), {convolution: pairs[convolution]}, 1.0)
    assert_merged(load(lora), wanted)


def test_the_sum_is_in_fp32_and_rounded_once(weights: Tensors, pairs: Pairs, tmp_path: Path) -> None:
    """Half precision would lose a small change in each of two LoRAs, which together change the last bit."""
    lora = save(named(pairs, "lora_A", "lora_B"), tmp_path / "lora.safetensors")
    module = f"{MODULES[0]}.weight"
    step = 2e-5
    found = load(*[f"{lora}:{step}"] * 4, dtype=torch.float16)[module]
    wanted = expected(weights, pairs, 4 * step)[module].half()
    assert found.dtype == torch.float16
    assert torch.equal(found, wanted)
    rounded = weights[module].half()
    for _ in range(4):
        rounded = (rounded.float() + step * (expected(weights, pairs, 1.0)[module] - weights[module])).half()
    assert not torch.equal(rounded, wanted)


def test_the_digest_has_content_and_scale(pairs: Pairs, tmp_path: Path) -> None:
    lora = save(named(pairs, "lora_A", "lora_B"), tmp_path / "lora.safetensors")

    def digest(*loras: str) -> str:
        return open_checkpoint(str(MINIATURE), loras=loras).source.digests["unet"]

    found = [digest(), digest(lora), digest(f"{lora}:0.5"), digest(lora, lora)]
    assert len(set(found)) == 4
    assert digest(f"{lora}:1") == found[1]
    source = open_checkpoint(str(MINIATURE), loras=[f"{lora}:0.5"]).source
    assert [(one.model, one.scale, one.path) for one in source.loras] == [("lora.safetensors", 0.5, lora)]


def test_text_encoders_are_left_out_and_said(
    weights: Tensors, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())}
    lora = save(named(pairs, "lora_down", "lora_up", kohya) | text, tmp_path / "lora.safetensors")
    said: list[str] = []
    monkeypatch.setattr(changed_checkpoint._log, "warning", lambda form, *values: said.append(form % values))
    assert_merged(load(lora), expected(weights, pairs, 1.0))
    assert said == [
        "lora.safetensors: 1 tensors of text encoders, such as lora_te_text_model_encoder_layers_0_mlp_fc1.alpha, are "
        "left out: SVD has none"
    ]


def plain(pairs: Pairs) -> Tensors:
    return named(pairs, "lora_A", "lora_B")


BAD: dict[str, tuple[Callable[[Pairs], Tensors], str]] = {
    "another model": (
        lambda p: {f"transformer.{name}": tensor for name, tensor in plain(p).items()},
        r"fits nothing in SVD's UNet: it has transformer\..* and so on, and a LoRA has names such as unet",
    ),
    "text alone": (lambda _: {"lora_te_x.lora_down.weight": torch.ones(1)}, "fits nothing .* it has lora_te_x"),
    "a part of another model": (
        lambda p: plain(p) | {"up_blocks.7.conv.lora_A.weight": torch.ones(1)},
        r"1 of its tensors fit nothing in SVD's UNet: up_blocks\.7\.conv\.lora_A\.weight; it was trained on another",
    ),
    "DoRA": (
        lambda p: plain(p) | {f"{MODULES[0]}.lora_magnitude_vector": torch.ones(64)},
        "1 of its tensors fit nothing .*lora_magnitude_vector; .* is more than a LoRA",
    ),
    "half of a pair": (
        lambda p: {name: tensor for name, tensor in plain(p).items() if "conv1.lora_B" not in name},
        r"conv1\.lora_A\.weight lacks its counterpart",
    ),
    "two in one": (
        lambda p: plain(p) | {f"unet.{name}": tensor.clone() for name, tensor in plain(p).items()},
        r"names the same weights twice, as .*lora_A\.weight and as unet\..*lora_A\.weight; .* a file each",
    ),
    "other sizes": (
        lambda p: plain(p) | {f"{MODULES[0]}.lora_A.weight": torch.ones(RANK, 320)},
        r"lora_A\.weight \[3, 320\] and .*\[64, 3\] do not fit .*to_q\.weight, which is \[64, 64\]; .* another model",
    ),
    "other ranks": (
        lambda p: plain(p) | {f"{MODULES[0]}.lora_A.weight": torch.ones(RANK + 1, 64)},
        "do not fit",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(case: str, pairs: Pairs, tmp_path: Path) -> None:
    make, words = BAD[case]
    lora = save(make(pairs), tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(MINIATURE), loras=[lora])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("none.safetensors", "the LoRA .*none.safetensors does not exist"),
        ("none.safetensors:0.5", "the LoRA .*none.safetensors does not exist"),
        ("lora.safetensors:high", "'high' is not a scale; write FILE or FILE:SCALE"),
        ("lora.safetensors:nan", "a scale is from -1000 to 1000"),
        ("lora.safetensors:1e9", "a scale is from -1000 to 1000"),
        ("lora.safetensors:", "'' is not a scale"),
        ("", "is a folder; give the safetensors file in it"),
        ("text.safetensors", "is not a safetensors file, or is damaged"),
    ],
)
def test_files_and_scales_are_checked(text: str, words: str, pairs: Pairs, tmp_path: Path) -> None:
    save(plain(pairs), tmp_path / "lora.safetensors")
    (tmp_path / "text.safetensors").write_text("not weights at all, but text")
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(MINIATURE), loras=[str(tmp_path / text)])


def test_the_root_of_the_rank_is_refused(pairs: Pairs, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lora_alpha": 8, "use_rslora": True}
    lora = save(plain(pairs), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"root of its rank \(use_rslora\)"):
        open_checkpoint(str(MINIATURE), loras=[lora])
