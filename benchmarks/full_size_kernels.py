"""What TensorRT compiles the full-size networks to: kernels, bytes, memory and build time of each variant.

    python -m svd_trt.benchmarks.full_size_kernels measure -o benchmarks/results/kernels-full-size.json
    python -m svd_trt.benchmarks.full_size_kernels page docs/kernels.md benchmarks/results/kernels-full-size.json

``measure`` runs a real ``svd-trt build`` for each variant, and builds the decoder alone for chunks of 1, 8 and 14
frames. Each takes minutes and up to 8 GB of memory. With ``--variant`` it measures those only, and keeps the others of
the file. ``page`` writes the tables of a page from the file.
"""

from __future__ import annotations

import datetime as dt
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from svd_trt.benchmarks.full_size_builds import VARIANTS, measure_build
from svd_trt.benchmarks.machine import describe_machine
from svd_trt.benchmarks.report import Rows, markdown_table, with_section
from svd_trt.benchmarks.results import write_file
from svd_trt.engine.kernel_kinds import KINDS
from svd_trt.engine.kernel_summary import profile_summary
from svd_trt.engine.kernels import read_kernels
from svd_trt.engine.plan import build_plan, kernels_path
from svd_trt.engine.spec import Range, network_specs
from svd_trt.engine.tensorrt_import import find_tensorrt
from svd_trt.errors import OutputError
from svd_trt.export.checkpoint_kinds import open_checkpoint
from svd_trt.export.export_process import Exporter
from svd_trt.export.options import BuildOptions, ranges_of
from svd_trt.export.recipe import make_recipe
from svd_trt.units import format_bytes, format_seconds

__all__ = ["BEGIN", "BUILDS", "DECODER_CHUNKS", "END", "kernel_tables"]

BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"

BUILDS: dict[str, list[str]] = VARIANTS | {
    "1 profile": ["--no-exact"],
    "4 profiles": ["--exact-frames", "8,14"],
}
"""Options of ``svd-trt build``; the default has two profiles."""

DECODER_CHUNKS = (1, 8, 14)

_TOP = 12  # heaviest kernels that the record names
_NETWORKS = ("denoiser", "vae_decoder")


@click.group()
def main() -> None:
    """Record the kernels of full-size engines."""


@main.command("measure")
@click.argument("model", default="random:svd-xt")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="JSON file to write.")
@click.option(
    "--variant",
    "names",
    type=click.Choice([*BUILDS, *(f"decoder {chunk}" for chunk in DECODER_CHUNKS)]),
    multiple=True,
    help="Only these; the others of the file are kept.",
)
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), help="Where to build.  [default: /tmp]")
def measure(model: str, output: Path, names: tuple[str, ...], work: Path | None) -> None:
    """Build MODEL in each variant and record its kernels."""
    decoders = {f"decoder {chunk}": chunk for chunk in DECODER_CHUNKS}
    old = json.loads(output.read_text()) if names and output.exists() else {}
    if old and old["model"] != model:
        raise click.UsageError(f"{output} has figures of {old['model']}; measure all variants, or choose another file")
    variants = old.get("variants", {})
    machine = describe_machine()
    order = (*BUILDS, *decoders)
    for name in names or order:
        chunk = decoders.get(name)
        found = _measure_decoder(model, chunk, work) if chunk else _measure_variant(model, BUILDS[name], work)
        variants[name] = {"date": dt.date.today().isoformat(), "machine": machine} | found
        ordered = {known: variants[known] for known in order if known in variants}
        record = {"benchmark": "full_size_kernels", "model": model, "variants": ordered}
        write_file(output, (json.dumps(record, indent=1) + "\n").encode())  # after each, since each takes minutes
        click.echo(_line(name, found))


def _measure_variant(model: str, options: list[str], work: Path | None) -> dict[str, Any]:
    found = measure_build(model, options, work, ["--kernels", "--top", str(_TOP)])
    kept = ("options", "seconds", "peak_rss_bytes", "bundle_bytes", "stages", "passes")
    networks = {name: _network(found["networks"][name]) for name in _NETWORKS}
    return {key: found[key] for key in kept} | {"networks": networks}


def _measure_decoder(model: str, chunk: int, work: Path | None) -> dict[str, Any]:
    """The decoder with an engine for chunks of ``chunk`` frames alone."""
    checkpoint, options = open_checkpoint(model), BuildOptions()
    facts = checkpoint.description
    spec = network_specs(facts.model, ranges_of(options, facts.model))["vae_decoder"]
    recipe = make_recipe(spec, options.precision, options.graph, facts.upsamplers)
    exact = {symbol: Range(r.opt, r.opt, r.opt) for symbol, r in spec.ranges.items()} | {
        "chunk": Range(chunk, chunk, chunk)
    }
    with tempfile.TemporaryDirectory(dir=work) as folder:
        path = Path(folder) / "vae_decoder.onnx"
        with Exporter(checkpoint, []) as exporter:
            exporter.export(recipe, path)
        plan = path.with_suffix(".plan")
        report = build_plan(find_tensorrt("tensorrt-rtx"), path, spec, plan, [exact])
        profile = profile_summary(read_kernels(kernels_path(plan)).profiles[0], {}, _TOP) | {"taken": True}
        network = {"plan_bytes": plan.stat().st_size, "weight_bytes": report.weight_bytes, "profiles": [profile]}
    return {"engine_seconds": round(report.seconds, 1), "networks": {"vae_decoder": network}}


