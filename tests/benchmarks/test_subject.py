"""What is asked of every contender, and the arithmetic in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svd_trt.benchmarks.curves import curve_subjects
from svd_trt.benchmarks.subject import make_subject, with_flops
from svd_trt.errors import ArgumentError


def subject(**more: Any) -> Any:
    asked: dict[str, Any] = dict.fromkeys(("frames", "height", "width", "steps", "decode_chunk_size"))
    return make_subject("random:mid", seed=0, precision="fp32", **asked | more)


def test_arithmetic_is_counted() -> None:
    """Twice the frames are twice the decoding, and a bit more than twice the step where frames attend to each other."""
    one, two = (with_flops(subject(frames=n))[0] for n in (4, 8))
    assert two.step_flops == pytest.approx(2.0925e11, rel=1e-3)
    assert two.decode_flops == pytest.approx(2 * one.decode_flops)
    assert np.isclose(two.step_flops, 2 * one.step_flops, rtol=0.02)


def test_sizes_of_presets_and_refusals() -> None:
    made = subject()
    assert (made.frames, made.height, made.width, made.steps, made.decode_chunk_size) == (8, 256, 256, 5, 8)
    assert subject(decode_chunk_size=99, frames=3).decode_chunk_size == 3
    with pytest.raises(ArgumentError, match="multiples of 8"):
        subject(height=100)


def test_a_checkpoint_is_counted_like_its_preset(checkpoint: Path) -> None:
    """It has the networks of the preset "tiny" in files."""
    sizes: dict[str, Any] = {"frames": 2, "height": 64, "width": 64, "steps": 1, "decode_chunk_size": None}
    found = [
        with_flops(make_subject(model, seed=0, precision="fp32", **sizes)) for model in (str(checkpoint), "random:tiny")
    ]
    assert [why for _, why in found] == [None, None]
    assert found[0][0].step_flops == found[1][0].step_flops is not None
    assert found[0][0].decode_flops == found[1][0].decode_flops is not None


def test_curves_of_small_pictures_do_not_grow_them() -> None:
    made = curve_subjects(subject(height=32, width=128), "pixels")
    assert [(s.height, s.width) for s in made] == [(32, 64), (32, 128)]


def test_curves_end_at_the_subject() -> None:
    made = subject()
    assert [s.frames for s in curve_subjects(made, "frames")] == [2, 4, 6, 8]
    assert [s.decode_chunk_size for s in curve_subjects(made, "frames")] == [2, 4, 6, 8]
    assert [s.steps for s in curve_subjects(made, "steps")] == [1, 2, 4, 5]
    assert [(s.height, s.width) for s in curve_subjects(made, "pixels")] == [(n, n) for n in (64, 128, 192, 256)]
