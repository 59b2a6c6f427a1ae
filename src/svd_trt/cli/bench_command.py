"""``svd-trt bench``."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
import msgspec
import platformdirs
from rich.console import Console

from svd_trt.cli.bundle_source import findable_source
from svd_trt.cli.console import Bars, stderr, stdout
from svd_trt.engine.bundle import Bundle
from svd_trt.engine.manifest import sha256_of
from svd_trt.errors import ArgumentError, MissingDependencyError, OutputError
from svd_trt.progress import Progress

if TYPE_CHECKING:
    from svd_trt.benchmarks.results import Result

__all__ = ["command", "command_line"]

_PRESETS = ("tiny", "mid", "svd", "svd-xt")
_AXES = ("frames", "steps", "pixels", "decode-chunk-size")
_SUBCOMMANDS = {"quality": "bench_quality", "plot": "bench_reports", "compare": "bench_reports"}
"""The module of each."""
_PATH_OPTIONS = ("-o", "--output", "--markdown", "--plot", "--cache")
_BUSY = 0.5  # load for each thread above which figures are noisy


class _WithSubcommands(click.Group):
    """Measures speed if no subcommand is given."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(_SUBCOMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _SUBCOMMANDS:
            return None
        return cast(click.Command, getattr(import_module(f"svd_trt.cli.{_SUBCOMMANDS[cmd_name]}"), cmd_name))


@click.group(
    "bench",
    cls=_WithSubcommands,
    invoke_without_command=True,
    subcommand_metavar="[quality|plot|compare] ...",
    short_help="Measure svd-trt beside diffusers, torch.compile and others.",
)
@click.option("--preset", type=click.Choice(_PRESETS), help="Measure random weights at this size.  [default: mid]")
@click.option("--model", help="A checkpoint in any form that `svd-trt build` takes, instead of a preset.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Use this bundle of the model instead of building one.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Videos by each contender.")
@click.option(
    "--contender", "names", multiple=True, metavar="NAME", help="Measure this one and diffusers-eager; repeatable."
)
@click.option(
    "--curve",
    "axes",
    type=click.Choice(_AXES),
    multiple=True,
    help="Also measure a curve over this argument; repeatable.",
)
@click.option("--num-frames", "frames", type=click.IntRange(2), help="Frames.  [default: the preset's]")
@click.option("--height", type=click.IntRange(8), help="Height in pixels, a multiple of 8.")
@click.option("--width", type=click.IntRange(8), help="Width in pixels, a multiple of 8.")
@click.option("--num-inference-steps", "steps", type=click.IntRange(1), help="Denoising steps.")
@click.option("--decode-chunk-size", type=click.IntRange(1), help="Frames decoded together.  [default: all]")
@click.option("--seed", type=click.IntRange(0), default=42, show_default=True, help="Seed of the noise.")
@click.option("--precision", type=click.Choice(["fp32", "fp16"]), help="[default: fp16 on a GPU, fp32 on a CPU]")
@click.option("--threads", type=click.IntRange(1), help="Processors for each contender.  [default: all]")
@click.option(
    "--timeout",
    type=click.IntRange(1),
    default=3600,
    show_default=True,
    help="Seconds for loading, or for one video, compiling included.",
)
@click.option(
    "--image", type=click.Path(path_type=Path, exists=True), help="Picture to start from.  [default: a drawn one]"
)
@click.option(
    "--cache", type=click.Path(path_type=Path, file_okay=False), help="Folder for the bundles that are built."
)
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file to write.")
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False), help="Markdown file to write.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of tables.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but the result and errors.")
@click.pass_context
def command(context: click.Context, /, **options: Any) -> None:
    """Measure svd-trt beside diffusers, torch.compile and others: speed, memory and fidelity in one run.

    Every contender makes the same video in a process of its own, in rounds, all with the same number of threads.
    Loading, building and compiling are timed separately. Frames are compared with those of eager diffusers in fp32.
    Presets with random weights are as fast as a checkpoint of the same size.

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
    Contenders that cannot run here are skipped, with the reason. Bundles are built once and kept. Ctrl-C keeps the
    completed rounds.
    """
    if context.invoked_subcommand is None:
        _bench(**options)


