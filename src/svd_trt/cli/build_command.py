"""``svd-trt build``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import TaskID
from rich.table import Table

from svd_trt.cli.console import Bars, log_to, print_json, stderr
from svd_trt.engine.spec import Range
from svd_trt.errors import ArgumentError
from svd_trt.export.build import BuildResult, Stage, build_bundle
from svd_trt.export.options import DEFAULT_FF_CHUNKS, MOST_FF_CHUNKS, BuildOptions
from svd_trt.progress import Progress
from svd_trt.units import format_bytes, format_seconds

__all__ = ["command"]


class _RangeType(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on
    """``14`` or ``2:14:25``."""

    name = "range"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Range:
        if isinstance(value, Range):
            return value
        try:
            return Range.parse(value)
        except ArgumentError as error:
            self.fail(str(error), param, ctx)


def _range(flag: str, default: object, text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    if default is not None:
        text = f"{text}  [default: {default}]"
    return click.option(
        flag, type=_RangeType(), metavar="N|MIN:OPT:MAX", default=default, help=text, show_default=False
    )


_DEFAULTS = BuildOptions()


@click.command("build", short_help="Turn the checkpoint MODEL into a bundle.")
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="BUNDLE", help="Folder to write."
)
@_range("--height", _DEFAULTS.height, "Frame height in pixels, a multiple of 8.")
@_range("--width", _DEFAULTS.width, "Frame width in pixels, a multiple of 8.")
@_range("--frames", _DEFAULTS.frames, "Frames of a video.  [default: 2 up to the checkpoint's 14 or 25]")
@_range(
    "--decode-chunk",
    _DEFAULTS.decode_chunk,
    "Frames decoded together.  [default: 1 up to all, at most 14 at 576x1024]",
)
@_range("--batch", _DEFAULTS.batch, "Videos denoised together.")
@click.option(
    "--exact/--no-exact",
    default=True,
    show_default=True,
    help="Compile the engines for the OPT of every range alone too: more fuses, so that size is faster. It takes more "
    "build time and a little more disk.",
)
@click.option(
    "--exact-frames",
    metavar="N,...",
    default="",
    help="More frame counts to compile for alone, such as 14,25.",
)
@click.option(
    "--exact-sizes",
    metavar="HEIGHTxWIDTH,...",
    default="",
    help="More sizes to compile for alone, such as 576x1024,1024x576.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp16", "fp32"]),
    default=_DEFAULTS.precision,
    show_default=True,
    help="Of the networks; the VAE encoder computes in fp32 either way.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "tensorrt-rtx", "onnxruntime"]),
    default=_DEFAULTS.backend,
    show_default=True,
    help="Engines to build beside the ONNX networks: TensorRT (on a GPU), TensorRT for RTX (with or without one), "
    "or none. auto takes the first that is installed and can build here.",
)
@click.option("--device", metavar="cuda[:N]", help="GPU that TensorRT builds on, and for.  [default: cuda, the first]")
@click.option(
    "--target",
    "targets",
    metavar="SM,...",
    default="",
    help="GPUs that TensorRT for RTX builds for, such as sm89,sm120; all are in one engine.  [default: those from "
    "Ampere on; Turing, sm75, must be named]",
)
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    metavar="0-5",
    help="How long the builder looks for fast kernels.  [default: TensorRT's own, 3]",
)
@click.option(
    "--timing-cache",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where TensorRT keeps the times of kernels that it tried, so that later builds are faster.  [default: in the "
    "folder of --cache, if there is one]",
)
@click.option(
    "--ff-chunks",
    type=click.IntRange(1, MOST_FF_CHUNKS),
    metavar="N",
    help="Cut the denoiser's widest layers into N parts that run one after another: less memory.  "
    f"[default: {DEFAULT_FF_CHUNKS}]",
)
@click.option(
    "--operators",
    type=click.Choice(["auto", "onnx", "onnxruntime"]),
    default=_DEFAULTS.operators,
    show_default=True,
    help="onnx keeps to the standard's operators. auto uses ONNX Runtime's own, a quarter faster on a CPU, if "
    "nothing else will run the networks: --backend onnxruntime --precision fp32. onnxruntime uses them in fp16 too: "
    "what its CUDA provider (infer --provider cuda) needs at full size.",
)
@click.option(
    "--split-guidance",
    is_flag=True,
    help="Build the denoiser for one guidance branch at a time: half the memory, two passes a step.",
)
@click.option(
    "--branches",
    type=click.IntRange(1, 2),
    metavar="1|2",
    help="Build the denoiser for guided videos alone (2), or for one branch alone (1): videos without guidance, or two "
    "passes a step.  [default: both in one engine]",
)
@click.option(
    "--shallow-steps",
    is_flag=True,
    help="Add a denoiser without the deep levels of the UNet, for `svd-trt infer --deep-every 3`: two of three steps "
    "then take half of the time, and the video changes a little. Sizes are multiples of 16 then.",
)
@click.option(
    "--weight-streaming",
    is_flag=True,
    help="Let weights of the denoiser stay in host memory and be copied in as they are used, for GPUs too small for "
    "them: slower. `svd-trt infer --vram-budget` decides how many.",
)
@click.option(
    "--rewrites/--no-rewrites",
    default=True,
    show_default=True,
    help="Exact rewrites that make the networks lighter; without them they compute what diffusers computes.",
)
@click.option(
    "--golden-frames/--no-golden-frames",
    default=None,
    help="Make the frames of a short video on the CPU, with which hosts check themselves (`svd-trt inspect BUNDLE "
    "--self-test`).  [default: if it takes seconds; at full size it takes minutes]",
)
@click.option("--skip-checks", is_flag=True, help="Start even if disk or memory seem too small.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Reuse networks and engines from this folder and add new ones: builds of other sizes, ranges or precisions "
    "share many. It only grows; remove it with rm -r.  [default: SVD_TRT_CACHE, or none]",
)
@click.option(
    "--config",
    metavar="svd|svd-xt|FOLDER",
    help="For a single file: the published architecture that it has (svd, 14 frames, or svd-xt, 25), or a folder with "
    "its configurations in diffusers format.  [default: what words of its name or its metadata tell]",
)
@click.option(
    "--unet",
    metavar="FILE|FOLDER|HUB_ID",
    help="Put another UNet of the same architecture into the checkpoint: a few-step model such as AnimateLCM-SVD, or a "
    "fine-tune. A safetensors file, a folder with unet/ or config.json, a hub id, or owner/name/file.safetensors.",
)
@click.option(
    "--lora",
    "loras",
    metavar="FILE[:SCALE]",
    multiple=True,
    help="Merge a LoRA into the UNet, such as motion.safetensors:0.8 (names of diffusers, PEFT or kohya); repeatable.",
)
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option(
    "--variant",
    help="Weights to use, such as fp16; a component without them has its plain ones used.  [default: the plain ones, "
    "or the only ones there]",
)
@click.option("--local-files-only", is_flag=True, help="Never download (as HF_HUB_OFFLINE=1).")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print what was built as JSON.")
def command(model: str, output: Path, quiet: bool, as_json: bool, **options: Any) -> None:
    """Turn the checkpoint MODEL into a bundle of ONNX networks and TensorRT engines.

    MODEL is a folder in diffusers format; a hub id such as stabilityai/stable-video-diffusion-img2vid-xt (found
    through HF_HOME, HF_HUB_OFFLINE and the other variables of the hub); Stability's single file, svd.safetensors or
    svd_xt.safetensors; or random:PRESET (tiny, svd, svd-xt), random weights to build and time without the licensed
    ones.

    Ranges are written MIN:OPT:MAX: the bundle serves every value from MIN to MAX and is fastest at OPT, for which
    its engines are compiled exactly. A single number builds smaller, faster networks for that value alone.

    \b
    Examples:
        svd-trt build stabilityai/stable-video-diffusion-img2vid-xt --variant fp16 -o svd-xt
        svd-trt build svd_xt.safetensors -o svd-xt
        svd-trt build ./svd -o svd --height 512 --width 512:768:1024 --frames 8:14:25
        svd-trt build ./svd -o few-steps --unet AnimateLCM-SVD-xt.safetensors
        svd-trt build random:svd-xt -o light --split-guidance --ff-chunks 4

    `svd-trt inspect BUNDLE` shows what the engines will need on a GPU. A full-size build takes minutes, about 7 GB of
    memory and 9 GB of disk, and no GPU.

    Run the same command again to resume an interrupted build. A build that would change nothing does nothing.
    """
    console = stderr(quiet=quiet)
    with Bars(console) as bars, log_to(console):
        try:
            result = build_bundle(model, output, BuildOptions(**options), _show(console, bars))
        except (KeyboardInterrupt, SystemExit):
            console.print("finished networks are kept: run the same command to resume")
            raise
    if result.up_to_date:
        console.print(f"{output} is up to date: nothing to do")
    else:
        console.print(_summary(result))
        built, networks = result.bundle.manifest.tensorrt, result.bundle.manifest.networks
        engines = f"engines for {built.name} {built.version}" if built else "ONNX alone (--backend onnxruntime)"
        console.print(f"built {output}: {len(networks)} networks, {engines}")
        manifest = result.bundle.manifest
        on_gpu = manifest.precision == "fp16" and manifest.graph.operators == "onnxruntime"
        where = " --provider cuda" if on_gpu else ""
        console.print(f"next: svd-trt inspect {output}\n      svd-trt infer {output} PICTURE -o video.mp4{where}")
    if as_json:
        print_json(_as_dict(result))


def _show(console: Console, bars: Bars) -> Progress:
    """Draw a bar for each stage on a terminal; print a line for each finished stage to a log."""
    tasks: dict[str, TaskID] = {}
    started: dict[str, float] = {}

    def show(stage: str, done: float, total: float) -> None:
        ended = total > 0 and done == total
        note = "reused" if ended and stage not in started else ""
        seconds = time.monotonic() - started.setdefault(stage, time.monotonic())
        if console.is_terminal:
            if stage not in tasks:
                tasks[stage] = bars.add(stage, total=None)
            bars.update(tasks[stage], done, total=total or None, note=note)
        elif ended and not stage.startswith("reading "):
            console.print(f"{stage}: {note or format_seconds(seconds)}")

    return show


def _summary(result: BuildResult) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("network", "export", "engine", "plan", "weights", "activations"):
        table.add_column(heading, justify="left" if heading == "network" else "right", no_wrap=True)
    times = {(s.network, s.kind == "onnx"): _time_text(s) for s in result.stages}
    for name, entry in result.bundle.manifest.networks.items():
        plan = entry.plan
        memory = (
            (format_bytes(plan.file.size), format_bytes(plan.weight_bytes), format_bytes(plan.activation_bytes))
            if plan
            else ("-",) * 3
        )
        export, engine = times.get((name, True), "-"), times.get((name, False), "-")
        table.add_row(name, export, engine, *memory)
    return table


def _time_text(stage: Stage) -> str:
    if stage.from_cache:
        return "from the cache"
    return "reused" if stage.reused else format_seconds(stage.seconds)


def _as_dict(result: BuildResult) -> dict[str, Any]:
    return {
        "bundle": str(result.bundle.path),
        "up_to_date": result.up_to_date,
        "stages": [
            {
                "network": s.network,
                "kind": s.kind,
                "seconds": round(s.seconds, 3),
                "reused": s.reused,
                "from_cache": s.from_cache,
            }
            for s in result.stages
        ],
    }
