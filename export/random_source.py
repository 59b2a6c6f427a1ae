"""``random:PRESET`` and ``random:PRESET@SEED``: a checkpoint that lies nowhere and is drawn when it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from svd_trt.engine.manifest import SourceInfo
from svd_trt.errors import ArgumentError
from svd_trt.export.checkpoint import COMPONENT_OF, RANDOM, Checkpoint, Component, describe
from svd_trt.export.presets import WEIGHTS_REVISION, Preset, configurations, find_preset

__all__ = ["RandomCheckpoint", "open_random"]


@dataclass(frozen=True)
class RandomCheckpoint(Checkpoint):
    """Random weights at the size of a preset."""

    preset: Preset
    seed: int

    @property
    def configurations(self) -> Mapping[str, Mapping[str, Any]]:
        """See `Checkpoint.configurations`."""
        return configurations(self.preset)

    def check(self, component: Component) -> None:
        """See `Checkpoint.check`; weights that are drawn are never wrong."""

    def load(self, component: Component, dtype: Any) -> Any:
        """See `Checkpoint.load`; never fails."""
        from svd_trt.export.random_checkpoint import random_model

        return random_model(component, self.preset, self.seed, dtype)


def open_random(text: str) -> RandomCheckpoint:
    """``svd-xt`` or ``svd-xt@7``, where 7 is the seed.

    Raises:
        ArgumentError: there is no such preset, or the seed is not a number.
    """
    name, at, digits = text.partition("@")
    preset = find_preset(name)
    if at and not (digits.isdecimal() and int(digits) < 2**63):
        raise ArgumentError(f"{RANDOM}{text}: the seed after @ is a whole number under 2^63, as in {RANDOM}{name}@7")
    seed = int(digits or 0)
    models = configurations(preset)
    components = dict.fromkeys(COMPONENT_OF.values())
    identity = f"{WEIGHTS_REVISION} {preset} {seed}"
    return RandomCheckpoint(
        description=describe(f"{RANDOM}{text}", models),
        source=SourceInfo(
            model=f"{RANDOM}{name}@{seed}",
            commit=None,
            variant=None,
            digests={c: hashlib.sha256(f"{c} {identity}".encode()).hexdigest() for c in components},
        ),
        parameters={component: preset.parameters[component] for component in components},
        preset=preset,
        seed=seed,
    )
