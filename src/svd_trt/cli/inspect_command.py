"""``svd-trt inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click
import msgspec

from svd_trt.cli.console import print_json, stdout
from svd_trt.cli.inspect_kernels import KernelOptions, add_kernels, show_kernels
from svd_trt.cli.inspect_tables import make_table, passes_per_step, print_head, print_plan, print_tables
from svd_trt.cli.sizes import ByteSize
from svd_trt.cli.trtexec import trtexec_commands
from svd_trt.engine.bundle import Bundle
from svd_trt.engine.manifest import Manifest, NetworkEntry, precision_of
from svd_trt.engine.memory import MemoryRequest, compare_plans, plan_memory
from svd_trt.engine.spec import LARGEST_STEPS, SHALLOW, NetworkName
from svd_trt.errors import ArgumentError, BackendError
from svd_trt.runtime.settings import require_shallow

__all__ = ["command"]


_NETWORKS = get_args(NetworkName)
_ALL = "all"  # the value of --kernels if no network is named
_OF_BUDGET = {"num_frames", "deep_every"}
_OF_BOTH = {"height", "width"}


@click.command("inspect", short_help="Show what BUNDLE contains and how much memory it needs.")
@click.argument("bundle", type=click.Path(path_type=Path), required=False, metavar="BUNDLE")
@click.option(
    "--vram-budget",
    type=ByteSize(),
    help="Show how a video is made within this much VRAM, such as 8GB, instead of the tables.",
)
@click.option("--num-frames", type=click.IntRange(1), help="Frames of that video.  [default: the checkpoint's]")
@click.option(
    "--deep-every",
    type=click.IntRange(1, LARGEST_STEPS),
    help="As for infer: more than 1 loads the shallow denoiser too.  [default: 1]",
)
@click.option(
    "--height",
    type=click.IntRange(8),
    help="Height of that video or run.  [default: the largest; of a run, the first profile's]",
)
@click.option("--width", type=click.IntRange(8), help="Width of that video or run.  [default: likewise]")
@click.option(
    "--kernels",
    "network",
    is_flag=False,
    flag_value=_ALL,
    metavar="[NETWORK]",
    help="Show the kernels of the engines, or of one network's, instead of the tables.",
)
@click.option("--frames", type=click.IntRange(1), help="Frames of a run.  [default: the first profile's]")
@click.option("--branches", type=click.IntRange(1, 2), help="Guidance branches of a run, 1 or 2.  [default: likewise]")
@click.option("--chunk", type=click.IntRange(1), help="Frames decoded together.  [default: likewise]")
@click.option("--batch", type=click.IntRange(1), help="Videos of a run.  [default: likewise]")
@click.option(
    "--gpu", "gpus", multiple=True, help="Add the roofline model of this GPU, such as 'RTX 4090'; repeatable."
)
@click.option(
    "--top", type=click.IntRange(0), help=f"Number of heaviest kernels to show.  [default: {KernelOptions.top}]"
)
@click.option(
    "--compare",
    type=click.Path(path_type=Path),
    metavar="OTHER",
    help="Show how the kernels changed from OTHER, which is before, to BUNDLE, which is after.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Draw bytes by kind, of both bundles with --compare.",
)
@click.option(
    "--trtexec",
    type=click.Choice(_NETWORKS),
    help="Print the command that runs this network's plan in NVIDIA's benchmark tool, one for each profile, instead.",
)
@click.option(
    "--self-test",
    is_flag=True,
    help="Check every file, run the networks on the CPU, and compare with the bundle's golden values, instead.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON; sizes are in bytes.")
def command(
    bundle: Path | None,
    vram_budget: int | None,
    network: str | None,
    trtexec: NetworkName | None,
    self_test: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Show what BUNDLE contains and how much memory it needs, without loading its engines.

    Memory is the engine builder's report for the largest sizes of the ranges; FLOP are counted from the graphs at the
    same sizes. VRAM is for one video: fewer frames, smaller decode chunks, and engines that are loaded one at a time
    need less.

    With --vram-budget, the command shows the fastest way to make one video with guidance within the budget. If there
    is none, the exit code is 1 and the message names the smallest budget that works.

    With --kernels, the command shows what the engine builder compiled: kernels by kind, the bytes that they read and
    write, their arithmetic, and with --gpu a model of the least time that this takes on paper. It needs no GPU. Sizes
    that are not given are those of a network's first profile. With --compare, both bundles are shown at the same sizes.

    \b
    Examples:
        svd-trt inspect svd-xt
        svd-trt inspect svd-xt --kernels denoiser --frames 14 --gpu "RTX 4090" --gpu L4
        svd-trt inspect svd-xt --kernels --compare svd-xt-plain --plot kernels.png
        svd-trt inspect svd-xt --vram-budget 8GB --num-frames 14
        svd-trt inspect svd-xt --trtexec denoiser
        svd-trt inspect svd-xt --self-test
        svd-trt inspect svd-xt --json | jq .networks.denoiser.activation_bytes
    """
    given = {name for name, value in options.items() if value not in (None, ())}
    path = _bundle_path(bundle, network)
    if trtexec is not None and (as_json or network is not None or vram_budget is not None):
        raise click.UsageError("--trtexec prints commands only; leave out --json, --kernels and --vram-budget")
    if self_test:
        if given or trtexec is not None or network is not None or vram_budget is not None:
            raise click.UsageError("--self-test takes no other option than --json; leave the others out")
        _self_test(path, as_json=as_json)
        return
    _check_options(given, budget=vram_budget is not None, kernels=network is not None)
    if str(options["plot"]) == "-":
        raise click.UsageError("--plot writes a file, and not to standard output; name one such as kernels.png")
    opened = Bundle.open(path, verify=False)
    manifest = opened.manifest
    if trtexec is not None:
        if trtexec not in manifest.networks:
            raise ArgumentError(f"{path} has no {SHALLOW}; build one with --shallow-steps, or name another network")
        click.echo("\n".join(trtexec_commands(opened, trtexec)))
        return
    if network is not None:
        chosen_options = {name: options[name] for name in given}
        if "compare" in given and not as_json:
            _check_comparison(given)
        wanted = KernelOptions(None if network == _ALL else network, **chosen_options)
        if as_json:
            print_json(add_kernels(_as_dict(manifest), opened, wanted))
        else:
            show_kernels(stdout(), opened, wanted)
        return
    request = _request(manifest, options["num_frames"], options["height"], options["width"], options["deep_every"] or 1)
    plan = None if vram_budget is None else plan_memory(manifest, request, vram_budget)
    if as_json:
        chosen = {} if plan is None else {"plan": {**plan.as_dict(), "budget": vram_budget}}
        print_json(_as_dict(manifest) | chosen)
        return
    console = stdout()
    print_head(console, path, manifest)
    if plan is not None and vram_budget is not None:
        print_plan(console, manifest, request, plan, vram_budget)
    else:
        print_tables(console, manifest)


