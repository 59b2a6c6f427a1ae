"""Gaussian noise equal to torch's, without torch.

A seed must give the same video as in diffusers, so the runtime draws the numbers that torch's CPU generator draws.
It follows ``normal_kernel`` and ``normal_fill`` in ATen's ``native/cpu/DistributionTemplates.h`` and
``normal_distribution`` in ATen's ``core/DistributionsHelper.h``, as of torch 2.13.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from svd_trt.errors import ArgumentError

__all__ = ["TorchGenerator", "draw_rows", "skip_rows"]

Shape: TypeAlias = SupportsIndex | Sequence[SupportsIndex]

_BLOCK = 16  # torch fills whole blocks of 16; a shorter request takes its serial path in double precision
_SKIPPED_AT_ONCE = 1 << 20  # words, to keep memory small
_TWO_PI = np.float32(2.0 * math.pi)


class TorchGenerator:
    """The normal numbers of ``torch.Generator().manual_seed(seed)`` on the CPU.

    Consecutive draws, of any lengths and of either dtype, continue one stream as they do in torch. Values agree within
    1e-6 in float32, and within one unit in the last place in float16, with the AVX2 code that torch runs on recent
    x86 processors. Torch's portable code rounds the angles differently; it is up to 3e-6 away from both.

    Args:
        seed: from 0 to 2**64 - 1; only the low 32 bits count, as in torch.

    Raises:
        ArgumentError: the seed is not an integer, or out of range.

    An instance must not be shared between threads.
    """

    def __init__(self, seed: int) -> None:
        # numpy guarantees that this legacy generator never changes, and it seeds mt19937 as torch does.
        self._source = np.random.RandomState(_seed(seed) & 0xFFFFFFFF)
        self._spare: float | None = None

    @overload
    def randn(self, shape: Shape) -> npt.NDArray[np.float32]: ...

    @overload
    def randn(self, shape: Shape, dtype: npt.DTypeLike) -> npt.NDArray[np.floating[Any]]: ...

    def randn(self, shape: Shape, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[np.floating[Any]]:
        """Draw standard normal values, as ``torch.randn(shape, generator=..., dtype=...)`` does.

        Args:
            shape: of the result; an int is a length.
            dtype: float32 or float16.

        Raises:
            ArgumentError: the dtype is another one, or the shape is malformed.
        """
        dims = _dimensions(shape)
        kind = _float_dtype(dtype)
        length = math.prod(dims)
        if length < _BLOCK:
            values = np.array([self._serial() for _ in range(length)], dtype=np.float32)
        else:
            values = self._blocks(length, overdraws=kind == np.float32)
        return values.astype(kind, copy=False).reshape(dims)

    @classmethod
    def at(cls, words: npt.NDArray[np.uint32], position: int, spare: float | None) -> TorchGenerator:
        """Continue from a `state`."""
        generator = cls(0)
        generator._source.set_state(("MT19937", words, position, 0, 0.0))
        generator._spare = spare
        return generator

    def state(self) -> tuple[npt.NDArray[np.uint32], int, float | None]:
        """The 624 words of mt19937, how many of them are used, and the number that the next short draw begins with."""
        _, words, position, *_ = self._source.get_state(legacy=True)
        return np.asarray(words, np.uint32), int(position), self._spare

    def skip(self, shape: Shape, dtype: npt.DTypeLike = np.float32) -> None:
        """Go on as if `randn` had drawn that."""
        length = math.prod(_dimensions(shape))
        if length < _BLOCK:
            for _ in range(length):
                self._serial()
            return
        if remainder := length % _BLOCK:  # see `_blocks`
            length += _BLOCK - (0 if _float_dtype(dtype) == np.float32 else remainder)
        for start in range(0, length, _SKIPPED_AT_ONCE):
            self._words(min(_SKIPPED_AT_ONCE, length - start))

    def _blocks(self, length: int, *, overdraws: bool) -> npt.NDArray[np.float32]:
        """``normal_fill``: whole blocks; if the last block is incomplete, the last 16 values are drawn again."""
        remainder = length % _BLOCK
        values = np.empty(length, dtype=np.float32)
        values[: length - remainder] = _box_muller(self._uniform(length - remainder))
        if remainder:
            if overdraws:
                # torch fills a float32 tensor with uniforms to its end before it overwrites the tail. Its float16
                # path works block by block and draws none for the incomplete block, so the streams differ.
                self._words(remainder)
            values[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return values

    def _serial(self) -> float:
        """``normal_distribution<double>``: a cosine; the sine of the pair is kept for the next call.

        Draws of 16 values and more neither use nor clear the sine that is kept.
        """
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        high1, low1, high2, low2 = (int(word) for word in self._words(4))
        theta = 2.0 * math.pi * _uniform53(high1, low1)
        radius = math.sqrt(-2.0 * math.log1p(-_uniform53(high2, low2)))
        self._spare = radius * math.sin(theta)
        return radius * math.cos(theta)

    def _uniform(self, length: int) -> npt.NDArray[np.float32]:
        """Draw 24-bit uniforms in [0, 1): ``uniform_real_distribution<float>``."""
        words = self._words(length)
        words &= np.uint32(0xFFFFFF)
        return words.astype(np.float32) * np.float32(2.0**-24)

    def _words(self, length: int) -> npt.NDArray[np.uint32]:
        """The next ``length`` outputs of mt19937, which numpy returns unchanged for the full range of uint32."""
        return self._source.randint(0, 1 << 32, size=length, dtype=np.uint32)


def draw_rows(
    sources: Sequence[TorchGenerator], shape: Sequence[int], dtype: npt.DTypeLike = np.float32, *, first: int = 0
) -> npt.NDArray[np.floating[Any]]:
    """Draw normal values as ``diffusers.utils.torch_utils.randn_tensor`` does, for rows ``first`` and on.

    One source draws all rows at once; if there are several, each draws its own row.

    Args:
        sources: one, or at least one for each row.
        shape: of the result; its first number is that of the rows.
        dtype: float32 or float16.
        first: the row that the result begins with, if the rows are drawn in parts.
    """
    if len(sources) == 1:
        return sources[0].randn(shape, dtype)
    rows = [source.randn((1, *shape[1:]), dtype) for source in sources[first : first + shape[0]]]
    return np.concatenate(rows)


def skip_rows(sources: Sequence[TorchGenerator], shape: Sequence[int], dtype: npt.DTypeLike = np.float32) -> None:
    """Go on as if `draw_rows` had drawn that."""
    if len(sources) == 1:
        sources[0].skip(shape, dtype)
        return
    for source in sources[: shape[0]]:
        source.skip((1, *shape[1:]), dtype)


def _seed(seed: int) -> int:
    try:
        value = operator.index(seed)
    except TypeError:
        raise ArgumentError(f"a seed is an integer, not {type(seed).__name__}") from None
    if not 0 <= value < 1 << 64:
        raise ArgumentError(f"a seed is from 0 to 2**64 - 1, not {value}")
    return value


def _float_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    try:
        kind = np.dtype(dtype)
    except TypeError:  # a name that numpy does not know
        kind = np.dtype(object)
    if kind not in (np.dtype(np.float32), np.dtype(np.float16)):
        raise ArgumentError(f"noise is drawn as float32 or float16, not {dtype!r}")
    return kind


def _dimensions(shape: Shape) -> tuple[int, ...]:
    try:
        sizes = shape if isinstance(shape, Sequence) else (shape,)
        dims = tuple(operator.index(size) for size in sizes)
    except TypeError:
        raise ArgumentError(f"a shape is an integer or a sequence of integers, not {shape!r}") from None
    if any(size < 0 for size in dims):
        raise ArgumentError(f"a shape has no negative sizes: {dims}")
    return dims


def _uniform53(high: int, low: int) -> float:
    """A 53-bit uniform in [0, 1) from two words, of which the first drawn is the high half: ``random64``."""
    return (((high << 32) | low) & ((1 << 53) - 1)) * 2.0**-53


def _box_muller(uniform: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """``NormalFill16``: of each 16 values, eight become radii and eight angles; the result is cosines, then sines.

    Values are rounded to float32 at the same points as in torch's vectorised code: exact angles would differ from
    torch's by more than the tolerance. Only the logarithm is computed in double, which halves the difference.
    """
    pairs = uniform.reshape(-1, 2, _BLOCK // 2)
    exponent = np.log(1.0 - pairs[:, 0].astype(np.float64))  # 1 - u is in (0, 1]
    radius = np.sqrt(np.float32(-2) * exponent.astype(np.float32))
    theta = _TWO_PI * pairs[:, 1]
    normal = np.empty_like(pairs)
    np.multiply(radius, np.cos(theta), out=normal[:, 0])
    np.multiply(radius, np.sin(theta), out=normal[:, 1])
    normal += np.float32(0)  # turns -0 into 0, as torch's addition of the mean does
    return normal.reshape(-1)
