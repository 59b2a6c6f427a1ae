"""Strategies that change real files a little: bytes, JSON trees and names."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

LARGE = (0, 1, -1, 2, 7, 8, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30)

# Text of all planes, with what terminals, shells and paths take for something else.
TEXT = st.text(max_size=12) | st.sampled_from(
    (
        "",
        " ",
        "\n",
        "a\nb",
        "\0",
        "..",
        "../..",
        "/",
        "~",
        "-",
        "--",
        "%s",
        "{}",
        "[red]",
        "\x1b[2J",
        "é" * 300,
        "a" * 5000,
    )
)
NUMBERS = st.sampled_from(LARGE) | st.integers() | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed_bytes(draw: st.DrawFn, original: bytes, most: int = 8) -> bytes:
    """``original`` with some bytes changed, cut out, repeated or put in, anywhere but more often near the start."""
    content = bytearray(original)
    for _ in range(draw(st.integers(1, most))):
        end = len(content)
        at = draw(st.integers(0, min(end, 64)) | st.integers(0, end))
        kind = draw(st.sampled_from(("set", "number", "cut", "insert", "repeat", "end")))
        if kind == "set":
            content[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "number":  # a length or a count, in either order of bytes
            value, size = draw(st.sampled_from(LARGE)), draw(st.sampled_from((1, 2, 4, 8)))
            order = draw(st.sampled_from(("little", "big")))
            content[at : at + size] = (value % 256**size).to_bytes(size, order)
        elif kind == "cut":
            del content[at : at + draw(st.integers(1, 64))]
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=16))
        elif kind == "repeat":
            content[at:at] = content[at : at + draw(st.integers(1, 256))]
        else:
            del content[at:]
    return bytes(content)


@st.composite
def changed_tree(draw: st.DrawFn, original: Any, most: int = 3) -> Any:
    """A JSON value with some of its parts replaced, removed, renamed, repeated or exchanged."""
    tree = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, most))):
        parent, key = _place(draw, tree)
        if parent is None:
            return draw(VALUES)
        kind = draw(st.sampled_from(("value", "number", "remove", "rename", "copy")))
        if kind == "value":
            parent[key] = draw(VALUES)
        elif kind == "number":
            parent[key] = draw(NUMBERS)
        elif kind == "remove":
            del parent[key]
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw(TEXT)] = parent.pop(key)
        else:
            other, there = _place(draw, tree)
            parent[key] = copy.deepcopy(tree if other is None else other[there])
    return tree


def _place(draw: st.DrawFn, tree: Any) -> tuple[Any, Any]:
    """A container in the tree and one of its keys; (None, None) is the whole tree."""
    parent, key = None, None
    while isinstance(tree, dict | list) and tree:
        if parent is not None and draw(st.integers(0, 5)) == 0:
            break
        keys = sorted(tree, key=str) if isinstance(tree, dict) else range(len(tree))
        parent, key = tree, keys[draw(st.integers(0, len(keys) - 1))]
        tree = parent[key]
    return parent, key


def encode(tree: Any) -> bytes:
    """JSON, with what the standard does not have (NaN, infinity, numbers of any size) if the tree has it."""
    return json.dumps(tree).encode("utf-8", "surrogatepass")


@st.composite
def changed_json(draw: st.DrawFn, original: Any) -> bytes:
    """JSON whose tree or whose bytes are changed."""
    if draw(st.integers(0, 3)):
        return encode(draw(changed_tree(original)))
    return draw(changed_bytes(encode(original)))


@st.composite
def changed_names(draw: st.DrawFn, original: Mapping[str, Any], most: int = 4) -> dict[str, Any]:
    """A table with some names lost, some renamed by a prefix or a part, and some values changed."""
    table = dict(original)
    for _ in range(draw(st.integers(1, most))):
        if not table:
            break
        names: Sequence[str] = sorted(table)
        name = names[draw(st.integers(0, len(names) - 1))]
        kind = draw(st.sampled_from(("lose", "lose all alike", "prefix", "rename all", "value", "add")))
        part = draw(st.sampled_from(name.split(".") or [name]))
        if kind == "lose":
            del table[name]
        elif kind == "lose all alike":
            table = {other: value for other, value in table.items() if part not in other.split(".")}
        elif kind == "prefix":
            before = draw(st.sampled_from(("model.", "module.", "ema.", "unet.", "first_stage_model.", "")) | TEXT)
            table = {before + other: value for other, value in table.items()}
        elif kind == "rename all":
            new = draw(TEXT)
            table = {other.replace(part, new): value for other, value in table.items()}
        elif kind == "value":
            table[name] = draw(VALUES)
        else:
            table[draw(TEXT)] = table[name]
    return table
