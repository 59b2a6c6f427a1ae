"""The noise against torch's CPU generator.

Tolerance: 1e-6 absolute in float32 and one unit in the last place in float16; the maxima measured over 100
million values are 7.2e-7 and one unit. Torch's portable code, which runs where it finds no AVX2, differs from
its AVX2 code by up to 2.8e-6, so there the tolerance is 3e-6, in float16 on top of that unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from svd_trt.errors import ArgumentError
from svd_trt.runtime.noise import TorchGenerator

torch = pytest.importorskip("torch")

VECTORISED = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
SEEDS = [0, 1, 7, 42, 2**31 + 5, 2**32 - 1, 2**32, 2**63, 2**64 - 1]
LENGTHS = [0, 1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 100, 1000]
F32, F16 = np.float32, np.float16


def assert_same(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    slack = 0.0 if VECTORISED else 3e-6
    difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    if expected.dtype == F16:
        assert np.all(difference <= np.spacing(np.abs(expected)).astype(np.float64) + slack)
    else:
        assert np.all(difference <= max(slack, 1e-6))


def assert_same_draws(seed: int, draws: Sequence[tuple[int | tuple[int, ...], type]]) -> None:
    ours, theirs = TorchGenerator(seed), torch.Generator().manual_seed(seed)
    for shape, dtype in draws:
        expected = torch.randn(shape, generator=theirs, dtype=torch.float16 if dtype is F16 else torch.float32)
        assert_same(ours.randn(shape, dtype), expected.numpy())


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("seed", SEEDS)
def test_one_draw_and_the_state_after_it(seed: int, length: int, dtype: type) -> None:
    assert_same_draws(seed, [(length, dtype), (16, F32), (1, F32)])


@pytest.mark.parametrize(
    "lengths",
    [
        (1, 1, 1, 1),
        (1, 16, 1, 1),  # a long draw keeps the spare value of a short one
        (3, 17, 2, 33, 15, 1),
        (0, 1, 0, 1, 0, 16),
        (15, 15, 15),
        (17, 17, 17),
        (33, 7, 1000, 1, 31),
        (16, 32, 64),
    ],
)
@pytest.mark.parametrize("dtypes", [(F32,), (F16,), (F32, F16), (F16, F16, F32)])
@pytest.mark.parametrize("seed", [0, 42, 2**64 - 1])
def test_sequences(seed: int, dtypes: tuple[type, ...], lengths: tuple[int, ...]) -> None:
    assert_same_draws(seed, [(length, dtypes[i % len(dtypes)]) for i, length in enumerate(lengths)])


@pytest.mark.parametrize("dtype", [F32, F16])
def test_image_noise_then_latents(dtype: type) -> None:
    assert_same_draws(42, [((1, 3, 64, 128), F32), ((1, 14, 4, 8, 16), dtype)])


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (), (4,), (2, 0, 3), (1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_shapes(shape: tuple[int, ...], dtype: type) -> None:
    assert_same_draws(7, [(shape, dtype), (1, F32)])


@pytest.mark.parametrize("length", [1_000_000, 1_000_003])
def test_millions(length: int) -> None:
    assert_same_draws(7, [(length, F32), (length, F16), (3, F32)])


def test_zero_is_never_negative() -> None:
    # A radius of zero is drawn once in 2**24 pairs. Torch's fused addition of the mean gives +0 for it.
    values = TorchGenerator(0).randn(4_000_000)
    assert not np.any(np.signbit(values[values == 0]))


def test_default_dtype_and_plain_arguments() -> None:
    values = TorchGenerator(int(np.int64(3))).randn([np.int64(2), 3])
    assert values.dtype == F32
    assert values.shape == (2, 3)


def test_only_the_low_half_of_the_seed_counts() -> None:
    np.testing.assert_array_equal(TorchGenerator(5).randn(40), TorchGenerator(2**32 + 5).randn(40))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", None])
def test_bad_seed(seed: Any) -> None:
    with pytest.raises(ArgumentError, match="a seed is"):
        TorchGenerator(seed)


@pytest.mark.parametrize("shape", [-1, (2, -1), 1.5, (2, 1.5), "ab", None])
def test_bad_shape(shape: Any) -> None:
    with pytest.raises(ArgumentError, match="a shape"):
        TorchGenerator(0).randn(shape)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, "bfloat16", object])
def test_bad_dtype(dtype: Any) -> None:
    with pytest.raises(ArgumentError, match="float32 or float16"):
        TorchGenerator(0).randn(4, dtype)
