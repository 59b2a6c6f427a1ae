"""The pack for a GPU machine has every package that the probe imports, and comes apart as it says."""

from __future__ import annotations

import mmap
import shutil
import subprocess
import sys
from pathlib import Path

from svd_trt.benchmarks.gpu_code import entries, keep_gpu
from svd_trt.benchmarks.gpu_pack import _UNPACK, pack, packages, split_file

ROOT = Path(__file__).parents[2]


def test_packages_are_pinned_and_complete_without_torch() -> None:
    found = packages()
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    versions = {name.lower().replace("_", "-"): version.split(" ")[0] for name, version in pinned.items()}
    assert {name: versions[name] for name in found} == found
    assert {"diffusers", "transformers", "onnxruntime", "cuda-bindings", "tensorrt-rtx-cu13-bindings"} <= set(found)
    assert {"pytest", "pytest-xdist", "msgspec", "click", "psutil", "httpx2"} <= set(found)
    assert not {"torch", "triton", "setuptools", "mypy", "openvino", "matplotlib"} & set(found)


def test_onnxruntime_gpu_takes_the_place_of_onnxruntime() -> None:
    """Both have the same module, so a pack with both would have whichever was unpacked last."""
    found, usual = packages("onnxruntime-gpu"), packages()
    assert set(usual) - set(found) == {
        "onnxruntime",
        "onnxruntime-ep-nv-tensorrt-rtx-cu13",
        "tensorrt-rtx-cu13-bindings",
    }
    assert set(found) - set(usual) == {"onnxruntime-gpu"}


def test_parts_unpack_to_the_same_files(tmp_path: Path) -> None:
    tree, parts = tmp_path / "tree", tmp_path / "parts"
    (tree / "package" / "__pycache__").mkdir(parents=True)
    (tree / "package" / "__pycache__" / "module.pyc").write_bytes(b"x")
    (tree / "package" / "module.py").write_text("value = 1\n")
    (tree / "library.so").write_bytes(bytes(range(256)) * 20)
    parts.mkdir()
    pack(tree, tmp_path / "pack.tar.xz")
    made = split_file(tmp_path / "pack.tar.xz", parts, 100)
    assert len(made) > 3
    assert all(part.stat().st_size <= 100 for part in made)
    content = b"".join(part.read_bytes() for part in sorted(parts.glob("*.part")))
    subprocess.run([sys.executable, "-c", _UNPACK, tmp_path / "packages"], input=content, check=True)
    unpacked = {path.relative_to(tmp_path / "packages"): path for path in (tmp_path / "packages").rglob("*.*")}
    assert set(map(str, unpacked)) == {"package/module.py", "library.so"}
    assert unpacked[Path("library.so")].read_bytes() == (tree / "library.so").read_bytes()


def test_code_for_other_gpus_is_removed(tmp_path: Path) -> None:
    """From a real library, with code for five GPUs; nothing else of it changes."""
    import onnxruntime_ep_nv_tensorrt_rtx

    library = tmp_path / "libtensorrt_plugins.so"
    original = Path(next(iter(onnxruntime_ep_nv_tensorrt_rtx.__path__)), library.name)
    shutil.copy(original, library)
    removed = keep_gpu(library, 89)
    before, after = original.read_bytes(), library.read_bytes()
    with original.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = list(entries(content))
    assert {80, 86, 89, 90, 120} <= {capability for _, capability, _, _ in found}
    unchanged, last = [], 0
    for kind, capability, start, stop in found:
        unchanged.append((last, start))
        stays = kind == 1 or capability in (80, 86, 89)
        assert after[start:stop] == (before[start:stop] if stays else bytes(stop - start))
        last = stop
    assert all(before[a:b] == after[a:b] for a, b in [*unchanged, (last, len(before))])
    assert (
        removed == sum(stop - start for kind, gpu, start, stop in found if kind != 1 and gpu in (90, 120)) > 10_000_000
    )


def test_a_file_without_code_for_gpus_stays(tmp_path: Path) -> None:
    (tmp_path / "library.so").write_bytes(b"\x50\xed\x55\xba" * 5 + b"no container")
    assert keep_gpu(tmp_path / "library.so", 90) == 0
