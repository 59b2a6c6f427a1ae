"""Generators of torch: their numbers and their states after a draw, against torch and diffusers."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from svd_trt.errors import ArgumentError
from svd_trt.runtime.noise import TorchGenerator, draw_rows, skip_rows
from svd_trt.runtime.torch_state import TorchSources

torch = pytest.importorskip("torch")

LENGTHS = [1, 3, 15, 16, 17, 100, 607, 608, 623, 624, 625, 1248, 5000]


def used(seed: int, *lengths: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for length in lengths:
        torch.randn(length, generator=generator)
    return generator


@pytest.mark.parametrize("before", [(), (1,), (16,), (1, 608), (17, 3), (624,), (5000, 1)])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_used_generator_goes_on_with_its_numbers_and_gets_torchs_state(before: tuple[int, ...], length: int) -> None:
    ours, theirs = used(11, *before), used(11, *before)
    sources = TorchSources(ours, 1)
    got = sources.copies[0].randn(length)
    np.testing.assert_allclose(got, torch.randn(length, generator=theirs).numpy(), atol=3e-6)
    sources.advance([((length,), np.float32)])
    np.testing.assert_array_equal(torch.randn(700, generator=ours), torch.randn(700, generator=theirs))
    np.testing.assert_array_equal(torch.randn(3, generator=ours), torch.randn(3, generator=theirs))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("length", [*LENGTHS, (1 << 20) + 17])
def test_skipping_leaves_what_drawing_leaves(length: int, dtype: type) -> None:
    drawn, skipped = TorchGenerator(5), TorchGenerator(5)
    drawn.randn(length, dtype)
    skipped.skip(length, dtype)
    np.testing.assert_array_equal(drawn.randn(20), skipped.randn(20))
    np.testing.assert_array_equal(drawn.randn(3), skipped.randn(3))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (3, 4, 4, 4)])
def test_rows_of_several_generators_equal_those_of_diffusers(shape: tuple[int, ...], dtype: str) -> None:
    from diffusers.utils.torch_utils import randn_tensor

    kind = getattr(torch, dtype)
    for seeds in ([1], [1, 2, 3]):
        theirs = [torch.Generator().manual_seed(seed) for seed in seeds]
        ours = [TorchGenerator(seed) for seed in seeds]
        for _ in range(2):
            expected = randn_tensor(shape, generator=theirs, device=torch.device("cpu"), dtype=kind).numpy()
            np.testing.assert_allclose(
                draw_rows(ours, shape, dtype), expected, atol=3e-6 if dtype == "float32" else 4e-3
            )


def test_rows_drawn_in_parts_are_those_drawn_at_once() -> None:
    def sources() -> list[TorchGenerator]:
        return [TorchGenerator(seed) for seed in range(5)]

    whole, apart, skipped = sources(), sources(), sources()
    expected = draw_rows(whole, (5, 3, 7))
    parts = [draw_rows(apart, (end - start, 3, 7), first=start) for start, end in pairwise((0, 2, 4, 5))]
    np.testing.assert_array_equal(np.concatenate(parts), expected)
    skip_rows(skipped, (3, 3, 7))  # the other sources have drawn nothing
    whole[3:] = sources()[3:]
    np.testing.assert_array_equal(draw_rows(skipped, (5, 20)), draw_rows(whole, (5, 20)))


def test_a_generator_that_is_listed_twice_is_one_stream() -> None:
    from diffusers.utils.torch_utils import randn_tensor

    ours, theirs = used(3), used(3)
    sources = TorchSources([ours, ours], 2)
    expected = randn_tensor((2, 40), generator=[theirs, theirs], device=torch.device("cpu")).numpy()
    np.testing.assert_allclose(draw_rows(sources.copies, (2, 40)), expected, atol=3e-6)
    sources.advance([((2, 40), np.float32)])
    np.testing.assert_array_equal(ours.get_state(), theirs.get_state())
    assert sources.seed() is None


def test_the_seed_of_generators_is_known_until_they_are_used() -> None:
    assert TorchSources(used(2**63 + 9), 4).seed() == 2**63 + 9
    assert TorchSources([used(1), used(2)], 2).seed() == (1, 2)
    assert TorchSources([used(1)], 1).seed() == 1
    assert TorchSources(used(1, 16), 1).seed() is None
    assert TorchSources(used(1, 1), 1).seed() is None
    assert TorchSources([used(1), used(2, 624)], 2).seed() is None


@pytest.mark.parametrize(
    ("generator", "videos", "message"),
    [
        ([used(1), used(2)], 3, "generator has 2 generators for 3 videos; pass one for each video"),
        ([used(1), used(2)], 1, "generator has 2 generators for 1 video; pass"),
        ([], 1, "generator has 0 generators for 1 video; pass"),
        (42, 1, "not int; pass a number as seed="),
        (np.random.default_rng(1), 1, "not Generator; pass a number as seed="),
        ([used(1), None], 2, "not NoneType; pass a number as seed="),
        (
            SimpleNamespace(device=SimpleNamespace(type="cuda"), get_state=None),
            1,
            r"a generator on cuda draws numbers that only that device makes; pass torch.Generator\('cpu'\)",
        ),
        (
            SimpleNamespace(device=SimpleNamespace(type="cpu"), get_state=lambda: torch.zeros(16, dtype=torch.uint8)),
            1,
            "pass seed= instead",
        ),
    ],
)
def test_other_generators_are_refused(generator: Any, videos: int, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        TorchSources(generator, videos)
