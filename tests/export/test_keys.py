"""Which networks and engines bundles share: what is in the keys under which both are reused."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import svd_trt.errors
from svd_trt import BuildOptions, build_bundle
from svd_trt.engine.spec import NETWORKS, Range
from svd_trt.errors import ArgumentError
from svd_trt.export import build, build_job, code_digest
from svd_trt.export import options as options_module
from svd_trt.export.build_job import make_job
from svd_trt.export.checkpoint_kinds import open_checkpoint
from svd_trt.export.code_digest import GRAPH_CODE, PLAN_CODE, digest_of
from svd_trt.export.options import ranges_of
from svd_trt.progress import ignore_progress

pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx", reason="TensorRT for RTX is not installed (svd-trt[rtx])")

PLAIN: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "frames": "2:4:6",
    "decode_chunk": "1:2:4",
    "backend": "tensorrt-rtx",
}
ENCODERS = ["image_encoder", "vae_encoder"]
ALL = list(NETWORKS)


def keys(model: Path | str = "random:tiny", **options: Any) -> tuple[dict[str, str], dict[str, str]]:
    job = make_job(str(model), BuildOptions(**(PLAIN | options)), ignore_progress)
    return dict(job.onnx_keys), dict(job.plan_keys)


def shared(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return [name for name in one if one[name] == other.get(name)]


@pytest.mark.parametrize(
    ("options", "graphs", "plans"),
    [
        ({}, ALL, ALL),
        ({"backend": "onnxruntime"}, ALL, []),
        ({"precision": "fp32"}, ["vae_encoder"], ["vae_encoder"]),
        ({"frames": "2:4:9"}, ALL, [*ENCODERS, "vae_decoder"]),
        ({"decode_chunk": "1:3:4"}, ALL, [*ENCODERS, "denoiser"]),
        ({"height": 72}, ["image_encoder"], ["image_encoder"]),
        ({"split_guidance": True}, [*ENCODERS, "vae_decoder"], [*ENCODERS, "vae_decoder"]),
        ({"ff_chunks": 4}, [*ENCODERS, "vae_decoder"], [*ENCODERS, "vae_decoder"]),
        ({"weight_streaming": True}, ALL, [*ENCODERS, "vae_decoder"]),
        ({"rewrites": False}, ["vae_encoder"], ["vae_encoder"]),
        ({"branches": 2}, [*ENCODERS, "vae_decoder"], [*ENCODERS, "vae_decoder"]),
        ({"shallow_steps": True}, [*ENCODERS, "vae_decoder"], [*ENCODERS, "vae_decoder"]),
        ({"exact": False}, ALL, ENCODERS),
        ({"exact_frames": "4"}, ALL, ALL),
        ({"exact_frames": "4,6"}, ALL, ENCODERS),
        ({"targets": "sm89,sm120"}, ALL, []),
        ({"optimization_level": 5}, ALL, []),
    ],
)
def test_bundles_share_what_their_options_do_not_change(
    options: dict[str, Any], graphs: list[str], plans: list[str]
) -> None:
    (graph_keys, plan_keys), (other_graphs, other_plans) = keys(), keys(**options)
    assert shared(graph_keys, other_graphs) == graphs
    assert shared(plan_keys, other_plans) == plans


def test_sizes_of_one_range_share_graphs() -> None:
    """Symbolic axes take every size; only the engines' profiles differ."""
    one, other = keys(height="64:64:96", width="64:64:96"), keys(height="64:96:128", width="64:96:128")
    assert shared(one[0], other[0]) == ALL
    assert shared(one[1], other[1]) == ["image_encoder"]


def test_other_weights_are_other_networks(small_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(small_checkpoint, tmp_path / "checkpoint")
    path = checkpoint / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 0.2}))
    one, other = keys(small_checkpoint), keys(checkpoint)
    for form in (0, 1):
        assert shared(one[form], other[form]) == ["image_encoder", "denoiser"]