def _self_test(path: Path, *, as_json: bool) -> None:
    """Print every comparison with the golden values; exit with 1 if one differs by too much."""
    from svd_trt.runtime.golden import check_golden

    bundle = Bundle.open(path)
    checks = check_golden(bundle)
    failed = [check.name for check in checks if not check.passed]
    if as_json:
        print_json({"checks": [{**msgspec.structs.asdict(c), "passed": c.passed} for c in checks]})
    else:
        console = stdout()
        table = make_table("golden value", "difference", "allowed", "")
        for check in checks:
            table.add_row(
                check.name, f"{check.difference:.2g}", f"{check.allowed:.2g}", "ok" if check.passed else "DIFFERS"
            )
        console.print(table)
        if bundle.manifest.golden is not None and bundle.manifest.golden.frames is None:
            console.print(
                "The bundle has no golden frames, so no network ran; `svd-trt build --golden-frames` adds them."
            )
    if failed:
        raise BackendError(
            f"{path} gives other values here than where it was built: {', '.join(failed)}; "
            "run `pip list` here and there, and install the same numpy, Pillow and onnxruntime"
        )


def _bundle_path(bundle: Path | None, network: str | None) -> Path:
    """The argument BUNDLE, which ``--kernels`` takes for its network if the option is before it."""
    swapped = network is not None and network not in (_ALL, *_NETWORKS)
    if swapped and (bundle is None or str(bundle) in _NETWORKS):
        right = f"inspect {network} --kernels {bundle or ''}".rstrip()
        raise click.UsageError(f"--kernels takes {network!r} for the name of a network; write: {right}")
    if bundle is not None:
        return bundle
    raise click.UsageError("Missing argument 'BUNDLE'.")


