"""Which published architecture a single file has: SVD and SVD-XT have the same names and shapes.

They differ only in the number of frames that they were trained for, so the file's name has to tell, or its metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from svd_trt.errors import CheckpointError

__all__ = ["PUBLISHED", "guess_architecture"]

PUBLISHED = ("svd", "svd-xt")
"""The published architectures, which are also presets."""

# Other tools write names of their own here. modelspec.architecture is the same for both, unless it says xt.
_TITLES = ("modelspec.title", "title", "name", "ss_base_model_version", "modelspec.architecture")
_XT, _SVD = re.compile(r"(svd|img2vid)?xt\d*"), re.compile(r"svd\d*")


def guess_architecture(path: Path, metadata: Mapping[str, str]) -> tuple[str, str]:
    """The published architecture that the file was made for, and what tells so, for a message.

    Args:
        path: only its name counts, word by word: ``svd_xt_1_1`` and ``SVD-XT`` are SVD-XT, ``texture`` is not.
        metadata: of the safetensors header.

    Raises:
        CheckpointError: nothing tells; the message names the option that does.
    """
    if (found := _find(path.stem)) is not None:
        return found[0], f"its name has the word {found[1]}"
    for key in _TITLES:
        if (found := _find(metadata.get(key, ""))) is not None:
            return found[0], f"its metadata ({key}) have the word {found[1]}"
    raise CheckpointError(
        f"{path} does not tell whether it is SVD (14 frames) or SVD-XT (25), which have the same weights by name and "
        "size; pass --config svd or --config svd-xt (in Python, config=), or put one of these words into its name"
    )


def _find(text: str) -> tuple[str, str] | None:
    """The architecture that a word of ``text`` names, and the word."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    for architecture, pattern in (("svd-xt", _XT), ("svd", _SVD)):
        for word in words:
            if pattern.fullmatch(word):
                return architecture, word
    return None
