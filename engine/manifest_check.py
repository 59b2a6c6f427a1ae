"""Whether the values of a manifest fit together, so that nothing fails later on numbers that no build writes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from svd_trt.engine.manifest import Manifest, PlanEntry, SamplerInfo
from svd_trt.engine.spec import ModelInfo, NetworkName, network_specs

__all__ = ["find_contradiction"]


def find_contradiction(manifest: Manifest) -> str | None:
    """What does not fit, in a few words; None if everything does."""
    return next(_contradictions(manifest), None)


def _contradictions(manifest: Manifest) -> Iterator[str]:
    model = manifest.model
    yield from _of_model(model)
    yield from _of_sampler(manifest.sampler)
    if manifest.graph.deep_channels is not None and manifest.graph.deep_channels < 1:
        yield f"deep_channels is {manifest.graph.deep_channels}"
    specs = network_specs(model, manifest.ranges, manifest.graph.kept(manifest.precision))
    for name in specs.keys() ^ manifest.networks.keys():
        yield f"its graph and its networks do not agree about {name}"
    for name, network in manifest.networks.items():
        if name in specs and network.spec != specs[name]:
            yield f"the tensors of {name} are not those of its model and ranges"
        if not network.onnx.files:
            yield f"{name} has no files"
        if network.plan is not None:
            yield from _of_plan(name, network.plan, set(network.spec.symbols))
    if any(file.size < 0 for file in manifest.files):
        yield "a file has a negative size"


def _of_model(model: ModelInfo) -> Iterator[str]:
    for name, value in msgspec.structs.asdict(model).items():
        if isinstance(value, int) and value < 1:
            yield f"{name} is {value}"
    if not all(map(math.isfinite, model.image_mean)) or not all(0 < value < math.inf for value in model.image_std):
        yield "the statistics of pictures are not numbers above 0"


def _of_sampler(sampler: SamplerInfo) -> Iterator[str]:
    low, high = sampler.sigma_min, sampler.sigma_max
    if not 0 < sampler.rho < math.inf:
        yield f"rho is {sampler.rho:g}"
    if not all(0 < sigma < math.inf for sigma in (low, high, *sampler.training_sigmas) if sigma is not None):
        yield "a noise level is not a number above 0"
    if low is not None and high is not None and low >= high:
        yield f"sigma_min is {low:g} and sigma_max {high:g}"
    if sampler.final_sigma is not None and not 0 <= sampler.final_sigma < math.inf:
        yield f"final_sigma is {sampler.final_sigma:g}"


def _of_plan(name: NetworkName, plan: PlanEntry, symbols: set[str]) -> Iterator[str]:
    if not plan.profiles:
        yield f"the plan of {name} has no profile"
    for profile in plan.profiles:
        if set(profile.ranges) != symbols:
            yield f"a profile of {name} is not one of its symbols"
        if profile.activation_bytes is not None and profile.activation_bytes < 0:
            yield f"a profile of {name} needs less than no memory"
    if plan.weight_bytes is not None and plan.weight_bytes < 0:
        yield f"the weights of {name} take less than no memory"
