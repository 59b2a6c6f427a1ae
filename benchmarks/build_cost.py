"""What a full-size build costs, and what the engines that it makes will need: plain, default and low-memory.

    python -m svd_trt.benchmarks.build_cost -o benchmarks/results/build-cost.json

Each variant is a real ``svd-trt build`` in a process of its own, one after another; the figures of the engines are
those that ``svd-trt inspect`` shows. Needs about 20 GB of disk for a while.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from svd_trt.benchmarks.machine import describe_machine
from svd_trt.benchmarks.process import watch

VARIANTS = {
    "plain": ["--no-rewrites"],
    "default": [],
    "low-memory": ["--split-guidance", "--ff-chunks", "4"],
}


@click.command()
@click.argument("model", default="random:svd-xt")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
@click.option("--variant", "names", type=click.Choice(list(VARIANTS)), multiple=True, help="Only these.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), help="Where to build.  [default: /tmp]")
def main(model: str, output: Path, names: tuple[str, ...], work: Path | None) -> None:
    """Build MODEL in each variant and record time, memory and the engines' figures."""
    results = {name: _measure(model, VARIANTS[name], work) for name in names or VARIANTS}
    record = {
        "benchmark": "build_cost",
        "date": dt.date.today().isoformat(),
        "model": model,
        "machine": describe_machine(),
        "variants": results,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    for name, result in results.items():
        denoiser = result["networks"]["denoiser"]
        click.echo(
            f"{name:12} {result['seconds']:6.1f} s  {result['peak_rss_bytes'] / 1e9:5.2f} GB peak RSS  denoiser: "
            f"{denoiser['flops'] / 1e12 * result['passes']:.1f} TFLOP a step, {denoiser['nodes']} nodes, "
            f"{denoiser['activation_bytes'] / 1e9:.2f} GB activations, {denoiser['weight_bytes'] / 1e9:.2f} GB weights"
        )


def _measure(model: str, options: list[str], work: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        bundle = Path(folder) / "bundle"
        command = [sys.executable, "-m", "svd_trt.cli", "build", model, "-o", str(bundle), "--json", *options]
        built = watch([*command, "--backend", "tensorrt-rtx"])
        shown = watch([sys.executable, "-m", "svd_trt.cli", "inspect", str(bundle), "--json"])
        inspected = json.loads(shown.stdout)
        for network in inspected["networks"].values():
            del network["tensors"]
        return {
            "options": options,
            "seconds": round(built.seconds, 1),
            "peak_rss_bytes": built.peak_rss,
            "stages": json.loads(built.stdout)["stages"],
            "bundle_bytes": sum(p.stat().st_size for p in bundle.rglob("*") if p.is_file()),
            "passes": inspected["passes_per_step"],
            "networks": inspected["networks"],
            "vram": inspected["vram"],
        }


if __name__ == "__main__":
    main()
