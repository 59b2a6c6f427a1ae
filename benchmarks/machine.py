"""The machine and the software that a result was measured with: ``python -m svd_trt.benchmarks.machine``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from svd_trt.engine.driver import list_gpus, load_driver
from svd_trt.errors import SvdTrtError
from svd_trt.version import __version__

__all__ = ["describe_clocks", "describe_machine"]

_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "cuda-bindings",
    "tensorrt",
    "tensorrt-rtx-cu13-bindings",
    "numpy",
    "openvino",
)


def describe_machine() -> dict[str, Any]:
    """Processor, memory, system, package versions and the commit, as plain data."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        **describe_clocks(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "svd_trt": __version__,
        "commit": _commit(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def describe_clocks() -> dict[str, Any]:
    """What changes while a machine works: the CPU's clock and load, and a line for each GPU with its clocks."""
    return {"cpu_mhz": _cpu_mhz(), "load_average": round(os.getloadavg()[0], 2), "gpu": _gpu_names()}


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _cpu_mhz() -> float | None:
    """Mean of the processors' current clocks."""
    lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("cpu MHz")]
    return round(sum(float(line.partition(":")[2]) for line in lines) / len(lines), 1) if lines else None


def _gpu_names() -> list[str]:
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    return done.stdout.strip().splitlines()


def _commit() -> str | None:
    """The commit that is checked out, followed by ``+`` if files differ from it."""

    def git(*arguments: str) -> str:
        here = Path(__file__).resolve().parent
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Print the description; with ``--need-gpu``, exit with 1 and the reason if there is no usable GPU."""
    if "--need-gpu" in sys.argv[1:]:
        try:
            list_gpus(load_driver())
        except SvdTrtError as error:
            sys.exit(str(error))
    print(json.dumps(describe_machine(), indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
