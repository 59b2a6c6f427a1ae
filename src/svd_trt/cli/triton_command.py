"""``svd-trt triton``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from svd_trt.cli.console import Bars, stderr
from svd_trt.cli.sizes import ByteSize
from svd_trt.runtime.backends import PROVIDERS, Provider
from svd_trt.serve.triton.triton_config import DEFAULT_QUEUE, Gpus, ModelOptions
from svd_trt.serve.triton.triton_repository import CLIENT, CONFIG, MODEL_FILE, WrittenModel, write_model
from svd_trt.units import format_bytes

__all__ = ["command"]


class _Gpus(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """``auto``, ``none``, or the indexes of GPUs such as ``0,1``."""

    name = "gpus"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Gpus:
        if value in ("auto", "none"):
            return value  # type: ignore[no-any-return]
        parts = value.split(",")
        if not all(part.isascii() and part.isdecimal() and len(part) < 4 for part in parts):
            self.fail(f"{value!r} is neither auto, none nor the numbers of GPUs such as 0,1", param, ctx)
        return tuple(dict.fromkeys(map(int, parts)))


@click.command("triton", short_help="Write BUNDLE as a model of NVIDIA's Triton Inference Server.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "repository",
    required=True,
    type=click.Path(path_type=Path),
    metavar="REPOSITORY",
    help="Model repository to write to; other models in it stay.",
)
@click.option("--name", help="Name of the model.  [default: that of the bundle's folder]")
@click.option("--copy", is_flag=True, help="Copy the bundle into the repository.  [default: link to it]")
@click.option(
    "--gpus",
    type=_Gpus(),
    default="auto",
    metavar="auto|none|N,N",
    show_default=True,
    help="GPUs that run the model, such as 0,1. auto is every GPU that Triton sees, or the CPU if there is none or the "
    "bundle has no engines.",
)
@click.option(
    "--instances",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Videos that are made at the same time on each GPU; each needs the memory of one.",
)
@click.option(
    "--max-queue",
    type=click.IntRange(1, 100_000),
    default=DEFAULT_QUEUE,
    show_default=True,
    help="Requests that may wait; Triton refuses more.",
)
@click.option("--provider", type=click.Choice(PROVIDERS), help="Provider of ONNX Runtime, as for infer.")
@click.option("--vram-budget", type=ByteSize(), help="Most device memory of each instance, such as 8GB, as for infer.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def command(
    bundle: Path,
    repository: Path,
    name: str | None,
    copy: bool,
    gpus: Gpus,
    instances: int,
    max_queue: int,
    provider: Provider | None,
    vram_budget: int | None,
    quiet: bool,
) -> None:
    """Write BUNDLE into a model repository of NVIDIA's Triton Inference Server, and print how to run it.

    The model takes a picture and the arguments of infer as tensors, and sends frames as they are decoded (decoupled
    Python backend). A client may cancel its request. A model that was written earlier is brought up to date, in one
    step; what the command did not write, or what was changed since, is never replaced.

    \b
    Examples:
        svd-trt triton svd-xt -o models
        svd-trt triton svd-xt -o models --name xt-8gb --vram-budget 8GB --gpus 0,1 --max-queue 32
        svd-trt triton svd-xt -o /srv/models --copy
    """
    options = ModelOptions(gpus, instances, max_queue, provider, vram_budget)
    console = stderr(quiet=quiet)
    with Bars(console) as bars:
        progress = bars.for_stages(_bytes)
        model = write_model(bundle, repository, name=name, options=options, copy=copy, progress=progress)
    if not quiet:
        click.echo(_report(model))


def _bytes(done: float, total: float) -> str:
    return f"{format_bytes(done)} of {format_bytes(total)}"


def _report(model: WrittenModel) -> str:
    """What was written, and the commands that run it and ask it."""
    copied = "a copy of the bundle" if model.copied else f"a link to {model.bundle}"
    done = "brought up to date" if model.replaced else "wrote"
    repository = shlex.quote(str(model.repository))
    mounts = {model.repository: Path("/models")} | ({} if model.copied else {model.bundle: model.bundle})
    volumes = " ".join(f"-v {shlex.quote(f'{source}:{target}:ro')}" for source, target in mounts.items())
    return f"""{done} {model.path}: {CONFIG}, {MODEL_FILE}, {CLIENT}, and {copied}

# Triton in a container; deploy/triton.Dockerfile adds svd-trt to NVIDIA's image.
docker build -t svd-trt-triton -f deploy/triton.Dockerfile .
docker run --rm --gpus all --shm-size 1g -p 127.0.0.1:8001:8001 {volumes} svd-trt-triton

# Or Triton from a wheel, in an environment of its own in which svd-trt is installed too.
pip install 'nvidia-pytriton==0.7.0' 'numpy<2'
python -m svd_trt.serve.triton.triton_wheel --model-repository {repository} \\
    --grpc-address 127.0.0.1 --http-address 127.0.0.1 --metrics-address 127.0.0.1

# A video.
pip install 'tritonclient[grpc]' pillow
python {shlex.quote(str(model.path / CLIENT))} picture.png -o video.webp seed=42"""
