"""The bundles that a benchmark keeps: used again while the code that makes them is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from svd_trt.benchmarks import bundles
from svd_trt.benchmarks.bundles import Bundles
from svd_trt.benchmarks.schema import Subject
from svd_trt.errors import OutputError


@pytest.fixture
def kept(small_checkpoint: Path, tmp_path: Path) -> Bundles:
    subject = Subject(
        model=str(small_checkpoint),
        precision="fp32",
        frames=3,
        height=32,
        width=32,
        steps=1,
        decode_chunk_size=3,
        seed=0,
    )
    return Bundles(subject, tmp_path, None, lambda _: None)


def test_built_once_until_the_code_changes(kept: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seconds = kept.get("plain")
    assert seconds is not None
    assert seconds > 0
    manifest = path / "manifest.json"
    made = manifest.stat().st_mtime_ns
    assert kept.get("plain") == (path, seconds), "told again from the record"
    assert manifest.stat().st_mtime_ns == made
    monkeypatch.setattr(bundles, "_sources", lambda: "other code")
    assert kept.get("plain")[0] == path
    assert manifest.stat().st_mtime_ns > made


def test_a_folder_that_cannot_be_written(kept: Bundles, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        replace(kept, folder=tmp_path / "file" / "below").get("plain")


def test_a_bundle_that_is_given_stands_for_its_kind(kept: Bundles, small_bundle: Path) -> None:
    given = replace(kept, given=small_bundle)
    assert given.get("default") == (small_bundle, None)
    assert given.get("tensorrt-rtx") == (small_bundle, None)