@pytest.mark.parametrize(("digest", "graphs"), [("graph_code_digest", []), ("plan_code_digest", ALL)])
def test_other_code_makes_other_networks(digest: str, graphs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys()
    monkeypatch.setattr(build_job, digest, lambda: "of the next version")
    after = keys()
    assert shared(before[0], after[0]) == graphs
    assert shared(before[1], after[1]) == []


def test_other_releases_make_other_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99")
    assert shared(before[0], keys()[0]) == []


def test_the_digest_is_that_of_statements(tmp_path: Path) -> None:
    path = tmp_path / "code.py"

    def digest(text: str) -> str:
        path.write_text(text)
        return digest_of([path])

    plain = digest("def f(x):\n    return x + 1\n")
    assert digest('"""Docs."""\n\n\ndef f(x):  # a comment\n    """Docs."""\n    return (x + 1)\n') == plain
    assert digest("def f(x):\n    return x + 2\n") != plain
    assert digest('TEXT = "Docs."\n\n\ndef f(x):\n    return x + 1\n') != plain


# Modules that the exporting and the building process import too, which do not decide what they write.
NOT_IN_THE_DIGEST = {
    "child_process", "host", "manifest", "driver", "tensorrt_import",
    "errors", "progress", "units", "version",
    "checkpoint", "checkpoint_kinds", "preflight", "random_source", "recipe", "scheduler", "silence",
    # These find and check files. The digest of those that are used is in the key.
    "file_kinds", "hub", "published", "weight_files",
    # `changed_checkpoint` puts a digest of these into that of the UNet's weights, if they are used.
    "changed_checkpoint", "code_digest", "lora", "other_unet",
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "digested"), [("export/export_process.py", GRAPH_CODE), ("engine/tensorrt_build.py", PLAN_CODE)]
)
def test_every_module_that_writes_is_in_the_digest(module: str, digested: tuple[Path, ...]) -> None:
    """A new module that a process imports is either digested or, after thought, excepted above."""
    package = Path(svd_trt.errors.__file__).parent
    found, rest = set[Path](), [package / module]
    while rest:
        path = rest.pop()
        if path not in found:
            found.add(path)
            rest += imports_of(path, package)
    missing = {path.stem for path in found} - {path.stem for path in digested} - NOT_IN_THE_DIGEST
    assert missing == set()
    assert {path.name for path in digested} <= {path.name for path in found}


def imports_of(path: Path, package: Path) -> list[Path]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        for name in names:
            if name.startswith("svd_trt."):
                place = package.joinpath(*name.split(".")[1:])
                found += [p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file()]
    return [p for p in found if p.parent != package or p.name != "__init__.py"]


def test_ranges_as_text_and_numbers() -> None:
    options = BuildOptions(frames="2:14:25", height="576", width=1024, decode_chunk=8, batch=Range(1, 1, 2))
    assert options == BuildOptions(
        frames=Range(2, 14, 25),
        height=Range(576, 576, 576),
        width=Range(1024, 1024, 1024),
        decode_chunk=Range(8, 8, 8),
        batch=Range(1, 1, 2),
    )
    for bad in ("2:14", "many", "9:5:2", 0):
        with pytest.raises(ArgumentError, match="MIN"):
            BuildOptions(frames=bad)


def profiles(**options: Any) -> dict[str, list[str]]:
    """The profiles of each network as text, such as ``frames=2:4:6``."""
    job = make_job("random:tiny", BuildOptions(**(PLAIN | options)), ignore_progress)
    return {
        name: [" ".join(f"{symbol}={r}" for symbol, r in profile.items()) for profile in found]
        for name, found in job.profiles.items()
    }


