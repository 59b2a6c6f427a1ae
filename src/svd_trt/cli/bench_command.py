"""``svd-trt bench``."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
import msgspec
import platformdirs
from rich.console import Console
from rich.progress import TaskID

from svd_trt.cli.console import Bars, stderr, stdout
from svd_trt.engine.bundle import Bundle
from svd_trt.engine.manifest import sha256_of
from svd_trt.errors import ArgumentError, MissingDependencyError, OutputError

if TYPE_CHECKING:
    from svd_trt.benchmarks.schema import Result

__all__ = ["command"]

_PRESETS = ("tiny", "mid", "svd", "svd-xt")
_AXES = ("frames", "steps", "pixels", "decode-chunk-size")
_REPORTS = ("plot", "compare", "readme")
_PLACES = ("-o", "--output", "--markdown", "--cache")
_BUSY = 0.5  # load for each thread above which a measurement deserves a warning


class _WithReports(click.Group):
    """Measures when no subcommand is given; the subcommands read what was measured."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(_REPORTS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _REPORTS:
            return None
        return cast(click.Command, getattr(import_module("svd_trt.cli.bench_reports"), cmd_name))


@click.group("bench", cls=_WithReports, invoke_without_command=True, subcommand_metavar="[plot|compare|readme] ...")
@click.option("--preset", type=click.Choice(_PRESETS), help="Random weights at this size.  [default: mid]")
@click.option("--model", help="A checkpoint in any form that `svd-trt build` takes, instead of a preset.")
@click.option("--bundle", type=click.Path(path_type=Path), help="A bundle of the model, instead of building one.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Videos by each contender.")
@click.option("--contender", "names", multiple=True, metavar="NAME", help="Only this one and diffusers-eager; repeat.")
@click.option("--curve", "axes", type=click.Choice(_AXES), multiple=True, help="Vary this too; repeat.")
@click.option("--num-frames", "frames", type=click.IntRange(2), help="Frames.  [default: the preset's]")
@click.option("--height", type=click.IntRange(8), help="Height in pixels, a multiple of 8.")
@click.option("--width", type=click.IntRange(8), help="Width in pixels, a multiple of 8.")
@click.option("--num-inference-steps", "steps", type=click.IntRange(1), help="Denoising steps.")
@click.option("--decode-chunk-size", type=click.IntRange(1), help="Frames decoded together.  [default: all]")
@click.option("--seed", type=click.IntRange(0), default=42, show_default=True, help="Of the noise.")
@click.option("--precision", type=click.Choice(["fp32", "fp16"]), help="[default: fp16 on a GPU, fp32 on a CPU]")
@click.option("--threads", type=click.IntRange(1), help="Processors for each contender.  [default: all]")
@click.option(
    "--timeout",
    type=click.IntRange(1),
    default=3600,
    show_default=True,
    help="Seconds for loading, or for one video, compiling included.",
)
@click.option("--image", type=click.Path(path_type=Path, exists=True), help="Picture to start from.  [default: drawn]")
@click.option("--cache", type=click.Path(path_type=Path, file_okay=False), help="Where built bundles are kept.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file to write.")
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False), help="Markdown file to write.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of tables.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but the result and errors.")
@click.pass_context
def command(context: click.Context, /, **options: Any) -> None:
    """Measure svd-trt beside diffusers, torch.compile and others: speed, memory and fidelity in one run.

    Every contender makes the same video in a process of its own, in rounds, all with the same threads; what it takes
    to load, build and compile is told apart. Frames are compared with those of eager diffusers in fp32. Without a
    checkpoint, presets with random weights show the same speed.

    \b
    Examples:
        svd-trt bench --preset mid --rounds 3 -o mid.json
        svd-trt bench --preset tiny --contender svd-trt-onnxruntime --curve frames
        svd-trt bench --model ./svd-xt --precision fp16 -o svd-xt.json --markdown svd-xt.md
        svd-trt bench plot mid.json
        svd-trt bench compare before.json after.json

    Contenders: diffusers-eager, diffusers-compile, diffusers-low-memory, svd-trt-onnxruntime (default bundle),
    svd-trt-onnxruntime-portable (standard ONNX operators), svd-trt-onnxruntime-plain (no rewrites),
    svd-trt-onnxruntime-cuda, svd-trt-tensorrt, svd-trt-tensorrt-rtx, the last two also with -plain, and openvino.
    What cannot run here is skipped with the reason. Bundles are built once and kept; Ctrl-C keeps the rounds that are
    complete.
    """
    if context.invoked_subcommand is None:
        _measure(**options)


