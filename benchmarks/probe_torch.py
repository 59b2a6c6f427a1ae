"""The networks in torch on the GPU: the rewritten ones against diffusers' own, eager and compiled."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from svd_trt.benchmarks.measuring import clock_for
from svd_trt.benchmarks.probe_steps import ProbeError, ProbeJob, Report, Sizes, sizes_of
from svd_trt.engine.spec import NetworkName, NetworkSpec, Range, Ranges, network_specs
from svd_trt.errors import first_line
from svd_trt.export.checkpoint import COMPONENT_OF
from svd_trt.export.checkpoint_kinds import open_checkpoint
from svd_trt.export.networks import make_network
from svd_trt.export.reference import draw_inputs
from svd_trt.export.rewrites.attention import BoundedAttention

__all__ = [
    "Contenders",
    "check_errors",
    "check_frames",
    "compare_chunk",
    "compare_scores",
    "device_of",
    "diffusers_decode",
    "diffusers_step",
    "draw_tensors",
    "exact_step",
    "fixed_spec",
    "load_component",
    "race",
    "race_decoders",
    "race_denoisers",
    "relative_error",
    "rounded",
    "scored_layers",
]

Contenders: TypeAlias = Mapping[str, Callable[[], Any]]
"""What is timed, by name. The first is what the others are compared with."""

_ERROR_FACTOR, _ERROR_OFFSET = 2.0, 0.01
_MEAN_LEVEL_ERROR, _LARGEST_LEVEL_ERROR = 0.5, 64  # of 255


def race_denoisers(job: ProbeJob, report: Report, *, compiled: bool) -> None:
    """Time a denoising step with both branches: diffusers' UNet with guidance and sampler around it, and ours."""
    sizes, device = sizes_of(job), device_of(job)
    inputs = draw_tensors(fixed_spec("denoiser", sizes), device)
    plain = load_component("denoiser", sizes, device)
    exact = exact_step(plain, inputs)
    ours = _rewritten("denoiser", copy.deepcopy(plain), device)
    report(loaded=True)
    forms: dict[str, Any] = {"diffusers": plain, "rewritten": ours}
    if compiled:
        forms |= {f"{name} compiled": _compiled(module, job) for name, module in forms.items()}

    def step(name: str) -> Callable[[], Tensor]:
        unet = forms[name]
        return (lambda: unet(**inputs)[1]) if name.startswith("rewritten") else lambda: diffusers_step(unet, inputs)

    results = race({name: step(name) for name in forms}, sizes.rounds, device, report)
    check_errors({name: relative_error(result, exact) for name, result in results.items()}, report)


def race_decoders(job: ProbeJob, report: Report, *, compiled: bool) -> None:
    """Time the decode of a chunk."""
    sizes = sizes_of(job)
    results = _decode(job, report, sizes.chunk, sizes.rounds, compiled=compiled)
    for name, frames in results.items():
        check_frames(name, frames, results["diffusers"], report)


def compare_chunk(job: ProbeJob, report: Report, *, chunk: int) -> None:
    """Decode ``chunk`` frames together, once."""
    frames = sizes_of(job).chunks[chunk]
    results = _decode(job, report, frames, 1, compiled=False)
    check_frames("rewritten", results["rewritten"], results["diffusers"], report)


def _decode(job: ProbeJob, report: Report, chunk: int, rounds: int, *, compiled: bool) -> dict[str, Tensor]:
    sizes, device = sizes_of(job), device_of(job)
    latents = draw_tensors(fixed_spec("vae_decoder", sizes, chunk), device)["latents"]
    plain = load_component("vae_decoder", sizes, device)
    ours = _rewritten("vae_decoder", copy.deepcopy(plain), device)
    report(loaded=True, frames=chunk)
    forms: dict[str, Any] = {"diffusers": lambda x: diffusers_decode(plain, x), "rewritten": ours}
    if compiled:
        forms |= {f"{name} compiled": _compiled(function, job) for name, function in forms.items()}

    def decode(name: str) -> Callable[[], Tensor]:
        return lambda: forms[name](latents)

    return race({name: decode(name) for name in forms}, rounds, device, report)


