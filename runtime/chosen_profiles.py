"""Which optimisation profiles of the engines a generation takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from svd_trt.engine.manifest import Manifest, NetworkEntry
from svd_trt.engine.memory import networks_of
from svd_trt.engine.profiles import choose_profile
from svd_trt.engine.spec import SHALLOW, NetworkName, Range
from svd_trt.runtime.generation import Job, groups_of
from svd_trt.runtime.settings import guided_steps_of

__all__ = ["ChosenProfile", "chosen_profiles", "describe_profiles"]


@dataclass(frozen=True)
class ChosenProfile:
    """A profile that runs of a network take.

    Attributes:
        index: of the profile in the engine.
        exact: it is for one size only, so all extents of its kernels are fixed.
        ranges: what it holds, by symbol.
    """

    index: int
    exact: bool
    ranges: dict[str, Range]


def chosen_profiles(manifest: Manifest, job: Job, *, latents_only: bool) -> dict[NetworkName, list[ChosenProfile]]:
    """The profiles of every network that ``job`` runs on TensorRT, in the order in which it takes them."""
    request, plan = job.request, job.plan
    fixed = {"frames": request.frames, "height": request.height, "width": request.width}
    pictures = [{**fixed, "pictures": group.stop - group.start} for group in _pictures(manifest, job)]
    together = 1 if plan.split_guidance else 2
    branches = dict.fromkeys(together if guided else 1 for guided in guided_steps_of(job.settings, job.settings.sigmas))
    videos = [{**fixed, "batch": group.stop - group.start, "branches": n} for group in job.groups for n in branches]
    chunks = [{**fixed, "chunk": chunk} for chunk in job.chunks]
    sizes: dict[NetworkName, list[dict[str, int]]] = {
        "image_encoder": pictures,
        "vae_encoder": pictures,
        "denoiser": videos,
        SHALLOW: videos,
        "vae_decoder": [] if latents_only else chunks,
    }
    return {name: _chosen(manifest.networks[name], sizes[name]) for name in networks_of(request) if sizes[name]}


def describe_profiles(chosen: Mapping[NetworkName, list[ChosenProfile]]) -> dict[str, Any]:
    """``chosen`` as plain data, with ranges as ``svd-trt build`` takes them, such as ``2:14:25``."""
    return {
        name: [
            {"index": one.index, "exact": one.exact, "ranges": {s: str(r) for s, r in one.ranges.items()}}
            for one in profiles
        ]
        for name, profiles in chosen.items()
    }


def _pictures(manifest: Manifest, job: Job) -> list[slice]:
    return groups_of(job.request.pictures, manifest.ranges.pictures)


def _chosen(entry: NetworkEntry, sizes: Iterable[Mapping[str, int]]) -> list[ChosenProfile]:
    assert entry.plan is not None
    profiles = [profile.ranges for profile in entry.plan.profiles]
    indices = dict.fromkeys(choose_profile(profiles, one) for one in sizes)
    return [ChosenProfile(i, all(r.fixed for r in profiles[i].values()), profiles[i]) for i in indices]
