"""``svd-trt infer``."""

from __future__ import annotations

import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console

from svd_trt.cli.console import Bars, log_to, print_json, stderr
from svd_trt.cli.layer_profile import check_profile, print_slowest_layers, write_profile
from svd_trt.cli.parameter_options import parameter_options
from svd_trt.cli.provider_log import end_log_of
from svd_trt.cli.sizes import ByteSize, FrameRate
from svd_trt.errors import OutputError
from svd_trt.runtime.backends import PROVIDERS, RUN_BACKENDS, Provider, RunBackend
from svd_trt.runtime.chosen_profiles import describe_profiles
from svd_trt.runtime.images import ImageInput
from svd_trt.runtime.layer_times import LayerTimes
from svd_trt.runtime.output import VideoStream
from svd_trt.runtime.parameters import Parameters
from svd_trt.runtime.picture_files import local_path
from svd_trt.runtime.pipeline import VideoPipeline
from svd_trt.runtime.settings import Settings
from svd_trt.runtime.video import FORMATS, STREAMS, BackgroundWriter, check_output, exact_rate, numbered, open_writer
from svd_trt.units import format_bytes, format_seconds

__all__ = ["command"]

_STDIN = "-"
_STDOUT = "-"
_FRAMES_QUEUED = 4


def _formats() -> str:
    named = {("NAME" if suffix == "/" else suffix): kind.description for suffix, kind in FORMATS.items()}
    lines = "\n".join(f"        {suffix:<6} {description}" for suffix, description in named.items())
    streams = "\n".join(f"        {name:<6} {kind.description}" for name, kind in STREAMS.items())
    files = f"\b\n    The name OUT selects the format:\n{lines}"
    return f"{files}\n\n    \b\n    On standard output, --format does:\n{streams}"


