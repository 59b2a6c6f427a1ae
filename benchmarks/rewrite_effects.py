"""What each exact rewrite and each memory mode changes in the full-size networks.

    python -m svd_trt.benchmarks.rewrite_effects -o benchmarks/results/rewrite-effects.json

Rewrites are added one after another, in the order in which a build applies them; each row is the network with all of
them so far, and the memory modes come on top of all. Activation memory is the engine builder's own report at the
largest sizes of the row's ranges.
"""

from __future__ import annotations

import datetime as dt
import gc
import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from svd_trt.benchmarks.machine import describe_machine
from svd_trt.engine.plan import build_plan
from svd_trt.engine.spec import NetworkName, Range, Ranges, network_specs
from svd_trt.engine.tensorrt_import import find_tensorrt
from svd_trt.export.checkpoint import COMPONENT_OF, Checkpoint, open_checkpoint
from svd_trt.export.rewrites import REWRITES
from svd_trt.export.rewrites.feed_forward import split_feed_forwards


@dataclass(frozen=True)
class Row:
    """One way to write a network: its first ``rewrites`` rewrites, and the modes."""

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


@click.command()
@click.argument("model", default="random:svd-xt")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
@click.option(
    "--row", "labels", multiple=True, help="Measure these rows only, and put them into the file that is there."
)
def main(model: str, output: Path, labels: tuple[str, ...]) -> None:
    """Measure the networks of MODEL with more and more rewrites, and in each memory mode."""
    checkpoint = open_checkpoint(model)
    wanted: list[tuple[NetworkName, Row]] = [("denoiser", row) for row in ROWS + MODES]
    wanted += [("vae_decoder", row) for row in ROWS]
    old = json.loads(output.read_text())["rows"] if labels else []
    rows = {(row["network"], row["rewrite"]): row for row in old}
    for name, row in wanted:
        if not labels or row.label in labels:
            measured = {"network": name, "rewrite": row.label} | _measure(checkpoint, name, row)
            rows[name, row.label] = measured
            click.echo(json.dumps(measured))
    record = {
        "benchmark": "rewrite_effects",
        "date": dt.date.today().isoformat(),
        "model": model,
        "machine": describe_machine(),
        "rows": list(rows.values()),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")


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


def _measure(checkpoint: Checkpoint, name: NetworkName, row: Row) -> dict[str, Any]:
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
            "activation_bytes": plan.activation_bytes,
            "weight_bytes": plan.weight_bytes,
            "layers": plan.layers,
            "export_seconds": round(exported, 1),
            "engine_seconds": round(plan.seconds, 1),
        }


if __name__ == "__main__":
    main()
