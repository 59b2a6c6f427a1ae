"""LoRAs for SVD's UNet (arXiv:2106.09685): read from files of several tools, and merged into the weights in fp32.

A LoRA adds ``scale * alpha / rank * up @ down`` to a weight. Tools differ in what they call the two matrices and the
module: diffusers and PEFT write ``unet.down_blocks.0...to_q.lora_A.weight`` (or ``lora.down.weight``), kohya's scripts
``lora_unet_down_blocks_0_..._to_q.lora_down.weight`` beside ``.alpha``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svd_trt.engine.manifest import LoraInfo, sha256_of
from svd_trt.errors import CheckpointError
from svd_trt.export.tensor_files import metadata_of, shapes_of, tensors_of
from svd_trt.units import shorten

__all__ = ["check_lora", "find_lora", "merge_lora"]

_LARGEST_SCALE = 1000.0
_SHOWN = 3

# How the tensors of one module end, in the names of diffusers, PEFT with and without an adapter's name, and kohya.
_DOWN = r"(?:lora_A(?:\.\w+)?|lora\.down|lora_down|(?P<down>to_\w+)_lora\.down)\.weight"
_UP = r"(?:lora_B(?:\.\w+)?|lora\.up|lora_up|(?P<up>to_\w+)_lora\.up)\.weight"
_NAME = re.compile(rf"(?P<module>.+?)\.(?:(?P<a>{_DOWN})|(?P<b>{_UP})|(?P<alpha>alpha))")
_PREFIXES = ("base_model.model.", "unet.", "lora_unet_", "diffusion_model.")
# Of text encoders, which SVD does not have: what they would change is not there.
_HARMLESS = re.compile(r"(base_model\.model\.)?(text_encoder|lora_te)")
_METADATA = "lora_adapter_metadata"

_FIELDS = {"down": "a", "up": "b", "alpha": "alpha"}
"""Fields of `_Module`, and the groups of `_NAME` that are theirs."""


@dataclass
class _Module:
    """The tensors of one module of the UNet, by their names in the file."""

    down: str | None = None
    up: str | None = None
    alpha: str | None = None
    given: list[str] = field(default_factory=list)


def find_lora(text: str) -> LoraInfo:
    """The LoRA that ``FILE`` or ``FILE:SCALE`` names, hashed.

    Raises:
        CheckpointError: there is no such file, or the scale is not a number that is finite and not too large.
    """
    name, scale = text, 1.0
    before, colon, after = text.rpartition(":")
    if colon and not Path(text).expanduser().exists():
        try:
            name, scale = before, float(after)
        except ValueError:
            raise CheckpointError(
                f"there is no LoRA {text}, and {shorten(after)!r} is not a scale; write FILE or FILE:SCALE, "
                "such as motion.safetensors:0.8"
            ) from None
    if not math.isfinite(scale) or abs(scale) > _LARGEST_SCALE:
        raise CheckpointError(f"--lora {text}: a scale is from -1000 to 1000, normally 0 to 1, not {after}")
    path = Path(name).expanduser()
    if not path.is_file():
        what = "is a folder; give the safetensors file in it" if path.is_dir() else "does not exist"
        raise CheckpointError(f"the LoRA {name} {what}")
    shapes_of(path)
    content = f"{sha256_of(path)} {_settings_of(path) or ''}"
    digest = hashlib.sha256(content.encode()).hexdigest()
    return LoraInfo(model=path.name, digest=digest, scale=scale, path=str(path.resolve()))


def check_lora(path: Path, shapes: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str]) -> list[str]:
    """Compare the names and shapes in the file with the UNet's.

    Args:
        path: the file.
        shapes: of the UNet's weights, by their names in diffusers' model.
        aliases: other names of modules, such as the original ones, and which module they name.

    Returns:
        Tensors of text encoders, which are left out.

    Raises:
        CheckpointError: a tensor fits no weight of the UNet, or lacks its counterpart; the message names some.
    """
    found = shapes_of(path)
    modules, harmless = _modules_of(path, found, shapes, aliases)
    for name, module in modules.items():
        if module.down is None or module.up is None:
            raise CheckpointError(
                f"{path}: {module.given[0]} lacks its counterpart, up or down; save or download the LoRA again"
            )
        down, up, weight = found[module.down], found[module.up], shapes[f"{name}.weight"]
        fits = len(down) > 1 and len(up) > 1 and down[0] == up[1] and up[0] == weight[0]
        if not fits or math.prod(up[2:]) != 1 or math.prod(down[1:]) != math.prod(weight[1:]):
            raise CheckpointError(
                f"{path}: {module.down} {list(down)} and {module.up} {list(up)} do not fit {name}.weight, which is "
                f"{list(weight)}; the LoRA was trained on another model"
            )
    _alphas(path)
    return harmless


def merge_lora(model: Any, lora: LoraInfo, aliases: Mapping[str, str]) -> None:
    """Add the LoRA to the weights of ``model``, a UNet in fp32.

    Raises:
        CheckpointError: as `check_lora`.
    """
    import torch
    from torch import nn

    path, weights = Path(str(lora.path)), dict(model.named_parameters())
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    check_lora(path, shapes, aliases)
    tensors = tensors_of(path)
    modules, _ = _modules_of(path, tensors, shapes, aliases)
    known = _alphas(path)
    for name, module in modules.items():
        down, up = (tensors[str(one)].float() for one in (module.down, module.up))
        rank = down.shape[0]
        alpha = float(tensors[module.alpha]) if module.alpha else known(name, rank)
        weight = weights[f"{name}.weight"]
        change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
        owner = model.get_submodule(name)
        owner.weight = nn.Parameter(torch.add(weight, change, alpha=lora.scale * alpha / rank), requires_grad=False)


def _modules_of(
    path: Path, names: Collection[str], weights: Collection[str], aliases: Mapping[str, str]
) -> tuple[dict[str, _Module], list[str]]:
    """The tensors by the UNet's modules that they belong to, and those of text encoders."""
    known = {name.removesuffix(".weight"): name.removesuffix(".weight") for name in weights if name.endswith(".weight")}
    known |= {alias: module for alias, module in aliases.items() if module in known}
    # kohya's scripts write an underscore for every dot.
    known |= {name.replace(".", "_"): module for name, module in known.items()}
    modules: dict[str, _Module] = {}
    harmless: list[str] = []
    unknown: list[str] = []
    for name in sorted(names):
        if _HARMLESS.match(name):
            harmless.append(name)
            continue
        match = _NAME.fullmatch(name)
        module = known.get(_module_name(match)) if match else None
        if match is None or module is None:
            unknown.append(name)
            continue
        entry = modules.setdefault(module, _Module())
        entry.given.append(name)
        kind = next(field for field, group in _FIELDS.items() if match[group])
        if (other := getattr(entry, kind)) is not None:
            raise CheckpointError(
                f"{path} names the same weights twice, as {other} and as {name}; it holds two LoRAs, which belong in "
                "a file each"
            )
        setattr(entry, kind, name)
    if not modules or unknown:
        raise CheckpointError(_misfit(path, modules, unknown or harmless))
    return modules, harmless


