"""What full-size builds cost, and what each rewrite and memory mode changes in the full-size networks.

    python -m svd_trt.benchmarks.full_size_builds cost -o benchmarks/results/build-cost.json
    python -m svd_trt.benchmarks.full_size_builds rewrites -o benchmarks/results/rewrite-effects.json

``cost`` runs a real ``svd-trt build`` for each variant, one after another, and reads the figures of the engines from
``svd-trt inspect``. It needs about 20 GB of disk while it runs.

``rewrites`` adds the rewrites one after another, in the order in which a build applies them. Each row is the network
with all rewrites so far, and the memory modes are added to all of them. Activation memory is what the engine builder
reports for the largest sizes of the row's ranges.
"""

from __future__ import annotations

import datetime as dt
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import psutil

from svd_trt.benchmarks.machine import describe_machine
from svd_trt.engine.plan import build_plan
from svd_trt.engine.spec import NetworkName, Range, Ranges, network_specs
from svd_trt.engine.tensorrt_import import find_tensorrt
from svd_trt.export.checkpoint import COMPONENT_OF, Checkpoint
from svd_trt.export.checkpoint_kinds import open_checkpoint
from svd_trt.export.rewrites import REWRITES
from svd_trt.export.rewrites.feed_forward import split_feed_forwards
from svd_trt.units import format_bytes

__all__ = ["VARIANTS", "measure_build"]

VARIANTS = {
    "plain": ["--no-rewrites"],
    "default": [],
    "low-memory": ["--split-guidance", "--ff-chunks", "4"],
}

_SAMPLE_INTERVAL = 0.1  # seconds between looks at a command's memory

_OUTPUT = click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="JSON file to write.")


@dataclass(frozen=True)
class Row:
    """One way to write a network: with its first ``rewrites`` rewrites, and the memory modes."""

    label: str
    rewrites: int = len(REWRITES)
    fp32_statistics: bool = True
    ff_chunks: int = 1
    branches: int = 2
    frames: int = 25


_PLAIN = Row("plain", rewrites=0, fp32_statistics=False)
_ALL = Row("fp32 statistics of group normalisation")
ROWS = (
    _PLAIN,
    *(replace(_PLAIN, label=function.__name__, rewrites=i + 1) for i, function in enumerate(REWRITES)),
    _ALL,
)
MODES = (
    replace(_ALL, label="2 feed-forward chunks", ff_chunks=2),
    replace(_ALL, label="4 feed-forward chunks", ff_chunks=4),
    replace(_ALL, label="guidance split", branches=1),
    replace(_ALL, label="2 feed-forward chunks, at most 14 frames", ff_chunks=2, frames=14),
)


@click.group()
def main() -> None:
    """Measure full-size builds."""