def race(contenders: Contenders, rounds: int, device: torch.device, report: Report) -> dict[str, Any]:
    """Run each contender once to warm up, then time all of them in interleaved rounds; the results of the warm-up.

    A contender that does not fit into memory is reported and left out, unless it is the first.

    It reports medians in milliseconds, the median of each round's ratio to the first contender, and the memory that a
    run takes beyond what was allocated before.
    """
    clock = clock_for(gpu=device.type == "cuda")
    results: dict[str, Any] = {}
    peaks: dict[str, int] = {}
    with torch.no_grad():
        for name, run in contenders.items():
            before = _start_peak(device)
            try:
                results[name] = run().cpu()
            except torch.OutOfMemoryError as error:
                if not results:  # without the first, there is nothing to compare with
                    raise
                report(out_of_memory={name: first_line(error)})
                continue
            clock.wait()
            peaks[name] = _peak(device) - before
            report(warm=list(results))
        contenders = {name: contenders[name] for name in results}
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, run in contenders.items():
                start = clock.event()
                run()
                end = clock.event()
                clock.wait()
                seconds[name].append(clock.seconds(start, end))
    first = seconds[next(iter(results))]
    report(
        median_ms={name: round(1e3 * statistics.median(values), 3) for name, values in seconds.items()},
        speedup={
            name: round(statistics.median(a / b for a, b in zip(first, values, strict=True)), 3)
            for name, values in seconds.items()
        },
        peak_bytes=peaks if device.type == "cuda" else None,
    )
    return results


def diffusers_step(unet: Any, x: Mapping[str, Tensor]) -> Tensor:
    """The denoised latents ``[B, F, C, h, w]`` by diffusers' own UNet for the inputs of the network ``denoiser``."""
    c_in, c_noise, c_skip, c_out = x["coefficients"][:4]
    branches, batch = x["image_latents"].shape[:2]
    frames, dtype = x["latents"].shape[1], unet.dtype
    noisy = (x["latents"] * c_in).repeat(branches, 1, 1, 1, 1)
    condition = x["image_latents"].flatten(0, 1)[:, None].expand(-1, frames, -1, -1, -1)
    sample = torch.cat([noisy, condition], dim=2).to(dtype)
    embeds, ids = x["image_embeds"].flatten(0, 1).to(dtype), x["added_time_ids"].repeat(branches, 1)
    (prediction,) = unet(sample, c_noise, encoder_hidden_states=embeds, added_time_ids=ids, return_dict=False)
    weighted = prediction.float().unflatten(0, (branches, batch)) * x["guidance"][:, None, :, None, None, None]
    result: Tensor = c_skip * x["latents"] + c_out * weighted.sum(0) + x["partial_denoised"]
    return result