def _measure(
    *, output: Path | None, markdown: Path | None, as_json: bool, quiet: bool, preset: str | None, **o: Any
) -> None:
    if preset and o["model"]:
        raise click.UsageError("--preset and --model both name a model; give one")
    for path in (output, markdown):
        if path is not None and not os.access(path.absolute().parent, os.W_OK):
            raise OutputError(f"cannot write {path}: there is no such folder, or it is not writable")
    try:
        from svd_trt.benchmarks.results import write_result
    except ImportError as error:
        raise MissingDependencyError("svd-trt bench", "export,bench") from error
    console = stderr(quiet=quiet)
    kept: list[Result] = []
    written: list[Result] = []

    def keep(result: Result) -> None:
        kept[:] = [result]
        if output is not None:
            write_result(output, result)
            written[:] = [result]

    try:
        model = o.pop("model") or (f"random:{preset}" if preset else None)
        if (bundle := o["bundle"]) is not None:
            model = _model_of(bundle, model)
            _fit(bundle, o)
        _run(console, keep, model=model or "random:mid", **o)
    except BaseException:
        if kept:
            where = f"in {output}" if written == kept else "below; -o FILE.json keeps them"
            console.print(f"it did not come to its end: the rounds that are complete are {where}")
            if written != kept:
                _print(kept[0], as_json=as_json)
        raise
    (result,) = kept
    _print(result, as_json=as_json)
    _write_markdown(markdown, result)
    if output is None:
        console.print("nothing was kept: -o FILE.json keeps the result, to plot and compare", style="dim")
    else:
        console.print(f"wrote {output}; `svd-trt bench plot {output}` draws it", style="dim")


def _model_of(bundle: Path, model: str | None) -> str:
    """What diffusers is to run: the same weights that the bundle has.

    Raises:
        UsageError: the bundle's model is not known by a name that finds it.
        ArgumentError: the bundle was built from other weights.
    """
    source = Bundle.open(bundle, verify=False).manifest.source
    if model is None:
        if source.commit is None and not source.model.startswith("random:"):
            raise click.UsageError(f"give --model: where the checkpoint of {bundle} ({source.model}) is now")
        return source.model
    from svd_trt.export.checkpoint import open_checkpoint

    if open_checkpoint(model).source.digests != source.digests:
        raise ArgumentError(f"{bundle} was built from {source.model}, not from {model}; frames would not compare")
    return model


def _fit(bundle: Path, options: dict[str, Any]) -> None:
    """Take from the bundle what was not asked for: its precision, and the middle of its ranges.

    Raises:
        ArgumentError: what was asked for is not what the bundle was built for.
    """
    manifest = Bundle.open(bundle, verify=False).manifest
    if options["precision"] not in (None, manifest.precision):
        raise ArgumentError(f"{bundle} is {manifest.precision}; leave out --precision, or build another one")
    options["precision"] = manifest.precision
    for name in ("frames", "height", "width"):
        allowed = getattr(manifest.ranges, name)
        if options[name] is None:
            options[name] = allowed.opt
        elif options[name] not in allowed:
            raise ArgumentError(f"{name} {options[name]}: {bundle} was built for {allowed.words}")
    chunk, most = options["decode_chunk_size"], manifest.ranges.chunk
    if chunk is not None and chunk not in most:
        raise ArgumentError(f"decode chunks of {chunk}: {bundle} was built for {most.words}")
    options["decode_chunk_size"] = chunk or most.clamp(options["frames"])