@click.command(
    "infer",
    short_help="Make a video from each picture IMAGE.",
    help=f"""Make a video from each picture IMAGE with the bundle BUNDLE.

    {_formats()}

    \b
    Examples:
        svd-trt infer svd-xt picture.png -o video.mp4 --seed 42
        svd-trt infer svd-xt picture.png -o video.webp --fps 12 --motion-bucket-id 180 --num-inference-steps 15
        svd-trt infer svd-xt *.jpg -o videos.mp4         (videos-0.mp4, videos-1.mp4, ...)
        svd-trt infer svd-xt portrait.jpg -o video.mp4 --resize-mode crop
        svd-trt infer svd-xt - -o video.mp4 < picture.png
        svd-trt infer svd-xt picture.png -o - --format y4m | ffmpeg -i - -c:v prores video.mov

    IMAGE is a file, a file:// or data: URL, or - for standard input. A picture of another shape than the frames is
    stretched; --resize-mode crop or pad keeps its shape.

    The same checkpoint, picture, seed and options give the same video as diffusers. Each video is written as soon as
    it is finished, and finished videos remain if the command is interrupted.
    """,
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("-o", "--output", required=True, metavar="OUT", help="File or folder to write, or - for standard output.")
@parameter_options
@click.option(
    "--output-fps",
    type=FrameRate(),
    metavar="RATE",
    help="Frames a second of the file alone, such as 24000/1001; the motion stays that of --fps.  [default: --fps]",
)
@click.option(
    "--format",
    "stream_format",
    type=click.Choice(list(STREAMS)),
    help="Format of standard output, for -o -.  [default: raw]",
)
@click.option(
    "--backend",
    type=click.Choice(RUN_BACKENDS),
    default="auto",
    show_default=True,
    help="What runs the networks; auto is the bundle's TensorRT if there is a GPU, else ONNX Runtime.",
)
@click.option("--device", metavar="DEVICE", help="cpu, cuda, or cuda:1 for the second GPU.  [default: a GPU if any]")
@click.option(
    "--provider",
    type=click.Choice(PROVIDERS),
    help="Provider of ONNX Runtime; cuda and tensorrt need onnxruntime-gpu.  [default: cpu]",
)
@click.option(
    "--vram-budget",
    type=ByteSize(),
    help="Most device memory to use, such as 8GB; `svd-trt inspect BUNDLE --vram-budget 8GB` shows the plan.  "
    "[default: 95 % of what is free]",
)
@click.option(
    "--profile",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write the time of every layer to FILE as JSON, and print the slowest. On a GPU, TensorRT measures them; the "
    "host then waits for each run and CUDA graphs are off, so a video takes longer. On the CPU, ONNX Runtime does.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print timings, seed, parameters, backend and profiles as JSON.")
def command(
    bundle: Path,
    images: tuple[str, ...],
    output: str,
    output_fps: Fraction | None,
    stream_format: str | None,
    backend: RunBackend,
    device: str | None,
    provider: Provider | None,
    vram_budget: int | None,
    profile: Path | None,
    quiet: bool,
    as_json: bool,
    **parameters: Any,
) -> None:
    """Make the videos, write them and report; the help text is in the decorator."""
    if as_json and output == _STDOUT:
        raise click.UsageError("--json and -o - both use standard output; write the video to a file")
    count = len(images) * Parameters(**parameters).num_videos_per_prompt
    stream_format = _check_format(stream_format, output, count)
    if str(profile) == _STDOUT:
        raise click.UsageError("--profile writes a file, and not to standard output; name one such as layers.json")
    started = time.perf_counter()
    paths = [numbered(output, index, count) for index in range(count)]
    files = [path for path in map(local_path, set(images) - {_STDIN}) if path]
    _check_outputs(paths, files, bundle, stream_format)
    if profile is not None:
        check_profile(profile, [*paths, *files], bundle)
    pictures = _pictures(images)
    console = stderr(quiet=quiet)
    layers: LayerTimes = {}
    chosen = {"backend": backend, "device": device, "provider": provider}
    end_log_of(provider)
    with VideoPipeline.open(bundle, vram_budget=vram_budget, **chosen) as pipe:  # type: ignore[arg-type]
        if profile is not None:
            pipe.device.measure_layers(layers)
        opened = time.perf_counter() - started
        with Bars(console) as bars, log_to(console, style="dim") as logged:
            stream = pipe.stream(pictures, progress=bars.for_stages(_count), **parameters)
            rate = exact_rate(stream.parameters.fps) if output_fps is None else output_fps
            written = _write(stream, paths, rate, stream_format)
    timings = {"open": opened, **stream.timings, "write": written, "total": time.perf_counter() - started}
    _report(console, stream, paths, rate, timings)
    if vram_budget is not None or pipe.device.kind != "cpu":
        console.print(_memory_note(stream), style="dim", soft_wrap=True)
    for note in pipe.device.notes:
        console.print(note, style="dim", soft_wrap=True)
    result = _as_dict(pipe, stream, paths, rate, timings, logged)
    if profile is not None:
        write_profile(profile, layers, result)
        measured = sum(map(len, layers.values()))
        console.print(f"wrote {profile}: the times of {measured:,} layers of {len(layers)} networks")
        print_slowest_layers(console, layers)
    if as_json:
        print_json(result)


def _count(done: float, total: float) -> str:
    return f"{done:g}/{total:g}"


def _check_format(name: str | None, output: str, count: int) -> str:
    """The format of standard output, if that is what ``output`` is."""
    if name is not None and output != _STDOUT:
        raise click.UsageError(f"--format is for -o -; the name of a file selects its format, and {output} is one")
    if count > 1 and name not in (None, "raw"):
        raise click.UsageError(
            f"standard output takes {count} videos one after the other only as --format raw; name a file with -o"
        )
    return name or "raw"


def _pictures(images: tuple[str, ...]) -> list[ImageInput]:
    """The arguments IMAGE, with standard input for ``-``."""
    if images.count(_STDIN) > 1:
        raise click.UsageError("standard input is read once; name one picture - and the others by their files")
    if _STDIN in images and (sys.stdin is None or sys.stdin.isatty()):
        raise click.UsageError("the picture - is standard input, which has no picture; add < picture.png")
    return [sys.stdin.buffer if image == _STDIN else image for image in images]


def _check_outputs(paths: list[str], files: list[Path], bundle: Path, stream_format: str) -> None:
    """Before the work, check that every output can be written and neither replaces an input nor is in the bundle."""
    for path in paths:
        check_output(path, stream_format)
        if path == _STDOUT:
            continue
        target = Path(path).resolve()
        if target.is_relative_to(bundle.resolve()):
            raise OutputError(f"{path} is inside the bundle, which the next build replaces; choose another output")
        for file in files:
            if file.resolve().is_relative_to(target):
                raise OutputError(f"{path} is also an input picture, or contains one; choose another output")


def _write(stream: VideoStream, paths: list[str], rate: Fraction, stream_format: str) -> float:
    """Write the frames of ``stream`` in a thread; the seconds that writing took, most of them in parallel with work.

    A video is in its place before the frames of the next are taken. If not all of several are finished, the exception
    that ended the work gets a note that says how many are.
    """
    p = stream.parameters
    spent, finished = 0.0, 0
    try:
        for path in paths:
            opened = open_writer(
                path,
                height=p.height,
                width=p.width,
                fps=rate,
                metadata=stream.metadata,
                stream=stream_format,
            )
            with BackgroundWriter(opened, maxsize=_FRAMES_QUEUED) as writer:
                for _ in range(p.total_frames):
                    writer.write(next(stream)[np.newaxis])
            spent += writer.seconds
            finished += 1
    except BaseException as error:
        if len(paths) > 1:
            error.add_note(_progress_of(paths, finished))
        raise
    return spent


def _progress_of(paths: list[str], finished: int) -> str:
    """How many of the videos ``paths`` are finished, and which."""
    said = f"{finished} of {len(paths)} videos {'is' if finished == 1 else 'are'} finished"
    if finished == 0 or paths[0] == _STDOUT:
        return said
    return f"{said}: {_names(paths[:finished])}"


def _names(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]}"


