"""Which steps run the deep levels of the denoiser, and which reuse what an earlier step left of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

__all__ = ["deep_steps"]


def deep_steps(every: int, guided: Sequence[bool]) -> tuple[bool, ...]:
    """Whether each step is a deep one: the first, every ``every``-th after it, and each that has other branches.

    The static schedule of DeepCache (Ma et al. 2023, arXiv:2312.00858, algorithm 1 with uniform intervals). A step can
    reuse features of the same branches alone, so the step after a change of ``guided`` is deep, and counting starts
    again there.

    Args:
        every: 1 makes all steps deep.
        guided: whether each step has guidance, and so an unconditional branch, ``[S]``.
    """
    changes = [True, *(now != before for before, now in pairwise(guided))]
    found: list[bool] = []
    since = 0
    for changed in changes[: len(guided)]:
        since = 0 if changed else since + 1
        found.append(since % every == 0)
    return tuple(found)