def test_profiles_follow_the_options() -> None:
    """Exact ones for the optimum and for what is named, each with its own decode chunk, then the whole range."""
    found = profiles()
    assert found["denoiser"] == ["branches=2 frames=4", "branches=1:2:2 frames=2:4:6"]
    assert found["vae_decoder"] == ["chunk=2", "chunk=4", "chunk=1:2:4"], "the optimum asked for, and the default for 4"
    assert found["image_encoder"] == [""]
    assert profiles(exact=False)["denoiser"] == ["branches=1:2:2 frames=2:4:6"]
    assert profiles(exact_frames=[6, 4])["denoiser"] == [
        "branches=2 frames=4",
        "branches=2 frames=6",
        "branches=1:2:2 frames=2:4:6",
    ]
    sizes = profiles(height="64:64:128", width="64:128:128", exact_sizes="128x64", frames=4)
    assert sizes["vae_encoder"] == ["height=64 width=128", "height=128 width=64", "height=64:64:128 width=64:128:128"]
    assert sizes["denoiser"][:2] == ["branches=2 height=64 width=128", "branches=2 height=128 width=64"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exact_frames": "9"}, "--exact-frames 9 is outside --frames 2:4:6"),
        ({"exact_sizes": "72x64"}, "--exact-sizes: height 72 is outside --height 64"),
        ({"exact_sizes": "68x64", "height": "64:64:72"}, "--exact-sizes 68x64: sizes are multiples of 8"),
        ({"backend": "onnxruntime", "optimization_level": 2}, "this build makes none"),
        ({"exact_frames": "many"}, "write one like 14,25"),
        ({"exact_frames": 14}, "write one like 14,25"),
        ({"exact_sizes": "576"}, "like 576x1024,1024x576"),
        ({"exact": False, "exact_frames": "4"}, "choose one"),
        ({"backend": "onnxruntime", "exact_frames": "4"}, "this build makes none"),
        ({"targets": "sm90"}, "builds for sm75, sm80, sm86, sm89, sm120, sm121"),
        ({"backend": "onnxruntime", "targets": "sm89"}, "--target is for --backend tensorrt-rtx"),
        ({"device": "cuda:1"}, "--device is for --backend tensorrt, and the backend is tensorrt-rtx"),
        ({"device": "gpu"}, "write cuda, or cuda:1"),
        ({"timing_cache": "times"}, "--timing-cache is for --backend tensorrt"),
        ({"optimization_level": 6}, "must be 0 to 5"),
        ({"branches": 3}, "must be 1 or 2"),
        ({"branches": 2, "split_guidance": True}, "choose one"),
    ],
)
def test_refused_engine_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(words)):
        profiles(**options)


def test_targets_are_read_kindly() -> None:
    assert BuildOptions(targets=" SM89, sm120,").targets == ("sm89", "sm120")


def test_large_decode_chunks_are_built_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default no tensor has over 2^31 elements: 14 frames at 576x1024."""
    messages = list[str]()
    monkeypatch.setattr(options_module._log, "warning", lambda text, *values: messages.append(text % values))
    model = open_checkpoint("random:svd-xt").description.model
    chunk = ranges_of(BuildOptions(), model).chunk
    assert (chunk, messages) == (Range(1, 5, 14), [])
    assert ranges_of(BuildOptions(frames=14), model).chunk == Range(1, 14, 14)
    assert ranges_of(BuildOptions(height=320, width=576), model).chunk == Range(1, 25, 25)
    assert ranges_of(BuildOptions(decode_chunk="1:8:25"), model).chunk.max == 25
    (message,) = messages
    assert "25 frames of 1024x576" in message


def test_progress_of_a_build(small_checkpoint: Path, small_bundle: Path, cache: Path, tmp_path: Path) -> None:
    """Every stage starts and ends; what is taken from the cache has one call, at its end."""
    calls: list[tuple[str, float, float]] = []
    options = BuildOptions(height=32, width=32, backend="onnxruntime", cache=cache)
    build_bundle(small_checkpoint, tmp_path / "bundle", options, lambda *call: calls.append(call))
    reading = "reading the checkpoint"
    stages = [(f"{name}: exporting to ONNX", 1, 1) for name in NETWORKS]
    golden = "golden values"
    assert calls == [(reading, 0, 0), (reading, 1, 1), *stages, (golden, 0, 0), (golden, 1, 1)]


def test_progress_of_an_export(small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, float, float]] = []

    def fail(*_: object) -> None:
        raise ArgumentError("far enough")

    monkeypatch.setattr(build.Exporter, "export", fail)
    with pytest.raises(ArgumentError, match="far enough"):
        build_bundle(small_checkpoint, tmp_path / "b", BuildOptions(height=32, width=32), lambda *c: calls.append(c))
    assert calls[-1] == ("image_encoder: exporting to ONNX", 0, 0)


def test_the_digest_is_of_files_that_exist() -> None:
    assert len(GRAPH_CODE) > 12
    assert all(path.is_file() for path in (*GRAPH_CODE, *PLAN_CODE))
    assert code_digest.graph_code_digest() != code_digest.plan_code_digest()
