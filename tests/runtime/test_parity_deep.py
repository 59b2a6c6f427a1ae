"""The cases of `tests.runtime.test_parity` with a UNet of three levels, whose odd sizes are cut at two of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from svd_trt import VideoPipeline, build_bundle
from svd_trt.export.fidelity import psnr
from tests.conftest import DYNAMIC, Once, load_diffusers
from tests.runtime.test_parity import CASES, both

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def deep_pipe(once: Once, tiny_checkpoint: Path, cache: Path) -> Iterator[VideoPipeline]:
    path = once("deep", lambda path: build_bundle(tiny_checkpoint, path, replace(DYNAMIC, ff_chunks=2, cache=cache)))
    with VideoPipeline.open(path) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def deep_reference(tiny_checkpoint: Path) -> Any:
    return load_diffusers(tiny_checkpoint)


@pytest.mark.parametrize("case", CASES)
def test_fp32_frames_equal_diffusers(
    case: str, deep_pipe: VideoPipeline, deep_reference: Any, picture: PIL.Image.Image, record_property: Any
) -> None:
    ours, theirs = both(deep_pipe, deep_reference, picture, **CASES[case])
    value = psnr(ours, theirs)
    record_property("psnr_db", value)
    assert value >= 50
