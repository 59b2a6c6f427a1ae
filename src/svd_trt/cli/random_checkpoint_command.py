"""``svd-trt random-checkpoint``."""

from __future__ import annotations

from pathlib import Path

import click

from svd_trt.cli.console import stderr
from svd_trt.errors import MissingDependencyError
from svd_trt.export.presets import PRESETS

__all__ = ["command"]


@click.command("random-checkpoint", short_help="Write a checkpoint with random weights to DIRECTORY.")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="tiny",
    show_default=True,
    help="Size of the model. " + " ".join(f"{name}: {preset.summary}." for name, preset in PRESETS.items()),
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of the weights.")
@click.option("--variant", type=click.Choice(["fp16"]), help="Store half precision, in files named as the hub does.")
def command(directory: Path, preset: str, seed: int, variant: str | None) -> None:
    """Write a Stable Video Diffusion checkpoint with random weights to DIRECTORY.

    It has the real format, and its videos are noise: enough to try svd-trt, or to test programs that use it, without
    the licensed weights. `svd-trt build random:PRESET` needs no such folder.

    \b
        svd-trt random-checkpoint ./tiny
        svd-trt build ./tiny -o ./tiny-bundle --height 128 --width 192
    """
    console = stderr()
    with console.status("drawing weights"):
        try:
            from svd_trt.export.silence import silence_libraries

            with silence_libraries():  # importing diffusers' pipeline warns about torchvision
                from svd_trt.export.random_checkpoint import write_random_checkpoint
        except ModuleNotFoundError as error:
            raise MissingDependencyError("svd-trt random-checkpoint", "export") from error
        write_random_checkpoint(directory, preset, seed, variant=variant)
    size = " --height 128 --width 192" if preset == "tiny" else ""
    console.print(f"wrote {directory}\nnext: svd-trt build {directory} -o BUNDLE{size}")