def _bench(
    *, output: Path | None, markdown: Path | None, as_json: bool, quiet: bool, preset: str | None, **options: Any
) -> None:
    if preset and options["model"]:
        raise click.UsageError("--preset and --model both name a model; give one")
    for path in (output, markdown):
        if path is not None and not os.access(path.absolute().parent, os.W_OK):
            raise OutputError(f"cannot write {path}: there is no such folder, or it is not writable")
    try:
        from svd_trt.benchmarks.results import write_result
    except ImportError as error:
        raise MissingDependencyError("svd-trt bench", "export,bench") from error
    console = stderr(quiet=quiet)
    latest: Result | None = None
    written = False

    def keep(result: Result) -> None:
        nonlocal latest, written
        latest, written = result, False
        if output is not None:
            write_result(output, result)
            written = True

    try:
        model = options.pop("model") or (f"random:{preset}" if preset else None)
        if (bundle := options["bundle"]) is not None:
            model = _model_of(bundle, model)
            options |= _options_of(bundle, options)
        _run(console, keep, model=model or "random:mid", **options)
    except BaseException as error:
        if latest is not None:
            what = "Interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "Failed"
            where = f"in {output}" if written else "below; -o FILE.json keeps them"
            console.print(f"{what}. Completed rounds are {where}")
            if not written:
                _print(latest, as_json=as_json)
        raise
    assert latest is not None, "a run that ends has at least one round"
    _print(latest, as_json=as_json)
    _write_markdown(markdown, latest)
    if output is None:
        console.print("the result was not saved: -o FILE.json saves it, to plot and compare", style="dim")
    else:
        console.print(f"wrote {output}; `svd-trt bench plot {output}` draws it", style="dim")


def _model_of(path: Path, model: str | None) -> str:
    """The checkpoint that diffusers runs: it must have the weights of the bundle.

    Raises:
        UsageError: the bundle was built from a folder or a file, and ``model`` is None.
        ArgumentError: the bundle was built from other weights.
    """
    bundle = Bundle.open(path, verify=False)
    if model is None:
        return findable_source(bundle)
    from svd_trt.export.checkpoint_kinds import open_checkpoint

    source = bundle.manifest.source
    if open_checkpoint(model).source.digests != source.digests:
        raise ArgumentError(f"{path} was built from {source.model}, not from {model}; frames would not compare")
    return model


