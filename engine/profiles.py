"""Optimisation profiles: the sizes that one engine is compiled for.

TensorRT compiles the kernels of each profile for themselves. For a single point all extents are known, and more
operations fuse into one kernel; a range serves every size in it. An engine therefore has exact profiles for the sizes
that matter most, and one for the whole range.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from svd_trt.engine.spec import NetworkSpec, Range

__all__ = ["Profile", "choose_profile", "profiles_of"]

Profile: TypeAlias = dict[str, Range]
"""The range of each symbol of a network; all of them fixed in an exact profile."""


def profiles_of(spec: NetworkSpec, points: Iterable[Mapping[str, int]]) -> tuple[Profile, ...]:
    """The profiles of a network's engine: one for each of ``points``, then the whole range.

    Args:
        spec: the network. Without symbols it has one profile, which is empty.
        points: a value for each of `svd_trt.engine.spec.SYMBOLS`; those of another network do not count, and equal
            points make one profile.
    """
    whole: Profile = dict(spec.ranges)
    exact: list[Profile] = []
    for point in points:
        profile = {symbol: Range(point[symbol], point[symbol], point[symbol]) for symbol in whole}
        if profile not in exact and profile != whole:
            exact.append(profile)
    return (*exact, whole)


def choose_profile(profiles: Sequence[Mapping[str, Range]], sizes: Mapping[str, int]) -> int:
    """The index of the first profile that holds ``sizes``; exact profiles are before the range.

    Args:
        profiles: of one engine, in the order in which it was built.
        sizes: a value for each symbol in the profiles.

    Raises:
        ValueError: none holds them.
    """
    for index, profile in enumerate(profiles):
        if all(sizes[symbol] in span for symbol, span in profile.items()):
            return index
    raise ValueError(f"no profile holds {dict(sizes)}")