def _network(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: fields[key] for key in ("plan_bytes", "weight_bytes", "nodes", "flops", "profiles")}


def _line(name: str, found: dict[str, Any]) -> str:
    parts = []
    for network, fields in found["networks"].items():
        for profile in fields["profiles"]:
            moved = format_bytes(_moved(profile)) if profile["bytes"] else "-"
            parts.append(f"{network} {_ranges(profile)}: {profile['kernels']} kernels, {moved}")
    return f"{name}: {'; '.join(parts)}"


@main.command("page")
@click.argument("page", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
def write_page(page: Path, file: Path) -> None:
    """Write the tables of PAGE from FILE."""
    try:
        text, record = page.read_text(), json.loads(file.read_text())
    except OSError as error:
        raise OutputError(f"cannot read {error.filename}: {error.strerror}") from error
    write_file(page, with_section(text, kernel_tables(record), BEGIN, END).encode())


def kernel_tables(record: dict[str, Any]) -> str:
    """The tables of a record in Markdown: profiles of each variant, bytes by kind, and what builds cost."""
    variants = record["variants"]
    parts = []
    for network, title in (("denoiser", "Denoiser, one run"), ("vae_decoder", "VAE decoder, one chunk")):
        having = {name: found["networks"][network] for name, found in variants.items() if network in found["networks"]}
        parts += [f"**{title}**", markdown_table(_profile_rows(having)), markdown_table(_kind_rows(having))]
    builds = {name: found for name, found in variants.items() if "seconds" in found}
    parts += ["**Builds**", markdown_table(_build_rows(builds))]
    return "\n\n".join(parts)


def _profile_rows(networks: dict[str, dict[str, Any]]) -> Rows:
    header = ["variant", "profile", "kernels", "read and written", "weights", "fp32 spills", "TFLOP", "activations"]
    rows: Rows = [header]
    for name, fields in networks.items():
        for index, profile in enumerate(fields["profiles"]):
            label = name if index == 0 else ""
            activations = _gb(profile["activation_bytes"])
            rows.append([label, _ranges(profile), f"{profile['kernels']:,}", *_figures(profile), activations])
    return rows


def _figures(profile: dict[str, Any]) -> list[str]:
    sized = profile["bytes"]
    if sized is None:
        return ["-"] * 4
    tflop = f"{profile['flops'] / 1e12:.1f}"
    return [_gb(_moved(profile)), _gb(sized["weights"]), _gb(sized["fp32_spills"]), tflop]


def _kind_rows(networks: dict[str, dict[str, Any]]) -> Rows:
    """Bytes and kernels of each kind, in the profile that the runtime takes."""
    taken = {name: next(p for p in fields["profiles"] if p["taken"]) for name, fields in networks.items()}
    kinds = [kind for kind in KINDS if any(kind in profile["by_kind"] for profile in taken.values())]
    rows: Rows = [["GB (kernels)", *taken]]
    for kind in kinds:
        cells = (profile["by_kind"].get(kind) for profile in taken.values())
        rows.append([kind, *(f"{_gb(_moved(cell))} ({cell['kernels']})" if cell else "-" for cell in cells)])
    return rows


def _build_rows(builds: dict[str, dict[str, Any]]) -> Rows:
    names = list(builds)

    def row(title: str, figure: Callable[[dict[str, Any]], str]) -> list[str]:
        return [title, *(figure(builds[name]) for name in names)]

    return [
        ["", *names],
        row("options", lambda b: f"`{' '.join(b['options'])}`" if b["options"] else "none"),
        row("time", lambda b: format_seconds(b["seconds"])),
        row("peak memory (RSS)", lambda b: format_bytes(b["peak_rss_bytes"])),
        row("profiles of the denoiser", lambda b: str(len(b["networks"]["denoiser"]["profiles"]))),
        row("plan of the denoiser", lambda b: format_bytes(b["networks"]["denoiser"]["plan_bytes"])),
        row("plan of the decoder", lambda b: format_bytes(b["networks"]["vae_decoder"]["plan_bytes"])),
    ]


def _moved(fields: dict[str, Any]) -> int:
    """Bytes read and written, without weights."""
    return int(fields["bytes"]["read"] + fields["bytes"]["written"])


def _ranges(profile: dict[str, Any]) -> str:
    def words(r: dict[str, int]) -> str:
        return f"{r['min']}" if r["min"] == r["max"] else f"{r['min']} to {r['max']}"

    return ", ".join(f"{symbol} {words(r)}" for symbol, r in profile["ranges"].items()) or "fixed"


def _gb(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e9:,.3g}" if size < 1e11 else f"{size / 1e9:,.0f}"


if __name__ == "__main__":
    main()
