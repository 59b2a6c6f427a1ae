"""A damaged bundle does not open, and the message says how to repair it."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.engine.manifest import (
    CHECKSUM_NAME,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    FileEntry,
    read_manifest,
    write_manifest,
)
from svd_trt.engine.spec import NETWORKS, Range
from svd_trt.errors import ArgumentError, BackendError, BundleError


@pytest.fixture
def bundle(small_bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(small_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def flip(path: Path) -> None:
    """Change one byte in the middle; the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "onnx altered": (lambda b: flip(b / "onnx" / "denoiser.onnx"), "altered"),
    "weights altered": (lambda b: flip(b / "onnx" / "denoiser.onnx.data"), "altered"),
    "weights truncated": (lambda b: (b / "onnx" / "denoiser.onnx.data").write_bytes(b"x"), "truncated"),
    "onnx removed": (lambda b: (b / "onnx" / "vae_decoder.onnx").unlink(), "missing"),
    "plan altered": (lambda b: flip(b / "tensorrt-rtx" / "denoiser.plan"), "altered"),
    "plan removed": (lambda b: (b / "tensorrt-rtx" / "denoiser.plan").unlink(), "missing"),
    "manifest truncated": (lambda b: (b / "manifest.json").write_text("{"), "cannot be read"),
    "manifest not text": (lambda b: (b / "manifest.json").write_bytes(b'{"\x80igest": 1}'), "cannot be read"),
    "manifest too deep": (lambda b: (b / "manifest.json").write_bytes(b'{"a":' + b"[" * 9999), "cannot be read"),
    "manifest removed": (lambda b: (b / "manifest.json").unlink(), "not a bundle"),
    "manifest altered": (
        lambda b: edit(b / "manifest.json", lambda m: m["sampler"].update(sigma_max=80.0)),
        "altered",
    ),
    "newer schema": (
        lambda b: edit(b / "manifest.json", lambda m: m.update(schema_version=SCHEMA_VERSION + 1)),
        "newer svd-trt",
    ),
    "no schema": (lambda b: edit(b / "manifest.json", lambda m: m.pop("schema_version")), "no schema"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name: str, bundle: Path) -> None:
    damage, words = DAMAGE[name]
    Bundle.open(bundle)
    damage(bundle)
    with pytest.raises(BundleError, match=words) as caught:
        VideoPipeline.open(bundle)
    assert "\n" not in str(caught.value)
    assert "svd-trt" in str(caught.value), "the message names the command that repairs it"


def test_a_list_of_kernels_of_the_same_length_is_refused_if_altered(bundle: Path) -> None:
    path = bundle / "tensorrt-rtx" / "denoiser.kernels.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"convolution",', b'"pointwise"  ,'))
    assert path.read_bytes() != content
    with pytest.raises(BundleError, match=r"denoiser\.kernels\.json was altered .*; to repair it, run `svd-trt build"):
        Bundle.open(bundle, verify=False).kernels("denoiser")