@main.command("cost")
@click.argument("model", default="random:svd-xt")
@_OUTPUT
@click.option("--variant", "names", type=click.Choice(list(VARIANTS)), multiple=True, help="Only these.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), help="Where to build.  [default: /tmp]")
def cost(model: str, output: Path, names: tuple[str, ...], work: Path | None) -> None:
    """Build MODEL in each variant and record time, memory and the engines' figures."""
    variants = {name: measure_build(model, VARIANTS[name], work) for name in names or VARIANTS}
    _write(output, "build_cost", model, {"variants": variants})
    for name, figures in variants.items():
        denoiser = figures["networks"]["denoiser"]
        click.echo(
            f"{name:12} {figures['seconds']:6.1f} s  {format_bytes(figures['peak_rss_bytes'])} peak RSS  denoiser: "
            f"{denoiser['flops'] / 1e12 * figures['passes']:.1f} TFLOP a step, {denoiser['nodes']} nodes, "
            f"{format_bytes(denoiser['activation_bytes'])} activations, "
            f"{format_bytes(denoiser['weight_bytes'])} weights"
        )


@main.command("rewrites")
@click.argument("model", default="random:svd-xt")
@_OUTPUT
@click.option("--row", "labels", multiple=True, help="Measure these rows only, and update them in the existing file.")
def rewrites(model: str, output: Path, labels: tuple[str, ...]) -> None:
    """Measure the networks of MODEL with more and more rewrites, and in each memory mode."""
    checkpoint = open_checkpoint(model)
    wanted: list[tuple[NetworkName, Row]] = [("denoiser", row) for row in ROWS + MODES]
    wanted += [("vae_decoder", row) for row in ROWS]
    old = json.loads(output.read_text())["rows"] if labels else []
    rows = {(row["network"], row["rewrite"]): row for row in old}
    for name, row in wanted:
        if not labels or row.label in labels:
            rows[name, row.label] = {"network": name, "rewrite": row.label} | _measure_network(checkpoint, name, row)
            click.echo(json.dumps(rows[name, row.label]))
    _write(output, "rewrite_effects", model, {"rows": list(rows.values())})


def _write(output: Path, benchmark: str, model: str, figures: dict[str, Any]) -> None:
    record = {
        "benchmark": benchmark,
        "date": dt.date.today().isoformat(),
        "model": model,
        "machine": describe_machine(),
        **figures,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")


def measure_build(model: str, options: list[str], work: Path | None, inspect: Sequence[str] = ()) -> dict[str, Any]:
    """Build MODEL with ``options`` and return what it took and what ``svd-trt inspect`` says with options ``inspect``.

    Raises:
        subprocess.CalledProcessError: the build failed.
    """
    with tempfile.TemporaryDirectory(dir=work) as folder:
        bundle = Path(folder) / "bundle"
        svd_trt = [sys.executable, "-m", "svd_trt.cli"]
        build = [*svd_trt, "build", model, "-o", str(bundle), "--json", "--backend", "tensorrt-rtx", *options]
        output, seconds, peak_rss = _run_command(build)
        look = [*svd_trt, "inspect", str(bundle), "--json", *inspect]
        inspected = json.loads(subprocess.run(look, stdout=subprocess.PIPE, text=True, check=True).stdout)  # noqa: S603
        for network in inspected["networks"].values():
            del network["tensors"]
        return {
            "options": options,
            "seconds": round(seconds, 1),
            "peak_rss_bytes": peak_rss,
            "stages": json.loads(output)["stages"],
            "bundle_bytes": sum(p.stat().st_size for p in bundle.rglob("*") if p.is_file()),
            "passes": inspected["passes_per_step"],
            "networks": inspected["networks"],
            "vram": inspected["vram"],
        }


def _run_command(command: Sequence[str]) -> tuple[str, float, int]:
    """Run ``command``; its standard output, its seconds, and the most bytes that it and its children had resident.

    Memory is sampled ten times a second. Pages that processes share count for each of them.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    started = time.perf_counter()
    peak_rss = 0
    # A file takes any amount of output while memory is sampled; a pipe would fill up.
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(list(command), stdout=output)  # noqa: S603
        root = psutil.Process(process.pid)
        while process.poll() is None:
            peak_rss = max(peak_rss, _resident_bytes(root))
            time.sleep(_SAMPLE_INTERVAL)
        seconds = time.perf_counter() - started
        output.seek(0)
        stdout = output.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    return stdout, seconds, peak_rss


def _resident_bytes(root: psutil.Process) -> int:
    total = 0
    try:
        family = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in family:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue  # it has ended
    return total


def _ranges(row: Row) -> Ranges:
    one = Range(1, 1, 1)
    return Ranges(
        batch=one,
        pictures=one,
        branches=Range(1, row.branches, row.branches),
        frames=Range(2, row.frames, row.frames),
        chunk=Range(1, 8, row.frames),
        height=Range(576, 576, 576),
        width=Range(1024, 1024, 1024),
    )


def _measure_network(checkpoint: Checkpoint, name: NetworkName, row: Row) -> dict[str, Any]:
    from svd_trt.export.flops import count_flops
    from svd_trt.export.networks import dtype_of, make_network
    from svd_trt.export.onnx_export import export_network

    spec = network_specs(checkpoint.description.model, _ranges(row))[name]
    model = checkpoint.load(COMPONENT_OF[name], dtype_of(name, "fp16"))
    module = make_network(name, model, rewrites=False)
    places = 0
    for function in REWRITES[: row.rewrites]:
        chunked = function is split_feed_forwards
        places = split_feed_forwards(module, chunks=row.ff_chunks) if chunked else function(module)
    module = module.eval().requires_grad_(requires_grad=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.onnx"
        started = time.perf_counter()
        report = export_network(module, spec, path, fp32_statistics=row.fp32_statistics)
        exported = time.perf_counter() - started
        del model, module
        gc.collect()
        plan = build_plan(find_tensorrt("tensorrt-rtx"), path, spec, path.with_suffix(".plan"))
        return {
            "places": places,
            "nodes": report.nodes,
            "parameters": report.parameters,
            "flops": count_flops(path, spec),
            "activation_bytes": plan.activation_bytes[-1],
            "weight_bytes": plan.weight_bytes,
            "layers": plan.layers,
            "export_seconds": round(exported, 1),
            "engine_seconds": round(plan.seconds, 1),
        }


if __name__ == "__main__":
    main()
