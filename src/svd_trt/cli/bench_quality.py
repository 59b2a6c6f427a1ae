"""``svd-trt bench quality``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from svd_trt.cli.bench_command import command_line
from svd_trt.cli.console import Bars, log_to, stderr, stdout
from svd_trt.cli.parameter_options import parse_options
from svd_trt.engine.spec import SHALLOW
from svd_trt.errors import ArgumentError, MissingDependencyError, OutputError
from svd_trt.runtime.backends import RUN_BACKENDS
from svd_trt.runtime.pipeline import VideoPipeline

if TYPE_CHECKING:
    from svd_trt.benchmarks.quality import Clip, QualityResult, Variant

__all__ = ["quality"]

_FILE = click.Path(path_type=Path, dir_okay=False)
_PICTURES = 8
_OWN = ("num_frames", "extend", "height", "width", "seed", "num_videos_per_prompt", "fps", "motion_bucket_id")
"""Arguments that are the same for all variants; all videos have the frames of the reference."""


@click.command("quality", short_help="Measure what fewer evaluations cost in quality.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", metavar="[IMAGE...]", nargs=-1)
@click.option("--clips", type=_FILE, metavar="FILE.npz", help="True clips to compare with, instead of pictures.")
@click.option(
    "--pictures", type=click.IntRange(1), help=f"Clips to take from the file.  [default: {_PICTURES}]", metavar="N"
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar="OPTIONS",
    help='Measure these options of `svd-trt infer`, such as "--guidance-interval 0,50"; a name may be in front, as in '
    '"short: --num-inference-steps 8"; repeatable.  [default: schedules, samplers and intervals at several step '
    "counts, and shallow steps if the bundle has them]",
)
@click.option(
    "--reference",
    metavar="OPTIONS",
    help='Options of the videos to compare with.  [default: "--num-inference-steps 50"]',
)
@click.option("--num-frames", type=click.IntRange(1), help="Frames.  [default: the clips', or the checkpoint's]")
@click.option("--height", type=click.IntRange(8), help="Height in pixels.  [default: likewise, or the bundle's]")
@click.option("--width", type=click.IntRange(8), help="Width in pixels.  [default: likewise]")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the first video; the next has the next."
)
@click.option("--backend", type=click.Choice(RUN_BACKENDS), default="auto", show_default=True, help="As of infer.")
@click.option("--device", metavar="DEVICE", help="As of infer.")
@click.option("-o", "--output", type=_FILE, help="JSON file to write.")
@click.option("--plot", type=_FILE, metavar="FILE.png", help="Picture to draw: error and PSNR against evaluations.")
@click.option("--markdown", type=_FILE, help="Markdown file to write.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of a table.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but the result and errors.")
def quality(
    *,
    bundle: Path,
    images: tuple[str, ...],
    clips: Path | None,
    pictures: int | None,
    variants: tuple[str, ...],
    reference: str | None,
    seed: int,
    backend: Any,
    device: str | None,
    output: Path | None,
    plot: Path | None,
    markdown: Path | None,
    as_json: bool,
    quiet: bool,
    **sizes: int | None,
) -> None:
    """Measure what fewer evaluations of the denoiser cost in quality, with the bundle BUNDLE.

    Every variant makes a video of each IMAGE, by default of a drawn picture. PSNR is to the videos of the reference,
    and so is the error, unless --clips has the true clips: a .npz file with frames, uint8 [N, F, H, W, 3], and numbers
    [N] for arguments such as fps and motion_bucket_id; the picture is a clip's first frame. The error is the root mean
    square of pixels in [0, 1]. An evaluation is the denoiser over one guidance branch: a step with guidance takes two.

    \b
    Examples:
        svd-trt bench quality svd-xt picture.png -o quality.json --plot quality.png
        svd-trt bench quality svd-xt a.png b.png --variant "--num-inference-steps 15" --variant "--sampler dpmpp-2m"
        svd-trt bench quality tiny --clips clips.npz --pictures 50 -o quality.json --plot quality.png
        svd-trt bench plot quality.json          (draws it again)

    The variants that are done are written after each; Ctrl-C keeps them.
    """
    try:
        from svd_trt.benchmarks.quality import REFERENCE, default_variants, measure_quality
        from svd_trt.benchmarks.quality_plot import plot_quality
        from svd_trt.benchmarks.quality_report import quality_page
        from svd_trt.benchmarks.results import encode_rounded, write_file
    except ImportError as error:
        raise MissingDependencyError("svd-trt bench quality", "export,bench") from error
    if clips is not None and images:
        raise click.UsageError("--clips has the pictures; leave out the other ones")
    if clips is None and pictures is not None:
        raise click.UsageError("--pictures is the number of --clips; name the pictures themselves otherwise")
    for path in (output, plot, markdown):
        if path is not None and not os.access(path.absolute().parent, os.W_OK):
            raise OutputError(f"cannot write {path}: there is no such folder, or it is not writable")
    given_variants = [_variant(text) for text in variants]
    expected = REFERENCE if reference is None else parse_options(reference, "--reference", _OWN)
    console = stderr(quiet=quiet)
    latest: QualityResult | None = None

    def keep(result: QualityResult) -> None:
        nonlocal latest
        latest = result
        if output is not None:
            write_file(output, encode_rounded(result))

    with (
        VideoPipeline.open(bundle, backend=backend, device=device) as pipe,
        log_to(stderr(quiet=True)) as logged,  # every video of a variant says the same
        Bars(console) as bars,
    ):
        given = {name: value for name, value in sizes.items() if value is not None}
        chosen = given_variants or default_variants(shallow=SHALLOW in pipe.bundle.manifest.networks)
        subjects = _clips(clips, pictures or _PICTURES, images, pipe)
        if clips is not None and subjects[0].truth is not None:
            frames, height, width, _ = subjects[0].truth.shape
            given = {"num_frames": frames, "height": height, "width": width} | given
        task = bars.add("measure", None)
        try:
            measure_quality(
                pipe,
                subjects,
                chosen,
                reference=expected,
                sizes=given,
                seed=seed,
                command=command_line(sys.argv[1:]),
                keep=keep,
                progress=lambda name, done, total: bars.update(task, done, total, note=f"{done}/{total} {name}"),
            )
        finally:
            if latest is not None:
                _report(latest, as_json=as_json)
                if plot is not None:
                    plot_quality(latest, plot)
                if markdown is not None:
                    write_file(markdown, f"{quality_page(latest)}\n".encode())
    for message in dict.fromkeys(logged):
        console.print(message, style="dim")
    if latest is not None and not latest.points:
        raise ArgumentError(f"no variant was measured, because the bundle takes none: {latest.notes[0]}")
    for path in (output, plot, markdown):
        if path is not None:
            console.print(f"wrote {path}", style="dim")


def _variant(text: str) -> Variant:
    """The variant of ``text``, which may begin with a name: ``fast: --num-inference-steps 8``."""
    from svd_trt.benchmarks.quality import Variant

    label, colon, options = text.partition(": ")
    if not colon or text.startswith("-"):
        label, options = text, text
    return Variant(series="", label=label, arguments=parse_options(options, "--variant", _OWN))


def _clips(path: Path | None, count: int, images: tuple[str, ...], pipe: VideoPipeline) -> list[Clip]:
    from svd_trt.benchmarks.quality import Clip, read_clips
    from svd_trt.export.fidelity import draw_picture

    if path is not None:
        return read_clips(path, count)
    if images:
        return [Clip(image, {}, None) for image in images]
    ranges = pipe.bundle.manifest.ranges
    return [Clip(draw_picture(ranges.height.opt, ranges.width.opt), {}, None)]


def _report(result: QualityResult, *, as_json: bool) -> None:
    from svd_trt.benchmarks.quality_report import describe_quality, quality_table
    from svd_trt.benchmarks.results import encode_rounded

    if as_json:
        sys.stdout.write(encode_rounded(result).decode())
        return
    console = stdout()
    console.print(quality_table(result))
    for line in describe_quality(result):
        console.print(line, style="dim", soft_wrap=True)
