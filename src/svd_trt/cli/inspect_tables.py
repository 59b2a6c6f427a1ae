"""The tables of ``svd-trt inspect``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from svd_trt.engine.manifest import Manifest, precision_of
from svd_trt.engine.memory import MemoryPlan, MemoryRequest, compare_plans, plan_footprint
from svd_trt.engine.spec import SYMBOLS, Axis
from svd_trt.units import format_bytes, format_count

__all__ = ["make_table", "passes_per_step", "print_head", "print_plan", "print_tables"]

_NOTES = """\
FLOP and memory are for one run at the largest sizes; ~ is an estimate from the
engine builder's report. The CUDA context takes a few hundred MB more.
`--vram-budget 8GB` shows how `svd-trt infer` runs within 8 GB."""

_PLAN_NOTES = """\
Estimated from the engine builder's report. The CUDA context takes a few hundred
MB more."""


def print_tables(console: Console, manifest: Manifest) -> None:
    """Print networks, tensors, ranges and the VRAM of every mode."""
    console.print(_networks(manifest))
    console.print()
    console.print(_tensors(manifest))
    console.print()
    console.print(_symbols(manifest))
    console.print()
    if manifest.tensorrt is None:
        console.print("The bundle has no engines (--backend onnxruntime), so the VRAM that they need is not known.")
    else:
        console.print(_vram(manifest))
        console.print(_NOTES)


def print_plan(console: Console, manifest: Manifest, request: MemoryRequest, plan: MemoryPlan, budget: int) -> None:
    """Print how one video is made within ``budget`` bytes, and what needs them."""
    chosen = make_table("plan", f"{request.frames} frames of {request.width}x{request.height}", left=2)
    chosen.add_row("engines", "all loaded" if plan.resident else "loaded one at a time")
    split = "one at a time, two runs a step" if plan.split_guidance else "together"
    chosen.add_row("guidance branches", split)
    chosen.add_row("decoding", _chunk_text(plan.decode_chunk_size, request.frames))
    if plan.streamed_bytes:
        chosen.add_row("weights in host memory", f"{format_bytes(plan.streamed_bytes)} of the denoiser, streamed")
    console.print(chosen)
    console.print()
    need = plan_footprint(manifest, request, plan)
    assert need is not None, "a plan within a budget has figures"
    memory = make_table("VRAM", "")
    for name, size in {
        "weights": need.weights,
        "activations": need.activations,
        "buffers": need.buffers,
        "total": need.total,
        "budget": budget,
        "left over": budget - need.total,
    }.items():
        memory.add_row(name, format_bytes(size))
    console.print(memory)
    console.print(_PLAN_NOTES)


def print_head(console: Console, path: Path, manifest: Manifest) -> None:
    """Print what the bundle was built from and with."""
    built = manifest.tensorrt
    engines = f"{built.name} {built.version} {built.target}".strip() if built else "none, only ONNX networks"
    graph = manifest.graph
    rows = {
        "bundle": f"{path}, by svd-trt {manifest.svd_trt_version}",
        "model": f"{manifest.source.model}, {manifest.model.num_frames} frames, precision {manifest.precision}",
        **_changes(manifest),
        "engines": engines,
        "graph": f"{'rewritten' if graph.rewrites else 'plain'}, feed-forward in {_times(graph.ff_chunks)}, "
        f"{'operators of ONNX Runtime, ' if graph.operators == 'onnxruntime' else ''}"
        f"guidance branches {'one at a time, two runs a step' if passes_per_step(manifest) == 2 else 'together'}",
    }
    if graph.deep_channels is not None:
        rows["steps"] = "deep ones, and shallow ones between them (svd-trt infer --deep-every 3)"
    for name, value in rows.items():
        console.print(f"{name:8} {value}")
    console.print()


def _changes(manifest: Manifest) -> dict[str, str]:
    """What the UNet has that is not the checkpoint's own."""
    source = manifest.source
    rows = {}
    if source.unet is not None:
        rows["unet"] = source.unet.path or f"{source.unet.model} ({source.unet.commit})"
    if source.loras:
        rows["loras"] = ", ".join(f"{lora.path or lora.model} at scale {lora.scale:g}" for lora in source.loras)
    return rows


def passes_per_step(manifest: Manifest) -> int:
    """Number of denoiser runs in a step with guidance."""
    return 2 if manifest.ranges.branches.max == 1 else 1


def _times(count: int) -> str:
    return "one piece" if count == 1 else f"up to {count} pieces"


def _networks(manifest: Manifest) -> Table:
    table = make_table("network", "type", "nodes", "params", "FLOP", "plan", "weights", "activations")
    for name, entry in manifest.networks.items():
        plan = entry.plan
        memory = (plan.file.size, plan.weight_bytes, plan.activation_bytes) if plan else (None,) * 3
        table.add_row(
            name,
            precision_of(name, manifest.precision),
            f"{entry.onnx.nodes:,}",
            format_count(entry.onnx.parameters),
            format_count(entry.flops),
            *map(format_bytes, memory),
        )
    return table


def _tensors(manifest: Manifest) -> Table:
    table = make_table("network", "tensor", "type", "shape", left=4)
    for name, entry in manifest.networks.items():
        for index, tensor in enumerate(entry.spec.tensors):
            arrow = "->" if tensor in entry.spec.outputs else "  "
            table.add_row("" if index else name, f"{arrow} {tensor.name}", tensor.dtype, _shape(tensor.shape))
    return table


def _symbols(manifest: Manifest) -> Table:
    used = {symbol for entry in manifest.networks.values() for symbol in entry.spec.symbols}
    table = make_table("range", "smallest", "best", "largest")
    table.add_column("", no_wrap=True)
    for symbol, meaning in SYMBOLS.items():
        if symbol in used:
            r = manifest.ranges.of(symbol)
            table.add_row(symbol, *map(str, (r.min, r.opt, r.max)), meaning.partition(":")[0])
    return table


def _vram(manifest: Manifest) -> Table:
    compared = compare_plans(manifest)
    counts = sorted({request.frames for request, _ in compared})
    table = make_table("VRAM for one video", *(f"{n} frames" for n in counts))
    rows: dict[tuple[bool, str], dict[int, str]] = {}
    for request, plan in compared:
        key = (plan.resident, _chunk_text(plan.decode_chunk_size, request.frames))
        rows.setdefault(key, {})[request.frames] = f"~{format_bytes(plan.total_bytes, round_up=True)}"
    for (resident, chunk), cells in rows.items():
        label = f"{'all engines loaded' if resident else 'one engine at a time'}, decoding {chunk}"
        table.add_row(label, *(cells.get(n, "-") for n in counts))
    return table


def _chunk_text(chunk: int, frames: int) -> str:
    if chunk == frames:
        return "all frames together"
    return f"{chunk} frame{'s' if chunk > 1 else ''} at a time"


def make_table(*headings: str, left: int = 1) -> Table:
    """An empty table; all columns but the first ``left`` are aligned to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < left else "right", no_wrap=True)
    return table


def _shape(shape: tuple[Axis, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