def exact_step(unet: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """`diffusers_step` in fp32, on the CPU afterwards; ``unet`` stays as it is."""
    torch.backends.cudnn.allow_tf32 = False  # on by default, and ten bits of mantissa are not fp32
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad():
        return diffusers_step(copy.deepcopy(unet).float(), inputs).cpu()


def diffusers_decode(vae: Any, latents: Tensor) -> Tensor:
    """Frames, uint8 ``[n, H, W, 3]``, by diffusers' own VAE."""
    scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
    decoded = vae.decode(scaled, num_frames=len(latents), return_dict=False)[0].float()
    levels: Tensor = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round()
    return levels.permute(0, 2, 3, 1).to(torch.uint8)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference over that of ``exact``; infinite if a value is not finite."""
    error = float((found.float() - exact).norm() / exact.norm())
    return error if np.isfinite(error) else float("inf")


def check_frames(name: str, found: Tensor, expected: Tensor, report: Report) -> None:
    """Compare frames in levels of 255.

    Raises:
        ProbeError: they differ by more than half precision explains.
    """
    levels = (found.int() - expected.int()).abs()
    mean, most = float(levels.double().mean()), int(levels.max())
    report(**{f"levels_{name.replace(' ', '_')}": {"mean": round(mean, 4), "most": most}})
    if mean > _MEAN_LEVEL_ERROR or most > _LARGEST_LEVEL_ERROR:
        raise ProbeError(f"frames by {name} are wrong: {mean:.2f} levels from diffusers on average, {most} at most")


def check_errors(errors: dict[str, float], report: Report) -> None:
    """Compare errors against fp32 with that of ``diffusers`` in half precision, whose size depends on the weights.

    Raises:
        ProbeError: another error is much larger.
    """
    report(relative_error={name: rounded(error) for name, error in errors.items()})
    bound = _ERROR_FACTOR * errors["diffusers"] + _ERROR_OFFSET
    if wrong := [name for name, error in errors.items() if not error <= bound]:
        raise ProbeError(f"farther from fp32 than diffusers in half precision is: {', '.join(wrong)}")


def rounded(value: float) -> float | None:
    """Three digits; None for what JSON cannot hold."""
    return float(f"{value:.3g}") if np.isfinite(value) else None


def device_of(job: ProbeJob) -> torch.device:
    """The CPU in a dry run, else the GPU, where new tensors are made from now on."""
    if job.dry_run:
        return torch.device("cpu")
    torch.set_default_device("cuda")
    return torch.device("cuda")


def load_component(name: NetworkName, sizes: Sizes, device: torch.device) -> Any:
    """Diffusers' model of the network, in the type that it has in an fp16 bundle."""
    with torch.device("cpu"):  # random weights are drawn there
        model = open_checkpoint(sizes.model).load(COMPONENT_OF[name], torch.float16)
    return model.to(device).eval().requires_grad_(requires_grad=False)


def _rewritten(name: NetworkName, model: Any, device: torch.device) -> Any:
    return make_network(name, model, doubling=True).to(device)


def _compiled(module: Any, job: ProbeJob) -> Any:
    if job.dry_run:  # its code generation would take minutes
        return torch.compile(module, backend="eager", fullgraph=True)
    return torch.compile(module, mode="reduce-overhead", fullgraph=True)


def fixed_spec(name: NetworkName, sizes: Sizes, chunk: int | None = None) -> NetworkSpec:
    """The network's tensors for one video, both branches and these sizes alone."""
    n = {"frames": sizes.frames, "chunk": chunk or sizes.chunk, "height": sizes.height, "width": sizes.width}
    fixed = {symbol: Range(n.get(symbol, 1), n.get(symbol, 1), n.get(symbol, 1)) for symbol in Ranges.__struct_fields__}
    ranges = Ranges(**(fixed | {"branches": Range(2, 2, 2)}))
    return network_specs(open_checkpoint(sizes.model).description.model, ranges)[name]


def draw_tensors(spec: NetworkSpec, device: torch.device) -> dict[str, Tensor]:
    """Inputs of ``spec``, the same at every call."""
    return {name: torch.from_numpy(array).to(device) for name, array in draw_inputs(spec, {}).items()}


def compare_scores(job: ProbeJob, report: Report) -> None:
    """Self-attention with scores far beyond half precision, in half precision on this device, against fp32.

    diffusers' layer is reported and may fail. Ours must be finite, and close where a bound is known.
    """
    figures: dict[str, Any] = {}
    wrong: list[str] = []
    for name, bound, layer, hidden in scored_layers(sizes_of(job).tokens, device_of(job)):
        exact = layer(hidden)
        layer.half()
        errors = {
            "diffusers": relative_error(layer(hidden.half()), exact),
            "bounded": relative_error(BoundedAttention(layer)(hidden.half()), exact),
        }
        figures[name] = {key: rounded(error) for key, error in errors.items()}
        report(relative_error=figures)
        if not errors["bounded"] <= bound:
            wrong.append(name)
    if wrong:
        raise ProbeError(f"the bounded attention is not as close to fp32 as it must be: {', '.join(wrong)}")


def scored_layers(tokens: int, device: torch.device) -> Iterator[tuple[str, float, Any, Tensor]]:
    """Kinds of large scores: their name, the bound of an error, a layer of diffusers in fp32, and its input."""
    from diffusers.models.attention_processor import Attention

    channels, heads = 128, 2
    for name, (size, common, bound) in _SCORES.items():
        torch.manual_seed(0)
        layer = Attention(channels, heads=heads, dim_head=channels // heads).eval().to(device)
        layer.requires_grad_(requires_grad=False)
        hidden = torch.randn(2, tokens, channels)
        for project in (layer.to_q, layer.to_k):
            if common is None:
                project.weight.copy_(torch.eye(channels) * size)
            else:  # all keys have a large part in common, and their small differences decide
                project.weight.mul_(0.3)
                project.weight[:, 0] = (common / 8) ** 0.5
        if common is not None:
            hidden[..., 0] = 1.0
        yield name, bound, layer, hidden


_SCORES: dict[str, tuple[float, float | None, float]] = {
    "own token, scores to 130,000": (128.0, None, 0.01),
    "own token, scores to 1,300,000": (400.0, None, 0.01),
    "own token, scores to 18,000,000": (1500.0, None, 0.01),
    "competing keys, scores of 300": (0.0, 300.0, 1.0),
    "competing keys, scores of 1,500": (0.0, 1500.0, 1.5),
    "competing keys, scores of 6,000": (0.0, 6000.0, 1.5),
}
"""Size of the weights, or the part that all scores have in common, and the largest relative error of the bounded
layer. Where keys compete, half precision rounds what decides, so the bound only says that the result is one."""


def _start_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def _peak(device: torch.device) -> int:
    return int(torch.cuda.max_memory_allocated()) if device.type == "cuda" else 0
