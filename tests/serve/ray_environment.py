"""Ray, in an environment of its own beside the packages of svd-trt serve."""

from __future__ import annotations

from pathlib import Path

from tests.serve.environments import ROOT, environment_of, pins

RAY = "ray[serve]==2.60.0"
SERVER = ("av", "click", "fastapi", "imageio", "msgspec", "numpy", "onnxruntime", "pillow", "platformdirs")
SERVER = (*SERVER, "prometheus_client", "python-multipart", "rich", "uvicorn")


def environment(folder: Path) -> Path:
    """The interpreter of the environment, which takes 0.7 GB."""
    return environment_of(folder, [RAY, *pins(SERVER)], "--no-compile", "-c", str(ROOT / "constraints.txt"))
