"""Virtual environments with packages that the project's own does not have, kept for later runs."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from collections.abc import Collection, Sequence
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parent.parent.parent


def pins(names: Collection[str]) -> list[str]:
    """The lines of constraints.txt that are of ``names``, in lower case."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line.partition("==")[0].lower() in names]


def environment_of(folder: Path, packages: Sequence[str], *options: str) -> Path:
    """The interpreter of an environment in ``folder`` with ``packages`` and this tree. ``options`` are those of pip."""
    key = hashlib.sha256("\n".join([sys.version, *packages]).encode()).hexdigest()[:16]
    with FileLock(folder / f"{key}.lock"):
        if not (folder / key / "complete").exists():
            venv.create(folder / key, with_pip=True, clear=True)
            clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_CONSTRAINT")}
            command = [folder / key / "bin/python", "-m", "pip", "install", "-q", *options, *packages]
            subprocess.run(command, check=True, env=clean)
            (site,) = (folder / key).glob("lib/python*/site-packages")
            (site / "this-tree.pth").write_text(f"{ROOT / 'src'}\n")
            (folder / key / "complete").touch()
    return folder / key / "bin/python"
