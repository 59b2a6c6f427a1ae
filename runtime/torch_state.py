"""Generators of torch that a caller passes: their numbers are drawn from their state, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from svd_trt.errors import ArgumentError
from svd_trt.runtime.noise import TorchGenerator, skip_rows

__all__ = ["TorchSources"]

# ``CPUGeneratorImplState`` in ATen's ``CPUGeneratorImpl.cpp``, as of torch 2.13.
_STATE = np.dtype(
    [
        ("initial_seed", "<u8"),
        ("left", "<i4"),
        ("seeded", "<i4"),
        ("next", "<u8"),
        ("words", "<u8", 624),
        ("normal_x", "<f8"),
        ("normal_y", "<f8"),
        ("normal_rho", "<f8"),
        ("normal_is_valid", "<i4"),
        ("padding", "<i4"),
        ("float_sample", "<f4"),
        ("float_is_valid", "<i4"),
    ]
)
_WORDS = 624


class TorchSources:
    """The generators that a caller passes for one generation, and copies of them that draw the same numbers.

    Args:
        generator: a ``torch.Generator`` on the CPU, or a list with one for each video. One that is listed twice is one
            stream, as in torch.
        videos: how many videos are made.

    Raises:
        ArgumentError: it is something else.

    Attributes:
        copies: one for each generator, at its present state.
    """

    def __init__(self, generator: Any, videos: int) -> None:
        several = isinstance(generator, list | tuple)
        self._generators: list[Any] = list(generator) if several else [generator]
        if several and len(self._generators) != videos:
            raise ArgumentError(
                f"generator has {len(self._generators)} generators for {videos} "
                f"video{'' if videos == 1 else 's'}; pass one for each video, or one that is not in a list"
            )
        self.copies = self._copied()

    def seed(self) -> int | tuple[int, ...] | None:
        """What gives the same numbers as ``seed``; None if numbers were drawn from a generator before."""
        seeds = [_fresh_seed(one) for one in self._generators]
        known = tuple(seed for seed in seeds if seed is not None)
        if len(known) < len(seeds) or len(set(map(id, self._generators))) < len(seeds):
            return None
        return known[0] if len(known) == 1 else known

    def advance(self, draws: Sequence[tuple[tuple[int, ...], npt.DTypeLike]]) -> None:
        """Leave the caller's generators as they are after `draw_rows` of these shapes and types."""
        sources = self._copied()
        for shape, dtype in draws:
            skip_rows(sources, shape, dtype)
        for generator, source in zip(self._generators, sources, strict=True):
            _write(generator, source)

    def _copied(self) -> list[TorchGenerator]:
        copies: dict[int, TorchGenerator] = {}
        for one in self._generators:
            if id(one) not in copies:
                copies[id(one)] = _read(one)
        return [copies[id(one)] for one in self._generators]


def _fields(generator: Any) -> tuple[Any, Any]:
    """The state of ``generator`` as a tensor of torch, and its fields, in the same memory."""
    state = generator.get_state()
    raw = state.numpy()
    if raw.nbytes != _STATE.itemsize:
        raise ArgumentError("this version of torch has generators of another kind; pass seed= instead of generator=")
    return state, raw.view(_STATE)[0:1]


def _read(generator: Any) -> TorchGenerator:
    device = getattr(getattr(generator, "device", None), "type", None)
    if device is None or not hasattr(generator, "get_state"):
        raise ArgumentError(
            f"generator must be a torch.Generator, or a list with one for each video, not {type(generator).__name__}; "
            "pass a number as seed="
        )
    if device != "cpu":
        raise ArgumentError(
            f"a generator on {device} draws numbers that only that device makes; "
            "pass torch.Generator('cpu').manual_seed(...), or seed="
        )
    _, fields = _fields(generator)
    spare = float(fields["normal_y"][0]) if fields["normal_is_valid"][0] else None
    position = _WORDS if fields["left"][0] == 1 else int(fields["next"][0])
    return TorchGenerator.at(fields["words"][0].astype(np.uint32), position, spare)


def _fresh_seed(generator: Any) -> int | None:
    """The seed of a generator that has not drawn any number since it got it."""
    _, fields = _fields(generator)
    fresh = fields["left"][0] == 1 and fields["next"][0] == 0 and not fields["normal_is_valid"][0]
    return int(fields["initial_seed"][0]) if fresh else None


def _write(generator: Any, source: TorchGenerator) -> None:
    words, position, spare = source.state()
    state, fields = _fields(generator)
    fields["words"] = words
    fields["next"], fields["left"] = position, _WORDS + 1 - position
    fields["normal_is_valid"], fields["normal_y"] = spare is not None, spare or 0.0
    generator.set_state(state)
