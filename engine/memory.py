"""Device memory: how much a way to run a bundle needs, and which way to run is the fastest within a budget.

Both are computed from the manifest, which holds what the engine builder reported; no engine is loaded.

The builder's report is for the largest sizes of each profile of an engine. An exact profile needs what it says.
In the range, activations are proportional to the number of frames that run together (measured for full-size SVD: to
0.1 % from 14 to 25 frames, and for decode chunks of 1 to 25), so the activations of smaller sizes follow from the
report. The same is assumed for pictures, branches and pixels.

To fit a budget, the planner changes these settings in this order. Of two plans the one that changes the last of them
less is the faster one:

1. the decode chunk, from the default of `svd_trt.engine.decode_chunks` down: smaller chunks are the same work in more
   runs. A frame is decoded in the context of its chunk, so the size changes the seams between chunks a little; a size
   that the caller chose is therefore never changed;
2. both guidance branches together: running them one after the other starts twice as many kernels, each over half of
   the work;
3. resident engines: loading gigabytes of them again costs seconds for every video;
4. weights on the device: streamed weights cross the bus in every run of the denoiser, so as few as possible are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from svd_trt.engine.decode_chunks import chunk_choices, chunk_sizes, largest_chunk
from svd_trt.engine.manifest import Manifest, NetworkEntry
from svd_trt.engine.profiles import choose_profile
from svd_trt.engine.spec import (
    DEEP_FEATURES,
    LARGEST_STEPS,
    NETWORKS,
    SHALLOW,
    NetworkName,
    NetworkSpec,
    Range,
)
from svd_trt.errors import ArgumentError, BudgetError
from svd_trt.units import format_bytes, round_up_bytes

__all__ = [
    "Footprint",
    "MemoryPlan",
    "MemoryRequest",
    "activation_bytes",
    "compare_plans",
    "networks_of",
    "plan_footprint",
    "plan_memory",
    "smallest_budget",
    "streaming_buffers",
]

_ELEMENT_BYTES = {"float32": 4, "float16": 2, "uint8": 1}
_ALIGNMENT = 256  # bytes; TensorRT rounds the memory of a context up to it
_STREAMING_SHARE = 8  # buffers for streamed weights are assumed to take an eighth of the weights
_LEAST_RESIDENT = 4  # at least a quarter of the denoiser's weights stays on the device
_LIGHT_FF_CHUNKS = 4


@dataclass(frozen=True)
class MemoryRequest:
    """What is to be generated, as far as memory depends on it.

    Attributes:
        frames: of one video.
        height, width: of a frame, in pixels.
        videos: in all. The denoiser runs over as many together as the bundle takes, and the decoder's chunks run on
            over the end of one video into the next.
        pictures: in all. The encoders run over as many together as the bundle takes.
        guided: with classifier-free guidance, which has two branches.
        guided_in_part: some steps of a guided video have no guidance, and run over one branch.
        decode_chunk_size: frames decoded together, chosen by the caller; None leaves the choice to the planner.
        shallow_steps: some steps run the shallow denoiser.

    Raises:
        ArgumentError: a count or a size is below 1.
    """

    frames: int
    height: int
    width: int
    videos: int = 1
    pictures: int = 1
    guided: bool = True
    decode_chunk_size: int | None = None
    guided_in_part: bool = False
    shallow_steps: bool = False

    def __post_init__(self) -> None:
        counts = {name: value for name, value in asdict(self).items() if type(value) is not bool and value is not None}
        for name, value in counts.items():
            if value < 1:
                raise ArgumentError(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True)
class MemoryPlan:
    """How to run a bundle, and how much device memory that takes.

    Attributes:
        resident: all engines stay loaded; otherwise each is loaded for its stage and unloaded after it. The denoiser
            and the decoder are loaded again for each group of videos that are denoised together. The shallow denoiser
            is loaded together with the denoiser.
        split_guidance: the denoiser runs over one branch at a time, twice a step. False without guidance.
        decode_chunk_size: frames decoded together.
        shallow_steps: the shallow denoiser is one of the engines.
        streamed_bytes: bytes of the denoiser's weights that stay in host memory and are copied in for every run.
        activation_bytes: the block that all engines share, at its largest. None if the bundle has no engines, or if
            their builder did not report it.
        total_bytes: the sum of weights, block, the loop's buffers, and inputs and outputs of the largest other
            network, without the few hundred megabytes of the CUDA context. None as above.
    """

    resident: bool
    split_guidance: bool
    decode_chunk_size: int
    streamed_bytes: int = 0
    activation_bytes: int | None = None
    total_bytes: int | None = None
    shallow_steps: bool = False

    def words(self) -> str:
        """The plan in one line of text."""
        parts = [
            "all engines loaded" if self.resident else "one engine at a time",
            f"guidance branches {'one at a time' if self.split_guidance else 'together'}",
            f"decoding {self.decode_chunk_size} frame{'s' if self.decode_chunk_size > 1 else ''} at a time",
        ]
        if self.streamed_bytes:
            parts.append(f"{format_bytes(self.streamed_bytes, round_up=True)} of weights streamed from host memory")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data, with the field names of the command line's JSON output."""
        names = {"decode_chunk_size": "decode_chunk"}  # the command line's name for it is older
        return {names.get(name, name): value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Footprint:
    """Bytes of device memory by part.

    Attributes:
        weights: of all engines, or, if one is loaded at a time, of the one that needs most in all.
        activations: the block that engines compute in: the most that one of them needs, or what that one needs.
        buffers: inputs and outputs: those of the loop, and those of the largest other network.
    """

    weights: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        """All parts together; the CUDA context takes a few hundred megabytes more."""
        return self.weights + self.activations + self.buffers


def plan_memory(manifest: Manifest, request: MemoryRequest, budget: int | None) -> MemoryPlan:
    """The fastest plan that needs at most ``budget`` bytes; None is no limit.

    Raises:
        ArgumentError: the bundle was not built for the request.
        BudgetError: every plan needs more, or what the engines need is not known.
    """
    fastest = next(_candidates(manifest, request))
    if budget is None:
        return fastest
    if fastest.total_bytes is None:
        raise BudgetError(_unknown(manifest))
    found = _choose(manifest, request, budget)
    if found is None:
        raise BudgetError(_too_small(manifest, request, budget))
    return found


def smallest_budget(manifest: Manifest, request: MemoryRequest) -> int | None:
    """The fewest bytes that `plan_memory` finds a plan for; None if what the engines need is not known.

    Raises:
        ArgumentError: the bundle was not built for the request.
    """
    return _leanest(manifest, request).total_bytes


def compare_plans(manifest: Manifest) -> list[tuple[MemoryRequest, MemoryPlan]]:
    """Plans for one guided video of the largest size that show what a bundle needs at most and at least.

    Videos of a bundle with a shallow denoiser use it. They are for the frame counts that SVD was trained for, if the
    bundle takes them, with resident engines and without, and with the default decode chunk and the smallest. A count
    that the bundle cannot decode is left out.
    """
    ranges = manifest.ranges
    counts = [n for n in (14, 25) if n in ranges.frames] or sorted({ranges.frames.min, ranges.frames.max})
    split = _guidance_choices(ranges.branches, guided=True, in_part=False)[0]
    found = []
    shallow = SHALLOW in manifest.networks
    for resident in (True, False):
        for n in counts:
            request = MemoryRequest(n, ranges.height.max, ranges.width.max, shallow_steps=shallow)
            choices = _default_chunks(manifest, request)
            for chunk in dict.fromkeys(choices[:1] + choices[-1:]):
                plan = MemoryPlan(resident, split, chunk, shallow_steps=shallow)
                found.append((request, _with_figures(manifest, request, plan)))
    return found


def plan_footprint(manifest: Manifest, request: MemoryRequest, plan: MemoryPlan) -> Footprint | None:
    """The bytes of ``plan`` by part; None if what the engines need is not known.

    Resident engines share one block for activations; otherwise it is freed together with its engine.
    """
    sizes = _sizes(manifest, request, plan)
    needs: list[tuple[int, int]] = []
    for name in networks_of(request):
        entry = manifest.networks[name]
        activations = _most_activations(entry, sizes, request)
        if entry.plan is None or entry.plan.weight_bytes is None or activations is None:
            return None
        weights = entry.plan.weight_bytes
        if name == "denoiser" and plan.streamed_bytes:
            activations += streaming_buffers(weights)
            weights -= plan.streamed_bytes
        activations = math.ceil(activations / _ALIGNMENT) * _ALIGNMENT
        if name == SHALLOW:  # loaded beside the denoiser
            weights, activations = needs[-1][0] + weights, max(needs.pop()[1], activations)
        needs.append((weights, activations))
    buffers = _buffers(manifest, sizes, passes=2 if plan.split_guidance else 1)
    if request.guided_in_part:
        buffers += _condition_bytes(manifest.networks["denoiser"].spec, {**sizes, "branches": 1})
    if plan.resident:
        return Footprint(sum(w for w, _ in needs), max(a for _, a in needs), buffers)
    return Footprint(*max(needs, key=sum), buffers)


def networks_of(request: MemoryRequest) -> tuple[NetworkName, ...]:
    """The networks that run, in order; the shallow denoiser is after the denoiser, whose steps it shares."""
    if not request.shallow_steps:
        return NETWORKS
    place = NETWORKS.index("denoiser") + 1
    return (*NETWORKS[:place], SHALLOW, *NETWORKS[place:])


def activation_bytes(entry: NetworkEntry, sizes: Mapping[str, int]) -> int | None:
    """Activations of one engine at ``sizes`` of its symbols, in the profile that a run with these takes.

    Symbols that are not in ``sizes`` are at their largest. None if the network has no engine, or if its builder did
    not report them.
    """
    if entry.plan is None:
        return None
    sizes = {symbol: sizes.get(symbol, r.max) for symbol, r in entry.spec.ranges.items()}
    profile = entry.plan.profiles[choose_profile([p.ranges for p in entry.plan.profiles], sizes)]
    if profile.activation_bytes is None:
        return None
    share = math.prod(Fraction(sizes[symbol], r.max) for symbol, r in profile.ranges.items())
    return math.ceil(profile.activation_bytes * share)


def _most_activations(entry: NetworkEntry, sizes: Mapping[str, int], request: MemoryRequest) -> int | None:
    """What one network needs for a video.

    Its shorter last chunk, and its steps over one branch, may be in a profile that needs more.
    """
    chunks = {sizes["chunk"], request.frames * request.videos % sizes["chunk"] or sizes["chunk"]}
    branches = {sizes["branches"], 1} if request.guided_in_part else {sizes["branches"]}
    needs = [
        activation_bytes(entry, {**sizes, "chunk": chunk, "branches": count}) for chunk in chunks for count in branches
    ]
    known = [need for need in needs if need is not None]
    return max(known) if len(known) == len(needs) else None


def _candidates(manifest: Manifest, request: MemoryRequest) -> Iterator[MemoryPlan]:
    """Every plan without streaming, fastest first; at least one."""
    ranges = manifest.ranges
    for name, value in (("frames", request.frames), ("height", request.height), ("width", request.width)):
        ranges.of(name).require(value, name, f"--{name}")
    for resident in (True, False):
        for split in _guidance_choices(ranges.branches, guided=request.guided, in_part=request.guided_in_part):
            for chunk in _chunks(manifest, request):
                plan = MemoryPlan(resident, split, chunk, shallow_steps=request.shallow_steps)
                yield _with_figures(manifest, request, plan)


def _guidance_choices(branches: Range, *, guided: bool, in_part: bool) -> tuple[bool, ...]:
    """Values of ``split_guidance`` that the denoiser can run with, fastest first.

    Raises:
        ArgumentError: there is no guidance, or not in all steps, and the denoiser only runs both branches.
    """
    if not guided:
        if 1 not in branches:
            raise ArgumentError(
                "a video without guidance runs one branch, and this bundle was built for both; raise "
                "max_guidance_scale above 1, or build one with another --branches"
            )
        return (False,)
    if in_part and 1 not in branches:
        raise ArgumentError(
            "a step outside guidance_interval runs one branch, and this bundle was built for both; leave "
            "guidance_interval out, or build one without --branches 2"
        )
    if branches.max == 1:
        return (True,)
    return (False, True) if 1 in branches else (False,)


def _chunks(manifest: Manifest, request: MemoryRequest) -> list[int]:
    """Decode chunk sizes to choose from, largest first.

    Raises:
        ArgumentError: there is none, or the caller's size leaves a last chunk that the bundle does not take.
    """
    span = manifest.ranges.chunk
    if request.decode_chunk_size is None and (found := _default_chunks(manifest, request)):
        return found
    chunk = request.decode_chunk_size or min(request.frames, span.max)
    chunk_sizes(request.frames * request.videos, chunk, span)
    return [chunk]


def _default_chunks(manifest: Manifest, request: MemoryRequest) -> list[int]:
    largest = largest_chunk(manifest.model, request.height, request.width)
    return chunk_choices(request.frames, request.videos, manifest.ranges.chunk, largest)


def _with_figures(manifest: Manifest, request: MemoryRequest, plan: MemoryPlan, streamed: int = 0) -> MemoryPlan:
    """``plan`` with ``streamed`` bytes of weights in host memory, and the memory that it needs then."""
    plan = replace(plan, streamed_bytes=streamed)
    found = plan_footprint(manifest, request, plan)
    return replace(plan, activation_bytes=found.activations, total_bytes=found.total) if found else plan


def _choose(manifest: Manifest, request: MemoryRequest, budget: int) -> MemoryPlan | None:
    """The fastest plan within ``budget``, if there is one; the engines' needs must be known."""
    for plan in _candidates(manifest, request):
        if _total(plan) <= budget:
            return plan
    plans = _candidates(manifest, request)
    streamed = [found for plan in plans if (found := _streaming(manifest, request, plan, budget)) is not None]
    # min returns the first of equals, which is the fastest.
    return min(streamed, key=lambda plan: plan.streamed_bytes, default=None)


def _leanest(manifest: Manifest, request: MemoryRequest) -> MemoryPlan:
    """The plan that needs least memory; the fastest plan if what the engines need is not known."""
    amounts = (0, _streamable(manifest))  # the buffers for streaming can take more than streaming saves
    plans = [_with_figures(manifest, request, plan, n) for n in amounts for plan in _candidates(manifest, request)]
    return min(plans, key=lambda plan: plan.total_bytes or 0)


def _streaming(manifest: Manifest, request: MemoryRequest, plan: MemoryPlan, budget: int) -> MemoryPlan | None:
    """``plan`` with as few streamed bytes as fit the budget; None if streaming cannot make the plan fit.

    The first streamed byte costs the buffers; each one from then on saves a byte, as long as the denoiser is the
    engine that needs most.
    """
    most = _streamable(manifest)
    if most == 0:
        return None
    excess = _total(_with_figures(manifest, request, plan, 1)) - budget
    if excess >= most:
        return None
    found = _with_figures(manifest, request, plan, 1 + max(excess, 0))
    # If one engine is loaded at a time, another one than the denoiser may need most by now.
    return found if _total(found) <= budget else None


def _streamable(manifest: Manifest) -> int:
    """The most bytes of weights that may stay in host memory."""
    plan = manifest.networks["denoiser"].plan
    if plan is None or plan.weight_bytes is None or not plan.weight_streaming:
        return 0
    return plan.weight_bytes - math.ceil(plan.weight_bytes / _LEAST_RESIDENT)


def streaming_buffers(weight_bytes: int) -> int:
    """Bytes to allow for the buffers that streamed weights are copied into.

    Only a loaded engine reports their real size; an eighth of the weights is more than the largest layers of SVD have.
    """
    return math.ceil(weight_bytes / _STREAMING_SHARE)


def _sizes(manifest: Manifest, request: MemoryRequest, plan: MemoryPlan) -> dict[str, int]:
    """The largest value that each of `svd_trt.engine.spec.SYMBOLS` takes in a run of ``plan``."""
    ranges = manifest.ranges
    return {
        "batch": ranges.batch.clamp(request.videos),
        "pictures": ranges.pictures.clamp(request.pictures),
        "branches": ranges.branches.clamp(2 if request.guided and not plan.split_guidance else 1),
        "frames": request.frames,
        "chunk": min(plan.decode_chunk_size, request.frames * request.videos),
        "height": request.height,
        "width": request.width,
    }


def _buffers(manifest: Manifest, sizes: Mapping[str, int], *, passes: int) -> int:
    """Bytes of the loop's buffers and of the tensors of the largest other network.

    The loop holds the denoiser's tensors: five of latents, the conditions and the coefficients, the features that it
    keeps, if it does, and a table of the coefficients with one row per step. A second pass has its own conditions,
    coefficients and features, and one more buffer for the result of the first pass. Steps without guidance, beside
    others, have their own conditions.
    """
    specs = {name: entry.spec for name, entry in manifest.networks.items()}
    loop = _tensor_bytes(specs["denoiser"], sizes)
    conditions = _condition_bytes(specs["denoiser"], sizes)
    apart = [name for name in NETWORKS if name != "denoiser"]
    others = {name: sum(_tensor_bytes(specs[name], sizes).values()) for name in apart}
    others["vae_decoder"] *= 2  # one chunk is copied to the host while the next is decoded
    tables = passes * LARGEST_STEPS * loop["coefficients"]
    second_pass = (passes - 1) * (conditions + loop["coefficients"] + loop["latents"] + loop.get(DEEP_FEATURES, 0))
    return sum(loop.values()) + second_pass + tables + max(others.values())


def _condition_bytes(denoiser: NetworkSpec, sizes: Mapping[str, int]) -> int:
    """Bytes of the denoiser's inputs that stay the same in every step."""
    tensors = _tensor_bytes(denoiser, sizes)
    return sum(tensors[name] for name in ("image_latents", "image_embeds", "added_time_ids", "guidance"))


def _tensor_bytes(spec: NetworkSpec, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of each input and output by name."""
    return {t.name: math.prod(t.resolve(sizes)) * _ELEMENT_BYTES[t.dtype] for t in spec.tensors}


def _total(plan: MemoryPlan) -> int:
    assert plan.total_bytes is not None, "figures are known"
    return plan.total_bytes


def _unknown(manifest: Manifest) -> str:
    reason = "it has no engines" if manifest.tensorrt is None else "the builder of its engines did not report it"
    return (
        f"the memory that the bundle needs is not known because {reason}, so it cannot be held to a budget; "
        "build engines with `svd-trt build MODEL -o BUNDLE --backend tensorrt-rtx`"
    )


def _too_small(manifest: Manifest, request: MemoryRequest, budget: int) -> str:
    """What to do if no plan fits, on one line."""
    smallest = _total(_leanest(manifest, request))
    works = _choose(manifest, request, round_up_bytes(smallest))  # the plan for the figure that the message shows
    assert works is not None, "more than the smallest is enough"
    videos = "" if request.videos == 1 else f"{request.videos} videos of "
    advice = [
        f"{format_bytes(budget)} is not enough for {videos}{request.frames} frames of "
        f"{request.width}x{request.height}: the smallest budget that works is "
        f"{format_bytes(smallest, round_up=True)} ({works.words()})"
    ]
    advice += _smaller_chunk(manifest, request, budget, smallest)
    if manifest.graph.ff_chunks < _LIGHT_FF_CHUNKS:
        advice.append(f"a bundle built with --split-guidance --ff-chunks {_LIGHT_FF_CHUNKS} needs less")
    return "; ".join(advice)


def _smaller_chunk(manifest: Manifest, request: MemoryRequest, budget: int, smallest: int) -> list[str]:
    """Advice to take another decode chunk than the caller's, if that needs less than ``smallest``."""
    choices = _default_chunks(manifest, request)
    given = request.decode_chunk_size
    if given is None or not any(chunk < given for chunk in choices):
        return []
    free = replace(request, decode_chunk_size=None)
    least = smallest_budget(manifest, free)
    if least is None or least >= smallest:
        return []
    chunk = plan_memory(manifest, free, max(least, budget)).decode_chunk_size
    if least <= budget:
        return [f"decode_chunk_size {chunk} instead of {given} fits"]
    return [f"with decode_chunk_size {chunk} instead of {given}, {format_bytes(least, round_up=True)} is enough"]