def _check_options(given: set[str], *, budget: bool, kernels: bool) -> None:
    if budget and kernels:
        raise click.UsageError("--vram-budget and --kernels show different things; give one of them")
    for name in sorted(given):
        option = f"--{name.removesuffix('s') if name == 'gpus' else name.replace('_', '-')}"
        if name in _OF_BOTH and not (budget or kernels):
            raise click.UsageError(f"{option} is for --vram-budget or --kernels; give one of them too")
        if name in _OF_BUDGET and not budget:
            frames = ", and --frames for --kernels" if name == "num_frames" else ", which shows other things"
            raise click.UsageError(f"{option} is for --vram-budget{frames if kernels else '; give both'}")
        if name not in _OF_BOTH | _OF_BUDGET and not kernels:
            raise click.UsageError(f"{option} is for --kernels; give both")


def _check_comparison(given: set[str]) -> None:
    """Refuse options whose figures a printed comparison does not have; its JSON has them."""
    ignored = sorted(given & {"gpus", "top"})
    if ignored:
        option = "--gpu" if ignored[0] == "gpus" else "--top"
        raise click.UsageError(f"{option} with --compare is for --json; leave it out, or leave --compare out")


def _request(
    manifest: Manifest, num_frames: int | None, height: int | None, width: int | None, deep_every: int
) -> MemoryRequest:
    """One video, of the largest size unless the caller gives another."""
    require_shallow(manifest, deep_every)
    ranges = manifest.ranges
    frames = num_frames or ranges.frames.clamp(manifest.model.num_frames)
    return MemoryRequest(frames, height or ranges.height.max, width or ranges.width.max, shallow_steps=deep_every > 1)


def _as_dict(manifest: Manifest) -> dict[str, Any]:
    return {
        "svd_trt_version": manifest.svd_trt_version,
        "source": msgspec.to_builtins(manifest.source),
        "precision": manifest.precision,
        "num_frames": manifest.model.num_frames,
        "tensorrt": msgspec.to_builtins(manifest.tensorrt),
        "passes_per_step": passes_per_step(manifest),
        "graph": msgspec.to_builtins(manifest.graph),
        "ranges": msgspec.to_builtins(manifest.ranges),
        "networks": {name: _network_dict(manifest, name, entry) for name, entry in manifest.networks.items()},
        "vram": [
            {
                "frames": request.frames,
                "decode_chunk": plan.decode_chunk_size,
                "resident": plan.resident,
                "bytes": plan.total_bytes,
            }
            for request, plan in compare_plans(manifest)
        ],
    }


def _network_dict(manifest: Manifest, name: Any, entry: NetworkEntry) -> dict[str, Any]:
    plan = entry.plan
    return {
        "precision": precision_of(name, manifest.precision),
        "nodes": entry.onnx.nodes,
        "parameters": entry.onnx.parameters,
        "flops": entry.flops,
        "onnx_bytes": sum(file.size for file in entry.onnx.files),
        "plan_bytes": plan.file.size if plan else None,
        "layers": plan.layers if plan else None,
        "weight_bytes": plan.weight_bytes if plan else None,
        "activation_bytes": plan.activation_bytes if plan else None,
        "profiles": msgspec.to_builtins(plan.profiles) if plan else [],
        "tensors": [
            {
                "name": tensor.name,
                "role": "output" if tensor in entry.spec.outputs else "input",
                "dtype": tensor.dtype,
                "shape": [axis if isinstance(axis, int) else str(axis) for axis in tensor.shape],
                "meaning": tensor.meaning,
                **dict(zip(("min", "opt", "max"), entry.spec.profile(tensor), strict=True)),
            }
            for tensor in entry.spec.tensors
        ],
    }
