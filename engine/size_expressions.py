"""Sizes that depend on symbols, such as the number of rows ``(* branches frames 2304)``.

TensorRT's builder writes the axes of a network as prefix expressions over the names of the network's dynamic axes:
``(+ (CEIL_DIV (+ height//8 -2) 2) 1)``. Kernel lists keep them as text, so that any size can be asked for later.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import msgspec

from svd_trt.errors import ArgumentError

__all__ = ["Product", "evaluate", "product_of"]

Tree: TypeAlias = "int | str | tuple[object, ...]"
"""A number, a symbol, or an operator's name with its operands."""

_TOKEN = re.compile(r'[()]|"[^"]*"|[^\s()"]+')
_DEFINITION = re.compile(r"(E\d+)=(.*?)(?= E\d+=|$)")

_OPERATORS: dict[str, Callable[..., int]] = {
    "*": lambda *a: math.prod(a),
    "+": lambda *a: sum(a),
    "-": lambda first, *rest: first - sum(rest),
    "/": lambda a, b: a // b,
    "MUL_ADD": lambda a, b, c: a * b + c,
    "CEIL_DIV": lambda a, b: -(-a // b),
    "FLOOR_DIV": lambda a, b: a // b,
    "MOD": lambda a, b: a % b,
    "MAX": lambda *a: max(a),
    "MIN": lambda *a: min(a),
    "BROADCAST_SIZE": lambda *a: max(a),
}


class Product(msgspec.Struct, frozen=True):
    """``numerator / denominator`` times expressions that no number can be taken out of; the factors are sorted."""

    numerator: int
    denominator: int = 1
    factors: tuple[str, ...] = ()

    def times(self, other: Product) -> Product:
        """The product of both, reduced."""
        above, below = self.numerator * other.numerator, self.denominator * other.denominator
        common = math.gcd(above, below) or 1
        return Product(above // common, below // common, tuple(sorted(self.factors + other.factors)))

    def over(self, number: int) -> Product:
        """The quotient of the product and ``number``."""
        return self.times(Product(1, number))

    @property
    def text(self) -> str:
        """The expression that `evaluate` takes."""
        numbers = [] if self.numerator == 1 and self.factors else [str(self.numerator)]
        terms = [*numbers, *self.factors]
        whole = terms[0] if len(terms) == 1 else f"(* {' '.join(terms)})"
        return whole if self.denominator == 1 else f"(/ {whole} {self.denominator})"

    def values(self, points: Iterable[Mapping[str, int]]) -> tuple[int, ...] | None:
        """Its value at each of ``points``; None if it is not a whole number at one of them."""
        found = []
        for sizes in points:
            above = self.numerator * math.prod(evaluate(factor, sizes) for factor in self.factors)
            if above % self.denominator:
                return None
            found.append(above // self.denominator)
        return tuple(found)


def evaluate(text: str, sizes: Mapping[str, int]) -> int:
    """The value of an expression when its symbols have ``sizes``.

    Raises:
        ArgumentError: the text is no such expression, or has a symbol that ``sizes`` lacks.
    """
    try:
        return _value(_parse(text), sizes)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError, RecursionError) as error:
        raise ArgumentError(f"the size {text!r} cannot be computed from {dict(sizes)}: {error!r}") from error


def product_of(text: str) -> Product:
    """The expression as a product, with numbers multiplied and nested products opened.

    Raises:
        ArgumentError: the text is no expression.
    """
    try:
        tree = _parse(text)
    except (IndexError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{text!r} is not the expression of a size: {error!r}") from error
    return _product(tree)


def _product(tree: Tree) -> Product:
    if isinstance(tree, int):
        return Product(tree)
    if isinstance(tree, tuple) and tree[0] == "*":
        result = Product(1)
        for operand in tree[1:]:
            result = result.times(_product(operand))  # type: ignore[arg-type]  # operands are trees
        return result
    return Product(1, 1, (_text(tree),))


def _text(tree: object) -> str:
    return f"({' '.join(map(_text, tree))})" if isinstance(tree, tuple) else str(tree)


def _value(tree: object, sizes: Mapping[str, int]) -> int:
    if isinstance(tree, int):
        return tree
    if isinstance(tree, str):
        symbol, _, factor = tree.partition("//")
        return sizes[symbol] // int(factor or 1)
    assert isinstance(tree, tuple)
    return _OPERATORS[tree[0]](*(_value(operand, sizes) for operand in tree[1:]))


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> Tree:
    body, _, definitions = text.partition(" where ")
    names = {name: _parse(meaning.strip()) for name, meaning in _DEFINITION.findall(definitions)}
    tokens = _TOKEN.findall(body)
    tree, end = _read(tokens, 0, names)
    if end != len(tokens):
        raise ValueError("text follows the expression")
    return tree


def _read(tokens: list[str], at: int, names: Mapping[str, Tree]) -> tuple[Tree, int]:
    """The tree that starts at token ``at``, and the place after it."""
    first = tokens[at]
    if first != "(":
        word = first.strip('"')
        return (int(word) if re.fullmatch(r"-?\d+", word) else names.get(word, word)), at + 1
    operands: list[object] = [tokens[at + 1]]
    at += 2
    while tokens[at] != ")":
        operand, at = _read(tokens, at, names)
        operands.append(operand)
    return tuple(operands), at + 1