def test_paths_out_of_the_bundle_are_refused(bundle: Path) -> None:
    """A manifest from an unknown source must not choose which files are read."""
    import msgspec

    manifest = read_manifest(bundle)
    entry = manifest.networks["denoiser"]
    outside = msgspec.structs.replace(entry.onnx.graph, path="../../etc/passwd")
    changed = msgspec.structs.replace(entry, onnx=msgspec.structs.replace(entry.onnx, graph=outside))
    write_manifest(msgspec.structs.replace(manifest, networks=manifest.networks | {"denoiser": changed}), bundle)
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("part", "change", "problem"),
    [
        ("model", {"decoder_channels": 0}, "decoder_channels is 0"),
        ("model", {"image_std": (0.0, 1.0, 1.0)}, "statistics of pictures"),
        ("sampler", {"rho": 0.0}, "rho is 0"),
        ("sampler", {"sigma_min": 800.0}, "sigma_min is 800 and sigma_max 700"),
        ("sampler", {"sigma_min": -1.0}, "noise level"),
        ("sampler", {"final_sigma": -1.0}, "final_sigma is -1"),
        ("model", {"latent_channels": 5}, "the tensors of vae_encoder are not those of its model and ranges"),
        ("ranges", {"frames": Range(2, 3, 9)}, "the tensors of denoiser"),
    ],
)
def test_manifests_that_contradict_themselves_are_refused(
    part: str, change: dict[str, Any], problem: str, bundle: Path
) -> None:
    """Numbers that no build writes would fail later: 0 channels as a division by zero."""
    import msgspec

    manifest = read_manifest(bundle)
    changed = msgspec.structs.replace(getattr(manifest, part), **change)
    write_manifest(msgspec.structs.replace(manifest, **{part: changed}), bundle)
    with pytest.raises(BundleError, match=f"contradicts itself: .*{problem}.*; to repair it, run `svd-trt build"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", [MANIFEST_NAME, CHECKSUM_NAME])
def test_a_file_that_cannot_be_read_is_not_called_altered(
    name: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files, or a lack of permission, is no damage that another build repairs."""
    read = Path.read_bytes if name == MANIFEST_NAME else Path.read_text

    def refuse(path: Path, *arguments: Any) -> Any:
        if path.name == name:
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return read(path, *arguments)

    monkeypatch.setattr(Path, read.__name__, refuse)
    with pytest.raises(BundleError, match=rf"{name} cannot be read: Too many open files; make it readable, or free"):
        Bundle.open(bundle)


def test_a_list_of_kernels_that_is_not_text_is_refused(bundle: Path) -> None:
    import msgspec

    manifest = read_manifest(bundle)
    entry = manifest.networks["denoiser"]
    assert entry.plan is not None
    path = bundle / "tensorrt-rtx" / "denoiser.kernels.json"
    path.write_bytes(b'{"\x80')
    plan = msgspec.structs.replace(entry.plan, kernels=FileEntry.of(bundle, path))
    networks = manifest.networks | {"denoiser": msgspec.structs.replace(entry, plan=plan)}
    write_manifest(msgspec.structs.replace(manifest, networks=networks), bundle)
    with pytest.raises(BundleError, match="to repair it, run `svd-trt build"):
        Bundle.open(bundle).kernels("denoiser")


def test_missing_and_mistaken_paths(tmp_path: Path, small_checkpoint: Path) -> None:
    with pytest.raises(BundleError, match="there is no bundle at"):
        Bundle.open(tmp_path / "none")
    with pytest.raises(BundleError, match="is a checkpoint, not a bundle: svd-trt build"):
        Bundle.open(small_checkpoint)


def test_a_bundle_rebuilt_under_an_open_pipeline_is_noticed(bundle: Path) -> None:
    """Networks are loaded on first use; networks of two builds must not be mixed."""
    import msgspec

    with VideoPipeline.open(bundle) as pipe:
        pipe.executor.load("image_encoder")
        manifest = read_manifest(bundle)
        write_manifest(msgspec.structs.replace(manifest, svd_trt_version="9"), bundle)
        with pytest.raises(BundleError, match="was rebuilt"):
            pipe.executor.load("vae_encoder")


@pytest.mark.parametrize("fails", [False, True])
def test_a_bundle_rebuilt_while_a_network_is_loaded_is_noticed(
    fails: bool, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the comparison of the manifests and the end of the loading; files of two builds may not fit together."""
    import msgspec

    closed = []
    with VideoPipeline.open(bundle) as pipe:
        device_open = pipe.device.open

        def replace(*arguments: Any, **options: Any) -> Any:
            manifest = read_manifest(bundle)
            write_manifest(msgspec.structs.replace(manifest, svd_trt_version="9"), bundle)
            if fails:
                raise BackendError("the weights do not fit the graph")
            session = device_open(*arguments, **options)
            monkeypatch.setattr(session, "close", lambda: closed.append(session))
            return session

        monkeypatch.setattr(pipe.device, "open", replace)
        with pytest.raises(BundleError, match="was rebuilt"):
            pipe.executor.load("vae_encoder")
    assert len(closed) == (not fails)


def test_manifest_survives_a_round_trip(bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(bundle)
    write_manifest(manifest, tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert set(manifest.networks) == set(NETWORKS)


def test_specs_are_those_of_the_files(bundle: Path) -> None:
    import onnx

    opened = Bundle.open(bundle)
    for name in NETWORKS:
        graph = onnx.load(opened.onnx_path(name), load_external_data=False).graph
        spec = opened.network(name).spec
        for values, tensors in ((graph.input, spec.inputs), (graph.output, spec.outputs)):
            read = [(v.name, tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim)) for v in values]
            assert read == [(t.name, tuple(a if isinstance(a, int) else str(a) for a in t.shape)) for t in tensors]


@pytest.mark.parametrize("text", ["", "a", "1:2", "1:2:3:4", "3:2:1", "0", "-4", "1:2:x", "1.5"])
def test_bad_ranges(text: str) -> None:
    with pytest.raises(ArgumentError):
        Range.parse(text)


def test_ranges() -> None:
    assert Range.parse("2:14:25") == Range(2, 14, 25)
    assert str(Range.parse("14")) == "14"
    assert 14 in Range(2, 14, 25)
    assert 1 not in Range(2, 14, 25)
    assert Range(2, 14, 25).words == "2 to 25"


def test_values_outside_a_range_are_refused() -> None:
    Range(2, 14, 25).require(25, "num_frames", "--frames")
    with pytest.raises(ArgumentError) as caught:
        Range(2, 14, 25).require(26, "num_frames", "--frames")
    assert str(caught.value) == (
        "num_frames 26 is outside what this bundle was built for (2 to 25); build one with another --frames"
    )
