"""Which weight files of a checkpoint in diffusers format are used: by their names, in a folder or on the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

import msgspec

from svd_trt.errors import CheckpointError
from svd_trt.export.checkpoint import Component

__all__ = ["Weights", "choose_weights", "find_component", "find_weights", "names_in"]

_STEMS: dict[Component, dict[str, str]] = {
    "image_encoder": {"safetensors": "model", "bin": "pytorch_model"},
    "unet": {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"},
    "vae": {"safetensors": "diffusion_pytorch_model", "bin": "diffusion_pytorch_model"},
}
_SHARD = r"-\d{5}-of-\d{5}"


class Weights(msgspec.Struct, frozen=True):
    """The weight files of one component, as names in its folder, the index of shards first."""

    files: tuple[str, ...]
    variant: str | None


def names_in(path: Path) -> list[str]:
    """Names of the files in the components' folders, relative to the checkpoint ``path`` and written with ``/``."""
    return sorted(f"{c}/{p.name}" for c in _STEMS for p in (path / c).glob("*") if not p.name.startswith("."))


def choose_weights(where: str, names: Collection[str], variant: str | None) -> dict[Component, Weights]:
    """The weight files of each component, as diffusers chooses them.

    With a variant, a component that has none of it has its plain weights used. Without one, the plain weights are
    used, or the only variant that a component has, which diffusers does not do. Safetensors come before ``.bin``.

    Args:
        where: the checkpoint, for messages.
        names: of all its files, as `names_in` gives them.
        variant: such as ``fp16``.

    Raises:
        CheckpointError: a component has no weights that can be used, or none has the variant.
    """
    own: dict[Component, list[str]] = {
        c: [name.removeprefix(f"{c}/") for name in names if name.startswith(f"{c}/")] for c in _STEMS
    }
    if variant and not any(_find(c, own[c], variant) for c in own):
        there = sorted(set().union(*(_variants(c, own[c]) for c in own)))
        which = f"of {', '.join(there)} (see --variant)" if there else "without a variant; leave out --variant"
        raise CheckpointError(f"{where} has no {variant} weights; there are weights {which}")
    return {c: _choose(where, c, own[c], variant) for c in own}


def find_component(where: str, component: Component, names: list[str], variant: str | None) -> Weights:
    """The weight files of one component, as `choose_weights` chooses them, from the ``names`` in its folder."""
    return _choose(where, component, names, variant)


def find_weights(path: Path, variant: str | None) -> dict[Component, Weights]:
    """The weight files of the folder ``path``; of shards, those that their index names.

    Raises:
        CheckpointError: as `choose_weights`, or an index cannot be read, or a shard is missing.
    """
    chosen = choose_weights(str(path), names_in(path), variant)
    return {component: _follow_index(path / component, weights) for component, weights in chosen.items()}


def _choose(where: str, component: Component, names: list[str], variant: str | None) -> Weights:
    for tag in dict.fromkeys((variant, None)):
        if files := _find(component, names, tag):
            return Weights(files, tag)
    variants = _variants(component, names)
    if not variant and len(variants) == 1 and (files := _find(component, names, *variants)):
        return Weights(files, *variants)
    if len(variants) > 1:
        raise CheckpointError(
            f"{where}/{component} has weights of {', '.join(sorted(variants))}; choose one with --variant"
        )
    if any(re.search(_SHARD, name) for name in names):
        raise CheckpointError(
            f"{where}/{component} has shards of weights without their index (*.index.json); download it too"
        )
    others = sorted(name for name in names if name.rpartition(".")[2] not in ("json", "md", "txt"))
    hint = f"there are {', '.join(others)}" if others else "copy or download them"
    wanted = f"{_STEMS[component]['safetensors']}.safetensors"
    raise CheckpointError(f"{where}/{component} has no weights such as {wanted}; {hint}")


def _find(component: Component, names: list[str], tag: str | None) -> tuple[str, ...]:
    """The files of one variant: whole, or an index and every file that may be its shard; empty if there are none."""
    for suffix, stem in _STEMS[component].items():
        infix = f".{tag}" if tag else ""
        # diffusers and transformers once wrote the variant before the number of the shard, and now do so after it.
        shard = re.compile(rf"{stem}({re.escape(infix)}{_SHARD}|{_SHARD}{re.escape(infix)})\.{suffix}")
        indices = (f"{stem}.{suffix}.index{infix}.json", f"{stem}.{suffix}{infix}.index.json")
        index = next((name for name in indices if name in names), None)
        sharded = (index, *sorted(n for n in names if shard.fullmatch(n))) if index else ()
        whole = (f"{stem}{infix}.{suffix}",) if f"{stem}{infix}.{suffix}" in names else ()
        # If both are there, diffusers takes the shards and transformers the whole file.
        if found := (whole or sharded) if component == "image_encoder" else (sharded or whole):
            return found
    return ()


def _variants(component: Component, names: list[str]) -> set[str]:
    """The variants that a component has weights of."""
    found = set()
    for suffix, stem in _STEMS[component].items():
        forms = (rf"\.(\w+)({_SHARD})?", rf"{_SHARD}\.(\w+)")
        for form in forms:
            matches = (re.fullmatch(rf"{stem}{form}\.{suffix}", name) for name in names)
            found |= {match[1] for match in matches if match}
    return found


def _follow_index(folder: Path, weights: Weights) -> Weights:
    index = weights.files[0]
    if not index.endswith(".json"):
        return weights
    try:
        shards = sorted(set(json.loads((folder / index).read_bytes())["weight_map"].values()))
        outside = [name for name in shards if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / index} is not an index of weights ({error}); download it again") from error
    if outside:
        raise CheckpointError(f"{folder / index} names {outside[0]}, which is not a file in its folder")
    missing = [name for name in shards if not (folder / name).exists()]
    if missing or not shards:
        what = f"lacks {missing[0]}, which" if missing else "has no shards that"
        raise CheckpointError(f"{folder} {what} {index} names; download it again")
    return Weights((index, *shards), weights.variant)
