"""``svd-trt verify``."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from svd_trt.cli.console import Bars, print_json, stderr, stdout
from svd_trt.engine.bundle import Bundle
from svd_trt.engine.spec import NETWORKS
from svd_trt.errors import ArgumentError, MissingDependencyError
from svd_trt.runtime.backends import PROVIDERS, RUN_BACKENDS
from svd_trt.runtime.pipeline import VideoPipeline

if TYPE_CHECKING:
    from svd_trt.benchmarks.verify import Difference

__all__ = ["command"]

_VIDEO = "video"
_NEEDED = ("torch", "diffusers", "polygraphy", "skimage")


class _Size(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """``1024x576``: width, then height, as videos are spoken of."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        width, x, height = str(value).lower().partition("x")
        if not (x and width.isdecimal() and height.isdecimal()):
            self.fail(f"{value!r} is not a size; write width x height, such as 1024x576", param, ctx)
        return int(height), int(width)


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--model", help="Checkpoint to compare with.  [default: the hub's or the preset that it was built from]")
@click.option("--num-frames", "--frames", "frames", type=click.IntRange(2), multiple=True, help="Try this; repeat.")
@click.option("--size", "sides", type=_Size(), multiple=True, help="Try this frame size; repeat.")
@click.option("--only", type=click.Choice([*NETWORKS, _VIDEO]), multiple=True, help="Compare this alone; repeat.")
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True, help="Denoising steps of the video.")
@click.option("--seed", type=click.IntRange(0), default=42, show_default=True, help="Of the video's noise.")
@click.option("--tolerance", type=click.FloatRange(0), metavar="DB", help="Least PSNR of everything.")
@click.option("--backend", type=click.Choice(RUN_BACKENDS), default="auto", show_default=True, help="As for infer.")
@click.option("--device", metavar="DEVICE", help="As for infer.")
@click.option("--provider", type=click.Choice(PROVIDERS), help="As for infer.")
@click.option("--json", "as_json", is_flag=True, help="Print the differences as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but the result and errors.")
def command(
    bundle: Path,
    model: str | None,
    frames: tuple[int, ...],
    sides: tuple[tuple[int, int], ...],
    only: tuple[str, ...],
    steps: int,
    seed: int,
    tolerance: float | None,
    *,
    as_json: bool,
    quiet: bool,
    **where: Any,
) -> None:
    """Compare each network of BUNDLE, and a whole video, with diffusers' own in fp32 on the same checkpoint.

    Least PSNR: 60 dB for networks and 50 dB for the worst frame of the video in an fp32 bundle, 40 and 30 dB in an
    fp16 one. Beyond that the exit code is 1. Networks run where `svd-trt infer` would run them, and diffusers runs
    on the CPU: at full size, choose few frames.

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
    with VideoPipeline.open(opened, **where) as pipe, Bars(console) as bars:
        found = _compare(pipe, model or _source_of(opened), bars, console, frames, sides, only, steps, seed, tolerance)
    failed = [d for d in found if not d.ok]
    if as_json:
        rows = [_plain(d) for d in found]
        print_json({"ok": not failed, "differences": rows})
    else:
        stdout().print(_table(found))
    if failed:
        names = ", ".join(dict.fromkeys(d.what for d in failed))
        console.print(
            f"beyond tolerance: {names}; build the bundle again from this checkpoint"
            + ("" if opened.manifest.precision == "fp32" else ", or with --precision fp32")
        )
        raise click.exceptions.Exit(1)
    console.print("all within tolerance")


def _source_of(bundle: Bundle) -> str:
    """What the bundle was built from, where its name finds it from anywhere: a hub id, or random weights.

    Raises:
        UsageError: it was a folder or a file.
    """
    source = bundle.manifest.source
    if source.commit is None and not source.model.startswith("random:"):
        raise click.UsageError(f"give --model: where the checkpoint of {bundle.path} ({source.model}) is now")
    return source.model


def _compare(
    pipe: VideoPipeline,
    model: str,
    bars: Bars,
    console: Any,
    frames: tuple[int, ...],
    sides: tuple[tuple[int, int], ...],
    only: tuple[str, ...],
    steps: int,
    seed: int,
    tolerance: float | None,
) -> list[Difference]:
    from svd_trt.benchmarks.diffusers_runs import load_pipeline
    from svd_trt.benchmarks.verify import differing_weights, sizes_to_try, verify_networks, verify_videos
    from svd_trt.export.checkpoint import open_checkpoint

    sizes = sizes_to_try(pipe, frames, sides)
    checkpoint = open_checkpoint(model)
    if checkpoint.description.model != pipe.bundle.manifest.model:
        raise ArgumentError(f"{model} is another architecture than {pipe.bundle.path} was built from")
    if differing := differing_weights(pipe, checkpoint):
        console.print(f"{model} has other weights than the bundle was built from: {', '.join(differing)}")
    networks = [name for name in NETWORKS if not only or name in only]
    found: list[Difference] = []
    task = bars.add("verify", None)
    for difference in verify_networks(
        pipe, checkpoint, sizes, networks, tolerance, lambda name: bars.update(task, 0, note=name)
    ):
        found.append(difference)
    if not only or _VIDEO in only:
        bars.update(task, 0, note=_VIDEO)
        import torch

        reference = load_pipeline(model, torch.float32)
        reference.set_progress_bar_config(disable=True)
        found += verify_videos(pipe, reference, sizes, steps, seed, tolerance)
    return found


def _plain(d: Difference) -> dict[str, Any]:
    """As JSON has it, which knows no NaN."""
    fields = dataclasses.asdict(d) | {"ok": d.ok}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def _table(found: list[Difference]) -> Table:
    table = Table("output", "shape", "max abs", "mean abs", "PSNR", "least", "", box=None, pad_edge=False)
    for d in found:
        shape = "x".join(map(str, d.shape))
        psnr, least = f"{d.psnr_db:.1f} dB", f"{d.least_db:g} dB"
        table.add_row(d.what, shape, f"{d.max_abs:.2g}", f"{d.mean_abs:.2g}", psnr, least, "ok" if d.ok else "FAILED")
    return table