def _options_of(bundle: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Precision and sizes: as in ``options``, or those that the bundle was built for and is fastest at.

    Raises:
        ArgumentError: the bundle cannot make what the options ask for.
    """
    manifest = Bundle.open(bundle, verify=False).manifest
    if options["precision"] not in (None, manifest.precision):
        raise ArgumentError(f"{bundle} is {manifest.precision}; leave out --precision, or build another one")
    chosen: dict[str, Any] = {"precision": manifest.precision}
    for name in ("frames", "height", "width"):
        allowed = manifest.ranges.of(name)
        chosen[name] = options[name] or allowed.opt
        allowed.require(chosen[name], name, f"--{name}")
    chunk, allowed = options["decode_chunk_size"], manifest.ranges.chunk
    if chunk is not None:
        allowed.require(chunk, "decode_chunk_size", "--decode-chunk")
    chosen["decode_chunk_size"] = chunk or allowed.clamp(chosen["frames"])
    return chosen


def _run(
    console: Console,
    keep: Callable[[Result], None],
    *,
    model: str,
    bundle: Path | None,
    rounds: int,
    names: Sequence[str],
    axes: Sequence[str],
    precision: Any,
    threads: int | None,
    image: Path | None,
    cache: Path | None,
    timeout: int,
    **sizes: Any,
) -> None:
    """Measure, and call ``keep`` with the result after each round and each curve."""
    try:
        from svd_trt.benchmarks.contenders import choose_contenders, has_gpu
        from svd_trt.benchmarks.curves import measure_curves
        from svd_trt.benchmarks.harness import Bench
        from svd_trt.benchmarks.peak import measure_peak
        from svd_trt.benchmarks.workload import Bundles, count_flops, make_workload
        from svd_trt.export.fidelity import draw_picture
        from svd_trt.runtime.cpu_device import usable_processors
    except ImportError as error:
        raise MissingDependencyError("svd-trt bench", "export,bench") from error
    gpu = has_gpu()
    precision = precision or ("fp16" if gpu else "fp32")
    contenders = choose_contenders(names, precision=precision)
    workload = make_workload(model, precision=precision, **sizes)
    threads = threads or usable_processors()
    if os.getloadavg()[0] > _BUSY * threads:
        console.print(f"this machine is busy (load {os.getloadavg()[0]:.1f}): figures will be noisy", style="yellow")
    folder = cache or Path(platformdirs.user_cache_dir("svd-trt")) / "bench"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}; choose another place with --cache") from error
    with ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="svd-trt-bench-", ignore_cleanup_errors=True)
        work = Path(stack.enter_context(temporary))
        progress = _bar(stack.enter_context(Bars(console)))
        progress("count the arithmetic", 0, 0)
        workload, uncounted = count_flops(workload)
        if image is None:
            image = work / "picture.png"
            draw_picture(workload.height, workload.width).save(image)
        workload = msgspec.structs.replace(workload, picture=sha256_of(image)[:12])
        progress("peak of this machine", 0, 0)
        peak = measure_peak(workload.precision, threads, work / "peak.log", gpu=gpu)
        bench = Bench(
            workload=workload,
            contenders=contenders,
            rounds=rounds,
            threads=threads,
            work=work,
            picture=image,
            bundles=Bundles(workload, folder, bundle, progress),
            command=command_line(sys.argv[1:]),
            gpu=gpu,
            progress=progress,
            timeout=timeout,
            peak=peak,
            notes=[uncounted] if uncounted else [],
        )
        result = bench.run(keep)
        measured = {c.name for c in result.contenders if c.skipped is None}
        for axis in axes:
            # Compiling again at every point takes minutes, so only a contender that was named is compiled.
            chosen = [c for c in contenders if c.name in measured and (c.mode != "compile" or c.name in names)]
            bench.curves += measure_curves(bench, cast(Any, axis.replace("-", "_")), chosen)
            keep(bench.with_curves(result))
        progress("done", 1, 1)


def _bar(bars: Bars) -> Progress:
    """One bar that shows the current stage."""
    task = bars.add("bench", None)

    def progress(stage: str, done: float, total: float) -> None:
        bars.update(task, done, total or None, note=stage)

    return progress


def command_line(arguments: Sequence[str]) -> str:
    """The command line for the record, without the paths that it writes to."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument.partition("=")[0] not in _PATH_OPTIONS:
            kept.append(argument)
        skip = argument in _PATH_OPTIONS  # the next argument is its value
    return shlex.join(["svd-trt", *kept])


def _print(result: Result, *, as_json: bool) -> None:
    from svd_trt.benchmarks.report import describe, not_measured, tables
    from svd_trt.benchmarks.results import encode_result

    if as_json:
        sys.stdout.write(encode_result(result).decode())
        return
    console = stdout()
    for line in describe(result):
        console.print(line, soft_wrap=True)
    for table in tables(result):
        console.print()
        console.print(table)
    for line in not_measured(result):
        console.print(f"not measured: {line}", style="dim", soft_wrap=True)


def _write_markdown(path: Path | None, result: Result) -> None:
    if path is None:
        return
    from svd_trt.benchmarks.report import markdown_page
    from svd_trt.benchmarks.results import write_file

    write_file(path, markdown_page(result).encode())
