"""Bundles whose files are symbolic links, as the cache of Hugging Face makes them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import PIL.Image
import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.engine.manifest import sha256_of
from svd_trt.engine.spec import NETWORKS
from svd_trt.engine.staging import _link
from svd_trt.runtime.linked_onnx import FOLDER_OPTION, find_onnx, with_location

FAST: dict[str, Any] = {"num_frames": 2, "num_inference_steps": 1, "seed": 1, "output_type": "np"}


def link_as_a_hub_cache(bundle: Path, cache: Path) -> Path:
    """Make ``cache/snapshots/REVISION`` a copy of ``bundle`` whose files are links to ``cache/blobs/HASH``."""
    snapshot = cache / "snapshots" / hashlib.sha1(b"revision").hexdigest()
    for file in (path for path in bundle.rglob("*") if path.is_file()):
        blob, link = cache / "blobs" / sha256_of(file), snapshot / file.relative_to(bundle)
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not blob.exists():
            os.link(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.fixture(scope="module")
def linked(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link_as_a_hub_cache(small_bundle, tmp_path_factory.mktemp("cache"))


def test_a_bundle_in_a_cache_of_links_gives_the_same_video(
    linked: Path, small_bundle: Path, picture: PIL.Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime sees no link, because some versions refuse weights behind one."""
    seen: list[tuple[Any, Path]] = []
    inner = onnxruntime.InferenceSession

    def make(graph: Any, options: Any, **rest: Any) -> Any:
        seen.append((graph, Path(options.get_session_config_entry(FOLDER_OPTION))))
        return inner(graph, options, **rest)

    with VideoPipeline.open(small_bundle) as pipe:
        expected = pipe(picture, **FAST).frames
    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    with VideoPipeline.open(linked) as pipe:
        np.testing.assert_array_equal(pipe(picture, **FAST).frames, expected)
    assert len(seen) == len(NETWORKS)
    for graph, folder in seen:
        model = onnx.load_model_from_string(graph)
        locations = {
            entry.value
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert locations
        for name in locations:
            assert (folder / name).is_file()
            assert (folder / name).resolve() == folder / name


def test_other_links_need_no_copy_of_the_graph(small_bundle: Path, tmp_path: Path) -> None:
    """A link to the whole bundle, or to its folder of networks."""
    (tmp_path / "all").symlink_to(small_bundle)
    (tmp_path / "part").mkdir()
    for entry in small_bundle.iterdir():
        (tmp_path / "part" / entry.name).symlink_to(entry)
    for name in ("all", "part"):
        found = find_onnx(Bundle.open(tmp_path / name), "denoiser")
        assert found == (str(small_bundle.resolve() / "onnx" / "denoiser.onnx"), None)


def test_only_the_location_of_weights_is_changed(small_bundle: Path) -> None:
    before = Bundle.open(small_bundle).onnx_path("denoiser").read_bytes()
    name = "x" * 300  # its length takes two bytes
    moved = onnx.load_model_from_string(with_location(before, name))
    expected = onnx.load_model_from_string(before)
    for tensor in expected.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    assert moved == expected
    assert with_location(with_location(before, name), "denoiser.onnx.data") == with_location(
        before, "denoiser.onnx.data"
    )
    for damaged in (before[:-3], b"\xff" * 20, b"\x0b"):
        with pytest.raises(ValueError, match=r"ONNX's format|cut short"):
            with_location(damaged, name)


def test_a_build_takes_files_and_not_links_from_an_older_bundle(linked: Path, tmp_path: Path) -> None:
    source = Bundle.open(linked).onnx_path("denoiser")
    assert source.is_symlink()
    _link(source, tmp_path / "denoiser.onnx")
    assert not (tmp_path / "denoiser.onnx").is_symlink()
    assert (tmp_path / "denoiser.onnx").read_bytes() == source.read_bytes()
