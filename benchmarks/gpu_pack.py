"""Pack what a GPU machine without a package index lacks: ``python -m svd_trt.benchmarks.gpu_pack DIR``.

That machine has Python, torch with CUDA, and a checkout of this project. The pack has all other packages that
`svd_trt.benchmarks.gpu_probe` needs, in the versions of this environment, as parts of a size that can be carried.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Literal, TypeAlias

import click
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from svd_trt.benchmarks.gpu_code import keep_gpu

__all__ = ["Backend", "main", "pack", "packages", "split_file"]

Backend: TypeAlias = Literal["tensorrt-rtx", "onnxruntime-gpu"]

_EXTRAS = {"tensorrt-rtx": ("export", "rtx"), "onnxruntime-gpu": ("export",)}
_FOR_TESTS = ("pytest", "pytest-xdist")
_ONNXRUNTIME_GPU = {"onnxruntime-gpu": "1.31.1"}  # the newest with wheels; not installed here
_ON_THE_MACHINE = ("torch",)  # with all that it depends on, unless another package needs that too
_PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17, 12, 5)))
_LEFT_OUT = {"__pycache__", "tests", "bin", "include", "libtensorrt_plugins.so"}  # 70 MB that no step loads
# Python has the filter from 3.11.4 on; earlier ones ignore the attribute.
_UNPACK = (
    "import sys, tarfile; pack = tarfile.open(fileobj=sys.stdin.buffer, mode='r|xz'); "
    "pack.extraction_filter = getattr(tarfile, 'data_filter', None); pack.extractall(sys.argv[1])"
)


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--python", default="3.12", show_default=True, help="Version of Python on the other machine.")
@click.option("--backend", type=click.Choice(list(_EXTRAS)), default="tensorrt-rtx", show_default=True)
@click.option("--gpu", metavar="SM", help="Keep the code for this GPU alone in the libraries, such as sm90: a third.")
@click.option("--part-mib", type=click.IntRange(1), default=60, show_default=True, help="Size of a part.")
def main(directory: Path, python: str, backend: Backend, gpu: str | None, part_mib: int) -> None:
    """Write the parts to DIRECTORY; compressing them takes minutes."""
    capability = None if gpu is None else _capability(gpu)
    directory.mkdir(parents=True, exist_ok=True)
    wanted = [f"{name}=={version}" for name, version in sorted(packages(backend).items())]
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        tree, archive = Path(folder, "tree"), Path(folder, "pack.tar.xz")
        platforms = [option for name in _PLATFORMS for option in ("--platform", name)]
        fixed = ["--no-deps", "--no-compile", "--only-binary=:all:", "--python-version", python, *platforms]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tree), *fixed, *wanted]
        subprocess.run(command, check=True)  # noqa: S603  (our own interpreter)
        if capability is not None:
            for library in tree.rglob("*.so*"):
                keep_gpu(library, capability)
        pack(tree, archive)
        parts = split_file(archive, directory, part_mib << 20)
    click.echo(f"wrote {len(parts)} parts with {len(wanted)} packages. On the other machine, in the checkout:")
    click.echo(f'  cat PARTS/*.part | python3 -c "{_UNPACK}" packages')
    click.echo("  PYTHONPATH=src:packages python3 -m svd_trt.benchmarks.gpu_probe --limit 590 --missing")


def _capability(gpu: str) -> int:
    number = gpu.removeprefix("sm")
    if not (number.isascii() and number.isdigit()):
        raise click.BadParameter(f"{gpu!r} is not like sm90", param_hint="--gpu")
    return int(number)


def packages(backend: Backend = "tensorrt-rtx") -> dict[str, str]:
    """Names and versions of the packages that the probe needs, without torch and what torch alone needs.

    They are those of this environment. With ``onnxruntime-gpu``, that takes the place of onnxruntime.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(f"svd-trt[{','.join(_EXTRAS[backend])}]"), *map(Requirement, (*_FOR_TESTS, "cuda-python"))]
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if name in _ON_THE_MACHINE or (name, extras) in seen:
            continue
        seen.add((name, extras))
        for text in importlib.metadata.requires(name) or ():
            inner = Requirement(text)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras | {""}):
                waiting.append(inner)
        if name != "svd-trt":
            found[name] = importlib.metadata.version(name)
    if backend == "onnxruntime-gpu":
        del found["onnxruntime"]
        found |= _ONNXRUNTIME_GPU
    return found


def pack(tree: Path, archive: Path) -> None:
    """Compress the files of ``tree`` that running needs."""

    def choose(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if _LEFT_OUT & set(Path(member.name).parts) else member

    with tarfile.open(archive, "w:xz", preset=1) as target:  # the default takes six times as long
        target.add(tree, arcname=".", filter=choose)


def split_file(file: Path, directory: Path, size: int) -> list[Path]:
    """Cut ``file`` into parts of ``size`` bytes in ``directory``, in the order of their names."""
    parts: list[Path] = []
    with file.open("rb") as source:
        while content := source.read(size):
            parts.append(directory / f"{len(parts):02}.part")
            parts[-1].write_bytes(content)
    return parts


if __name__ == "__main__":
    main()
