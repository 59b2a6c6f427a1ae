"""``svd-trt verify``."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from rich.console import Console
from rich.table import Table

from svd_trt.cli.bundle_source import findable_changes, findable_source
from svd_trt.cli.console import Bars, print_json, stderr, stdout
from svd_trt.cli.provider_log import end_log_of
from svd_trt.engine.bundle import Bundle
from svd_trt.engine.spec import NetworkName
from svd_trt.errors import ArgumentError, MissingDependencyError
from svd_trt.runtime.backends import PROVIDERS, RUN_BACKENDS, Provider, RunBackend
from svd_trt.runtime.pipeline import VideoPipeline

if TYPE_CHECKING:
    from svd_trt.export.verify import Difference

__all__ = ["command"]

_VIDEO = "video"
_NEEDED = ("torch", "diffusers", "polygraphy")


class _Size(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """``1024x576``, width first as is usual for videos; the value is (height, width)."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        width, x, height = str(value).lower().partition("x")
        if not (x and width.isdecimal() and height.isdecimal()):
            self.fail(f"{value!r} is not a size; write width x height, such as 1024x576", param, ctx)
        return int(height), int(width)


@click.command("verify", short_help="Compare the networks and a video of BUNDLE with diffusers.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--model", help="Checkpoint to compare with.  [default: the hub id or preset it was built from]")
@click.option("--config", metavar="svd|svd-xt|FOLDER", help="As for build, if the checkpoint is a single file.")
@click.option("--variant", help="As for build.")
@click.option("--unet", metavar="FILE|FOLDER|HUB_ID", help="As for build.  [default: what the bundle was built with]")
@click.option(
    "--lora",
    "loras",
    metavar="FILE[:SCALE]",
    multiple=True,
    help="As for build; repeatable.  [default: what the bundle was built with]",
)
@click.option(
    "--num-frames",
    "--frames",
    "frames",
    type=click.IntRange(2),
    multiple=True,
    help="Frame count to compare; repeatable.",
)
@click.option("--size", "sides", type=_Size(), multiple=True, help="Frame size to compare; repeatable.")
@click.option(
    "--only",
    type=click.Choice([*get_args(NetworkName), _VIDEO]),
    multiple=True,
    help="Compare nothing else; repeatable.",
)
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True, help="Denoising steps of the video.")
@click.option("--seed", type=click.IntRange(0), default=42, show_default=True, help="Seed of the video's noise.")
@click.option("--tolerance", type=click.FloatRange(0), metavar="DB", help="Least PSNR of every output.")
@click.option("--backend", type=click.Choice(RUN_BACKENDS), default="auto", show_default=True, help="As for infer.")
@click.option("--device", metavar="DEVICE", help="As for infer.")
@click.option("--provider", type=click.Choice(PROVIDERS), help="As for infer.")
@click.option("--json", "as_json", is_flag=True, help="Print the differences as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but the result and errors.")
def command(
    bundle: Path,
    model: str | None,
    *,
    backend: RunBackend,
    device: str | None,
    provider: Provider | None,
    as_json: bool,
    quiet: bool,
    **compared: Any,
) -> None:
    """Compare each network of BUNDLE, and a whole video, with diffusers in fp32 on the same checkpoint.

    The exit code is 1 if a PSNR is below the least that passes: 60 dB for networks and 50 dB for the worst frame of
    the video in an fp32 bundle, 40 and 30 dB in an fp16 bundle. Networks run on the device that `svd-trt infer` would
    choose, diffusers runs on the CPU: at full size, compare few frames.

    \b
    Examples:
        svd-trt verify svd-xt --model stabilityai/stable-video-diffusion-img2vid-xt --frames 2
        svd-trt verify bundle --frames 2 --frames 9 --size 64x64 --size 160x136
        svd-trt verify bundle --only denoiser --json
    """
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise MissingDependencyError(f"svd-trt verify ({', '.join(missing)})", "export,bench")
    opened = Bundle.open(bundle)
    console = stderr(quiet=quiet)
    if model is None:
        compared["variant"] = compared["variant"] or opened.manifest.source.variant
    end_log_of(provider)
    with VideoPipeline.open(opened, backend=backend, device=device, provider=provider) as pipe:
        differences = _compare(pipe, model or findable_source(opened), console, **compared)
    failed = [d for d in differences if not d.ok]
    if as_json:
        print_json({"ok": not failed, "differences": [_plain(d) for d in differences]})
    else:
        stdout().print(_table(differences))
    if failed:
        names = ", ".join(dict.fromkeys(d.what for d in failed))
        console.print(
            f"beyond tolerance: {names}; build the bundle again from this checkpoint"
            + ("" if opened.manifest.precision == "fp32" else ", or with --precision fp32")
        )
        raise click.exceptions.Exit(1)
    console.print("all within tolerance")


def _compare(
    pipe: VideoPipeline,
    model: str,
    console: Console,
    *,
    frames: Sequence[int],
    sides: Sequence[tuple[int, int]],
    only: Sequence[str],
    steps: int,
    seed: int,
    tolerance: float | None,
    config: str | None,
    variant: str | None,
    unet: str | None,
    loras: Sequence[str],
) -> list[Difference]:
    import torch

    from svd_trt.export.checkpoint_kinds import open_checkpoint
    from svd_trt.export.reference import load_pipeline
    from svd_trt.export.verify import differing_weights, sizes_to_try, verify_networks, verify_videos

    sizes = sizes_to_try(pipe, frames, sides)
    built_unet, built_loras = findable_changes(pipe.bundle)
    checkpoint = open_checkpoint(
        model, config=config, variant=variant, unet=unet or built_unet, loras=loras or built_loras
    )
    if checkpoint.description.model != pipe.bundle.manifest.model:
        raise ArgumentError(f"{model} is another architecture than {pipe.bundle.path} was built from")
    if differing := differing_weights(pipe, checkpoint):
        console.print(f"{model} has other weights than the bundle was built from: {', '.join(differing)}")
    there = pipe.bundle.manifest.networks
    if missing := [name for name in only if name not in (*there, _VIDEO)]:
        raise ArgumentError(f"{pipe.bundle.path} has no {missing[0]}; name one of {', '.join(there)}, {_VIDEO}")
    networks = [name for name in there if not only or name in only]
    with Bars(console) as bars:
        task = bars.add("verify", None)

        def progress(stage: str, done: float, total: float) -> None:
            bars.update(task, done, total, note=stage)

        differences = list(verify_networks(pipe, checkpoint, sizes, networks, tolerance, progress))
        if not only or _VIDEO in only:
            reference = load_pipeline(checkpoint, torch.float32)
            reference.set_progress_bar_config(disable=True)
            differences += verify_videos(pipe, reference, sizes, steps, seed, tolerance, progress)
    return differences


def _plain(d: Difference) -> dict[str, Any]:
    """The fields for JSON, in which NaN and infinity become null."""
    fields = dataclasses.asdict(d) | {"ok": d.ok}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def _table(differences: Sequence[Difference]) -> Table:
    table = Table("output", "shape", "max abs", "mean abs", "PSNR", "least", "", box=None, pad_edge=False)
    for d in differences:
        shape = "x".join(map(str, d.shape))
        psnr, least = f"{d.psnr_db:.1f} dB", f"{d.least_db:g} dB"
        table.add_row(d.what, shape, f"{d.max_abs:.2g}", f"{d.mean_abs:.2g}", psnr, least, "ok" if d.ok else "FAILED")
    return table
