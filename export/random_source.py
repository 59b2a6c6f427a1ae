"""``random:PRESET`` and ``random:PRESET@SEED``: a checkpoint without a file, whose weights are drawn when needed."""

from __future__ import annotations

import hashlib
from typing import Any

from svd_trt.engine.manifest import SourceInfo
from svd_trt.errors import ArgumentError
from svd_trt.export.checkpoint import COMPONENT_OF, Checkpoint, Component, describe
from svd_trt.export.presets import WEIGHTS_REVISION, Preset, configurations, find_preset

__all__ = ["PREFIX", "RandomCheckpoint", "open_random"]

PREFIX = "random:"


class RandomCheckpoint(Checkpoint, frozen=True, kw_only=True, tag="random"):
    """Random weights at the size of a preset."""

    preset: Preset
    seed: int

    def check(self, component: Component) -> None:
        """See `Checkpoint.check`; random weights always have the right names and shapes."""

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
        raise ArgumentError(f"{PREFIX}{text}: the seed after @ is a whole number under 2^63, as in {PREFIX}{name}@7")
    seed = int(digits or 0)
    models = configurations(preset)
    components = dict.fromkeys(COMPONENT_OF.values())
    identity = f"{WEIGHTS_REVISION} {preset} {seed}"
    return RandomCheckpoint(
        description=describe(f"{PREFIX}{text}", models),
        source=SourceInfo(
            model=f"{PREFIX}{name}@{seed}",
            commit=None,
            variant=None,
            digests={c: hashlib.sha256(f"{c} {identity}".encode()).hexdigest() for c in components},
        ),
        parameters={component: preset.parameters[component] for component in components},
        configurations=models,
        preset=preset,
        seed=seed,
    )