def _run(
    console: Console,
    keep: Any,
    *,
    model: str,
    bundle: Path | None,
    rounds: int,
    names: tuple[str, ...],
    axes: tuple[str, ...],
    precision: Any,
    threads: int | None,
    image: Path | None,
    cache: Path | None,
    timeout: int,
    **sizes: Any,
) -> None:
    try:
        from svd_trt.benchmarks.bundles import Bundles
        from svd_trt.benchmarks.contenders import choose, has_gpu
        from svd_trt.benchmarks.curves import measure_curves
        from svd_trt.benchmarks.harness import Bench
        from svd_trt.benchmarks.peak import measure_peak
        from svd_trt.benchmarks.subject import make_subject, with_flops
        from svd_trt.export.fidelity import draw_picture
        from svd_trt.runtime.ort import usable_processors
    except ImportError as error:
        raise MissingDependencyError("svd-trt bench", "export,bench") from error
    gpu = has_gpu()
    precision = precision or ("fp16" if gpu else "fp32")
    entrants = choose(names, precision=precision)
    subject = make_subject(model, precision=precision, **sizes)
    threads = threads or usable_processors()
    if os.getloadavg()[0] > _BUSY * threads:
        console.print(f"this machine is busy (load {os.getloadavg()[0]:.1f}): figures will be noisy", style="yellow")
    folder = cache or Path(platformdirs.user_cache_dir("svd-trt")) / "bench"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}; choose another place with --cache") from error
    with ExitStack() as stack:
        work = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="svd-trt-bench-", ignore_cleanup_errors=True))
        )
        bar = _Bar(stack.enter_context(Bars(console)))
        bar("count", 0, 0)
        subject, uncounted = with_flops(subject)
        if image is None:
            image = work / "picture.png"
            draw_picture(subject.height, subject.width).save(image)
        subject = msgspec.structs.replace(subject, picture=sha256_of(image)[:12])
        bench = Bench(
            subject=subject,
            entrants=entrants,
            rounds=rounds,
            threads=threads,
            work=work,
            picture=image,
            bundles=Bundles(subject, folder, bundle, lambda what: bar(what, 0, 0)),
            command=_without_places(sys.argv[1:]),
            gpu=gpu,
            report=bar,
            timeout=timeout,
            notes=[uncounted] if uncounted else [],
        )
        bar("machine's peak", 0, 0)
        bench.peak = measure_peak(subject.precision, threads, gpu=gpu)
        result = bench.run(keep)
        if axes:
            taking = [e for e in entrants if e.name in _measured(result) and not _is_compile(e.name, names)]
            for axis in axes:
                bench.curves += measure_curves(bench, cast(Any, axis.replace("-", "_")), taking)
                keep(bench.with_curves(result))
        bar("done", 1, 1)


def _without_places(arguments: list[str]) -> str:
    """The command for the record: what was asked, and not where on this machine it was put."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument.partition("=")[0] not in _PLACES:
            kept.append(argument)
        skip = argument in _PLACES  # its value comes next
    return shlex.join(["svd-trt", *kept])


def _measured(result: Result) -> set[str]:
    return {c.name for c in result.contenders if c.skipped is None}


def _is_compile(name: str, asked: tuple[str, ...]) -> bool:
    """Compiling again at every point takes minutes, so it has to be asked for."""
    return name == "diffusers-compile" and name not in asked


class _Bar:
    """One bar, which says what goes on."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.task: TaskID | None = None
        self.what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.task is None:
            self.task = self.bars.add("bench", None)
        self.bars.update(self.task, done, total or None, note=what)


def _print(result: Result, *, as_json: bool) -> None:
    from svd_trt.benchmarks.results import encode_result

    if as_json:
        sys.stdout.write(encode_result(result).decode())
    else:
        _show(result)


def _show(result: Result) -> None:
    from svd_trt.benchmarks.report import describe, skipped, tables

    console = stdout()
    for line in describe(result):
        console.print(line, soft_wrap=True)
    for table in tables(result):
        console.print()
        console.print(table)
    for line in skipped(result):
        console.print(f"not measured: {line}", style="dim", soft_wrap=True)


def _write_markdown(path: Path | None, result: Result) -> None:
    if path is None:
        return
    from svd_trt.benchmarks.report import markdown
    from svd_trt.benchmarks.results import write_whole

    write_whole(path, markdown(result).encode())
