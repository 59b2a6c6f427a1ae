"""Default decode chunks: as diffusers as far as tensors stay countable, then even."""

from __future__ import annotations

import pytest

from svd_trt.engine.decode_chunks import MOST_ELEMENTS, chunk_choices, chunk_sizes, largest_chunk
from svd_trt.engine.spec import ModelInfo, Range

SVD = ModelInfo(4, 8, 1024, 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 25, 256)
ANY = Range(1, 1, 1024)


def test_no_tensor_has_over_2_to_the_31_elements() -> None:
    assert largest_chunk(SVD, 576, 1024) == 14
    assert 14 * 256 * 576 * 1024 <= MOST_ELEMENTS < 15 * 256 * 576 * 1024
    assert largest_chunk(SVD, 320, 576) == 45
    assert largest_chunk(SVD, 4096, 4096) == 1


@pytest.mark.parametrize(
    ("frames", "largest", "default"),
    [
        (14, 14, 14),  # all together, as in diffusers
        (25, 45, 25),
        (25, 14, 5),  # 5 x 5 instead of 14 + 11
        (24, 14, 12),
        (23, 14, 12),  # a prime: 12 + 11, both of nearly one size
        (26, 14, 13),
        (34, 14, 12),  # 17 x 2 would have sixteen seams
        (3, 2, 2),
        (2, 14, 2),
        (5, 1, 1),
    ],
)
def test_defaults(frames: int, largest: int, default: int) -> None:
    choices = chunk_choices(frames, 1, ANY, largest)
    assert choices == list(range(default, 0, -1))
    assert sum(chunk_sizes(frames, default, ANY)) == frames


def test_rests_are_in_the_range() -> None:
    assert chunk_choices(25, 1, Range(3, 8, 8), 14) == [5]  # 4 and 3 leave 1
    assert chunk_choices(25, 1, Range(8, 8, 8), 14) == []
    assert chunk_choices(25, 2, Range(5, 5, 6), 14) == [5]