def _report(console: Console, stream: VideoStream, paths: list[str], rate: Fraction, timings: dict[str, Any]) -> None:
    p = stream.parameters
    where = "standard output" if paths[0] == _STDOUT else _names(paths)
    console.print(f"wrote {where}: {p.total_frames} frames of {p.width}x{p.height} at {rate} fps, {_seeds(p)}")
    stages = {k: v for k, v in timings.items() if k not in ("steps", "total")}
    listed = ", ".join(f"{stage} {format_seconds(value)}" for stage, value in stages.items())
    console.print(f"{format_seconds(timings['total'])} on {stream.backend}: {listed}", style="dim", soft_wrap=True)


def _seeds(settings: Settings) -> str:
    several = settings.seed if isinstance(settings.seed, tuple) else (settings.seed,)
    return f"seed{'s' if len(several) > 1 else ''} {', '.join(map(str, several))}"


def _memory_note(stream: VideoStream) -> str:
    words, need = stream.memory.words(), stream.memory.total_bytes
    return f"memory: {words}" + (f" (~{format_bytes(need, round_up=True)} of VRAM on a GPU)" if need else "")


def _as_dict(
    pipe: VideoPipeline,
    stream: VideoStream,
    paths: list[str],
    rate: Fraction,
    timings: dict[str, Any],
    logged: list[str],
) -> dict[str, Any]:
    rounded = {k: [round(s, 4) for s in v] if isinstance(v, list) else round(v, 4) for k, v in timings.items()}
    parameters = stream.parameters.as_dict()
    return {
        "outputs": paths,
        "seed": parameters["seed"],
        "parameters": parameters,
        "output_fps": str(rate),
        "backend": stream.backend,
        "precision": pipe.bundle.manifest.precision,
        "memory": stream.memory.as_dict(),
        "profiles": describe_profiles(stream.profiles),
        "notes": [*logged, *pipe.device.notes],
        "timings_s": rounded,
    }
