"""The wheel, the public names, and a runtime without torch."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # With the environment's own setuptools, so nothing is downloaded; of a copy, because builds add folders.
    sources = tmp_path_factory.mktemp("sources")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        source, target = ROOT / name, sources / name
        if source.exists() or source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink():
                target.symlink_to(source.readlink())
            else:
                target.write_bytes(source.read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(out), str(sources)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_wheel_holds_every_module_once(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if ".dist-info/" not in n]
    folders = {"export": "export", "engine": "engine", "runtime": "runtime", "benchmarks": "benchmarks"}
    expected = {f"svd_trt/{p.relative_to(ROOT).as_posix()}" for f in folders for p in (ROOT / f).rglob("*.py")}
    expected |= {f"svd_trt/{p.relative_to(ROOT / 'src/svd_trt')}" for p in (ROOT / "src/svd_trt").glob("*.py")}
    expected |= {f"svd_trt/cli/{p.name}" for p in (ROOT / "src/svd_trt/cli").glob("*.py")} | {"svd_trt/py.typed"}
    served = ROOT / "src/svd_trt/serve"
    expected |= {f"svd_trt/serve/{p.relative_to(served)}" for p in [*served.rglob("*.py"), *served.glob("page/*")]}
    assert sorted(names) == sorted(expected)


def test_no_extra_takes_the_cuda_python_that_holds_the_gil_while_it_waits() -> None:
    """With 12.9.0, the thread that decodes and the one that writes the video would take turns."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [Requirement(line) for lines in extras.values() for line in lines if line.startswith("cuda-python")]
    assert len(wanted) >= 3
    assert not any(one.specifier.contains("12.9.0") for one in wanted)


PROBE = """
import sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "diffusers", "transformers", "onnx", "huggingface_hub"}:
            raise AssertionError(f"{name} was asked for")

sys.meta_path.insert(0, Refuse())
from svd_trt.cli.main import main
main()
"""


def test_infer_runs_where_torch_is_not_installed(
    wheel: Path, small_bundle: Path, picture_file: Path, tmp_path: Path
) -> None:
    """Only the wheel and its dependencies are installed, and ``infer`` does not try to import anything else."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run(install, check=True, env=environment, cwd=tmp_path)
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    )
    installed = {line.split("==")[0].lower() for line in listed.stdout.splitlines()}
    assert not installed & {"torch", "diffusers", "transformers", "onnx", "huggingface-hub", "huggingface_hub"}
    out = tmp_path / "o.mp4"
    fast = ["--num-inference-steps", "2", "--num-frames", "3"]
    for start in (["-m", "svd_trt.cli"], ["-c", PROBE]):
        done = subprocess.run(
            [python, *start, "infer", small_bundle, picture_file, "-o", out, *fast],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert out.stat().st_size > 1000
        out.unlink()
    refused = subprocess.run(
        [python, "-m", "svd_trt.cli", "build", "x", "-o", "y"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 1
    assert "pip install 'svd-trt[export]'" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_importing_the_package_imports_nothing_heavy() -> None:
    probe = "import sys, svd_trt; print([m for m in ('numpy', 'onnxruntime', 'torch', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_resolve_and_are_documented() -> None:
    import svd_trt

    for name in svd_trt.__all__:
        found = getattr(svd_trt, name)
        assert name == "__version__" or inspect.getdoc(found), name
    with pytest.raises(AttributeError):
        _: Any = svd_trt.nonsense


def test_every_error_is_public() -> None:
    import svd_trt
    from svd_trt import errors

    classes = {name for name in errors.__all__ if name.endswith("Error")}
    assert classes <= set(svd_trt.__all__)
    assert all(issubclass(getattr(svd_trt, name), svd_trt.SvdTrtError) for name in classes)
    tree = re.findall(r"─ (\w+)", errors.__doc__ or "")
    assert set(tree) == classes - {"SvdTrtError"}, "the tree in the module's docstring is complete"


def test_no_two_modules_share_a_file_name() -> None:
    folders = [ROOT / name for name in ("benchmarks", "engine", "export", "runtime", "src/svd_trt")]
    common = {"__init__.py", "__main__.py"}
    names = [path.name for folder in folders for path in folder.rglob("*.py") if path.name not in common]
    assert [name for name, count in Counter(names).items() if count > 1] == []
