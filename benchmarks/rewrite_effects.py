"""What each exact rewrite changes in the full-size networks: operations, nodes, weights and activation memory.

    python -m svd_trt.benchmarks.rewrite_effects -o benchmarks/results/rewrite-effects.json

Rewrites are added one after another, in the order in which a build applies them; each line is the network with all of
them so far. Activation memory is the engine builder's own report at 25 frames and both guidance branches.
"""

from __future__ import annotations

import datetime as dt
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from svd_trt.benchmarks.machine import describe_machine
from svd_trt.engine.flavour import find_flavour
from svd_trt.engine.plan import build_plan
from svd_trt.engine.spec import NetworkName, NetworkSpec, Range, Ranges, network_specs
from svd_trt.export.checkpoint import COMPONENT_OF, Checkpoint, open_checkpoint


@click.command()
@click.argument("model", default="random:svd-xt")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
@click.option("--network", "names", type=click.Choice(["denoiser", "vae_decoder"]), multiple=True, help="Only these.")
def main(model: str, output: Path, names: tuple[NetworkName, ...]) -> None:
    """Measure the networks of MODEL with more and more rewrites."""
    checkpoint = open_checkpoint(model)
    specs = network_specs(checkpoint.description.model, _ranges(checkpoint.description.model.num_frames))
    chosen: tuple[NetworkName, ...] = names or ("denoiser", "vae_decoder")
    rows = [row for name in chosen for row in _measure(checkpoint, specs[name])]
    record = {
        "benchmark": "rewrite_effects",
        "date": dt.date.today().isoformat(),
        "model": model,
        "machine": describe_machine(),
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")


def _ranges(frames: int) -> Ranges:
    one = Range(1, 1, 1)
    return Ranges(
        batch=one,
        pictures=one,
        branches=Range(1, 2, 2),
        frames=Range(2, frames, frames),
        chunk=Range(1, 8, frames),
        height=Range(576, 576, 576),
        width=Range(1024, 1024, 1024),
    )


def _measure(checkpoint: Checkpoint, spec: NetworkSpec) -> list[dict[str, Any]]:
    from svd_trt.export.rewrites import REWRITES

    names = [function.__name__ for function in REWRITES]
    steps: list[tuple[str, int, bool]] = [("plain", 0, False)]
    steps += [(name, i + 1, False) for i, name in enumerate(names)]
    steps.append(("fp32 statistics of group normalisation", len(names), True))
    rows = []
    for label, count, statistics in steps:
        row = {"network": spec.name, "rewrite": label} | _measure_one(checkpoint, spec, count, statistics=statistics)
        rows.append(row)
        click.echo(json.dumps(row))
    return rows


def _measure_one(checkpoint: Checkpoint, spec: NetworkSpec, count: int, *, statistics: bool) -> dict[str, Any]:
    from svd_trt.export.flops import count_flops
    from svd_trt.export.networks import dtype_of, make_network
    from svd_trt.export.onnx_export import export_network
    from svd_trt.export.rewrites import REWRITES

    model = checkpoint.load(COMPONENT_OF[spec.name], dtype_of(spec.name, "fp16"))
    module = make_network(spec.name, model, rewrites=False)
    changed = [function(module) for function in REWRITES[:count]]
    module = module.eval().requires_grad_(requires_grad=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{spec.name}.onnx"
        started = time.perf_counter()
        report = export_network(module, spec, path, fp32_statistics=statistics)
        exported = time.perf_counter() - started
        del model, module
        gc.collect()
        plan = build_plan(find_flavour("tensorrt-rtx"), path, spec, path.with_suffix(".plan"))
        return {
            "places": changed[-1] if changed else 0,
            "nodes": report.nodes,
            "parameters": report.parameters,
            "flops": count_flops(path, spec),
            "activation_bytes": plan.activation_bytes,
            "weight_bytes": plan.weight_bytes,
            "layers": plan.layers,
            "export_seconds": round(exported, 1),
            "engine_seconds": round(plan.seconds, 1),
        }


if __name__ == "__main__":
    main()