def _module_name(match: re.Match[str]) -> str:
    """The module's name in diffusers' model, or an alias of it."""
    name = match["module"]
    if projection := match["down"] or match["up"]:  # diffusers' attention processors once held the matrices
        name = f"{name.removesuffix('.processor')}.{'to_out.0' if projection == 'to_out' else projection}"
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name


def _misfit(path: Path, modules: Collection[str], names: list[str]) -> str:
    """What to say of tensors that fit nothing."""
    shown = ", ".join(shorten(name) for name in names[:_SHOWN]) + (" and so on" if len(names) > _SHOWN else "")
    if modules:
        return (
            f"{path}: {len(names)} of its tensors fit nothing in SVD's UNet: {shown}; it was trained on another model, "
            "or is more than a LoRA: merge it with the tool that made it, and give the result with --unet"
        )
    return (
        f"{path} fits nothing in SVD's UNet: it has {shown}, and a LoRA has names such as unet.down_blocks.0."
        "attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight or lora_unet_down_blocks_0_attentions_0_"
        "transformer_blocks_0_attn1_to_q.lora_down.weight; give a LoRA of Stable Video Diffusion"
    )


def _alphas(path: Path) -> Callable[[str, int], float]:
    """A function that gives the alpha of a module without a tensor for it: what PEFT's settings say, or the rank.

    diffusers writes them into the file's metadata, and PEFT into a file beside it.

    Raises:
        CheckpointError: they cannot be read, or scale by the root of the rank.
    """
    settings = _settings_of(path)
    try:
        content = json.loads(settings or "{}")
        values = {name.removeprefix("unet."): value for name, value in content.items()}
        default, own = values.get("lora_alpha"), dict(values.get("alpha_pattern") or {})
        rooted = bool(values.get("use_rslora"))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: PEFT's settings of the LoRA cannot be read: {error}; save it again") from error
    if rooted:
        raise CheckpointError(f"{path} scales by the root of its rank (use_rslora); merge it with PEFT, and use --unet")

    def alpha(module: str, rank: int) -> float:
        found = next((value for name, value in own.items() if module == name or module.endswith(f".{name}")), default)
        return float(rank if found is None else found)

    return alpha


def _settings_of(path: Path) -> str | None:
    """PEFT's settings of the LoRA as JSON."""
    beside = path.with_name("adapter_config.json")
    if path.stem == "adapter_model" and beside.is_file():
        return beside.read_text("utf-8", "replace")
    return metadata_of(path).get(_METADATA)
