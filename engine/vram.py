"""The fastest way to make a video within a budget of device memory, chosen from the manifest alone.

What can give way, in the order in which it does; a plan is faster than another by the last of these that differs:

1. the decode chunk, at most all frames of a video, as diffusers has it: smaller ones are the same work in more runs.
   A frame is decoded with those of its chunk in view, so the size changes the seams between chunks a little; one that
   the caller fixed is therefore never changed;
2. both guidance branches together: one at a time starts twice as many kernels, each over half the work;
3. resident engines: loading gigabytes of them again costs seconds for every video;
4. weights on the device: streamed ones cross the bus in every run of the denoiser, so as few as fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from svd_trt.engine.manifest import Manifest
from svd_trt.engine.memory import Footprint, footprint
from svd_trt.engine.spec import Range, chunk_choices, chunk_sizes
from svd_trt.errors import ArgumentError, BudgetError

__all__ = ["MemoryPlan", "Request", "plan_footprint", "plan_memory", "size_words", "smallest_budget"]

_LEAST_RESIDENT = 4  # at least one part in so many of the denoiser's weights stays on the device
_LIGHT_FF_CHUNKS = 4


@dataclass(frozen=True)
class Request:
    """What is to be made.

    Attributes:
        frames: of one video.
        height, width: in pixels.
        videos: in all; the decoder's chunks run over them.
        batch: videos denoised together; more than the bundle takes are counted as the most it takes.
        pictures: encoded together; likewise.
        guided: with classifier-free guidance, which has two branches.
        decode_chunk: frames decoded together, fixed by the caller; None is the planner's choice.

    Raises:
        ArgumentError: a count or a size is below 1.
    """

    frames: int
    height: int
    width: int
    videos: int = 1
    batch: int = 1
    pictures: int = 1
    guided: bool = True
    decode_chunk: int | None = None

    def __post_init__(self) -> None:
        counts = {name: value for name, value in asdict(self).items() if name != "guided" and value is not None}
        for name, value in counts.items():
            if value < 1:
                raise ArgumentError(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True)
class MemoryPlan:
    """How to run, and what it takes.

    Attributes:
        resident: all engines stay loaded; otherwise each is loaded when it is its turn, and let go.
        split_guidance: the denoiser runs over one branch at a time, twice a step. False without guidance.
        decode_chunk: frames decoded together.
        streamed_bytes: of the denoiser's weights, left in host memory and copied in as they are used.
        activation_bytes: the block that all engines share, at its largest. None where the bundle has no engines, or
            their builder did not say.
        total_bytes: all of it: weights, block, the loop's buffers, inputs and outputs of the largest other network.
            The CUDA context's own few hundred megabytes are not in it. None as above.
    """

    resident: bool
    split_guidance: bool
    decode_chunk: int
    streamed_bytes: int
    activation_bytes: int | None
    total_bytes: int | None

    def words(self) -> str:
        """One line for people."""
        parts = [
            "all engines loaded" if self.resident else "one engine at a time",
            f"guidance branches {'one at a time' if self.split_guidance else 'together'}",
            f"decoding {self.decode_chunk} frame{'s' if self.decode_chunk > 1 else ''} at a time",
        ]
        if self.streamed_bytes:
            parts.append(f"{size_words(self.streamed_bytes, up=True)} of weights streamed from host memory")
        return ", ".join(parts)


def plan_memory(manifest: Manifest, request: Request, budget: int | None) -> MemoryPlan:
    """The fastest plan that needs at most ``budget`` bytes; None is no limit.

    Raises:
        ArgumentError: the bundle was not built for the request.
        BudgetError: no plan needs so little, or what the engines need is not known.
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


def smallest_budget(manifest: Manifest, request: Request) -> int | None:
    """The fewest bytes that `plan_memory` finds a plan for; None where what the engines need is not known.

    Raises:
        ArgumentError: the bundle was not built for the request.
    """
    return _leanest(manifest, request).total_bytes


def plan_footprint(manifest: Manifest, request: Request, plan: MemoryPlan) -> Footprint | None:
    """The bytes of ``plan`` by part; None where they are not known."""
    ranges = manifest.ranges
    sizes = {
        "batch": ranges.batch.clamp(request.batch),
        "pictures": ranges.pictures.clamp(request.pictures),
        "branches": ranges.branches.clamp(2 if request.guided and not plan.split_guidance else 1),
        "frames": request.frames,
        "chunk": max(chunk_sizes(request.frames * request.videos, plan.decode_chunk, ranges.chunk)),
        "height": request.height,
        "width": request.width,
    }
    passes = 2 if plan.split_guidance else 1
    return footprint(manifest, sizes, resident=plan.resident, passes=passes, streamed=plan.streamed_bytes)


def _candidates(manifest: Manifest, request: Request) -> Iterator[MemoryPlan]:
    """Every way to run without streaming, fastest first; at least one."""
    _check(manifest, request)
    for resident in (True, False):
        for split in _guidance_choices(manifest.ranges.branches, request.guided):
            for chunk in _chunks(manifest, request):
                plan = MemoryPlan(resident, split, chunk, 0, None, None)
                yield _with_streamed(manifest, request, plan, 0)


def _with_streamed(manifest: Manifest, request: Request, plan: MemoryPlan, streamed: int) -> MemoryPlan:
    """``plan`` with so many bytes streamed, and its figures."""
    plan = replace(plan, streamed_bytes=streamed)
    found = plan_footprint(manifest, request, plan)
    return replace(plan, activation_bytes=found.activations, total_bytes=found.total) if found else plan


def _choose(manifest: Manifest, request: Request, budget: int) -> MemoryPlan | None:
    """The fastest plan within ``budget``, where figures are known."""
    for plan in _candidates(manifest, request):
        if _total(plan) <= budget:
            return plan
    plans = _candidates(manifest, request)
    streamed = [found for plan in plans if (found := _streaming(manifest, request, plan, budget)) is not None]
    return min(streamed, key=lambda plan: plan.streamed_bytes, default=None)  # of equals the first, the fastest


def _leanest(manifest: Manifest, request: Request) -> MemoryPlan:
    """The plan that needs least; the fastest where what engines need is not known."""
    amounts = (0, _streamable(manifest))  # what streaming takes for itself can be more than it saves
    plans = [_with_streamed(manifest, request, plan, n) for n in amounts for plan in _candidates(manifest, request)]
    return min(plans, key=lambda plan: plan.total_bytes or 0)


def _streaming(manifest: Manifest, request: Request, plan: MemoryPlan, budget: int) -> MemoryPlan | None:
    """``plan`` with as little streamed as fits; None where streaming cannot make it fit.

    The first byte that is streamed costs buffers; from then on each saves one, while the denoiser needs most.
    """
    most = _streamable(manifest)
    if most == 0:
        return None
    excess = _total(_with_streamed(manifest, request, plan, 1)) - budget
    if excess >= most:
        return None
    found = _with_streamed(manifest, request, plan, 1 + max(excess, 0))
    # It does not help where engines are loaded alone and another needs most by then.
    return found if _total(found) <= budget else None


def _streamable(manifest: Manifest) -> int:
    """The most bytes of weights that may be left in host memory."""
    plan = manifest.networks["denoiser"].plan
    if plan is None or plan.weight_bytes is None or not plan.weight_streaming:
        return 0
    return plan.weight_bytes - math.ceil(plan.weight_bytes / _LEAST_RESIDENT)


def _guidance_choices(branches: Range, guided: bool) -> tuple[bool, ...]:
    """Values of ``split_guidance`` that the denoiser can do, fastest first."""
    if not guided:
        return (False,)
    if branches.max == 1:
        return (True,)
    return (False, True) if 1 in branches else (False,)


def _chunks(manifest: Manifest, request: Request) -> list[int]:
    """Decode chunks to choose from, largest first.

    Raises:
        ArgumentError: there is none, or the one that the caller fixed leaves a chunk that the bundle does not take.
    """
    span = manifest.ranges.chunk
    if request.decode_chunk is None and (found := list(chunk_choices(request.frames, request.videos, span))):
        return found
    chunk = request.decode_chunk or min(request.frames, span.max)
    chunk_sizes(request.frames * request.videos, chunk, span)
    return [chunk]


def _check(manifest: Manifest, request: Request) -> None:
    for name, value in (("frames", request.frames), ("height", request.height), ("width", request.width)):
        span = manifest.ranges.of(name)
        if value not in span:
            raise ArgumentError(
                f"{name} {value} is outside what this bundle was built for ({span.words}); "
                f"build one with another --{name}"
            )


def _total(plan: MemoryPlan) -> int:
    assert plan.total_bytes is not None, "figures are known"
    return plan.total_bytes


def _unknown(manifest: Manifest) -> str:
    reason = "it has no engines" if manifest.tensorrt is None else "the builder of its engines did not report it"
    return (
        f"the bundle's memory is not known since {reason}, so it cannot be held to a budget; "
        "build engines with `svd-trt build MODEL -o BUNDLE --backend tensorrt-rtx`"
    )


def _too_small(manifest: Manifest, request: Request, budget: int) -> str:
    """What to do where no plan fits, on one line."""
    smallest = _total(_leanest(manifest, request))
    works = _choose(manifest, request, _rounded_up(smallest))  # what the figure that is shown gives
    assert works is not None, "more than the smallest is enough"
    videos = "" if request.videos == 1 else f"{request.videos} videos of "
    told = [
        f"{size_words(budget)} is not enough for {videos}{request.frames} frames of {request.width}x{request.height}: "
        f"the smallest budget that works is {size_words(smallest, up=True)} ({works.words()})"
    ]
    told += _smaller_chunk(manifest, request, budget, smallest)
    if manifest.graph.ff_chunks < _LIGHT_FF_CHUNKS:
        told.append(f"a bundle built with --split-guidance --ff-chunks {_LIGHT_FF_CHUNKS} needs less")
    return "; ".join(told)


def _smaller_chunk(manifest: Manifest, request: Request, budget: int, smallest: int) -> list[str]:
    """What another decode chunk than the caller's would allow, where it would allow more."""
    choices = chunk_choices(request.frames, request.videos, manifest.ranges.chunk)
    if request.decode_chunk is None or not any(chunk < request.decode_chunk for chunk in choices):
        return []
    free = replace(request, decode_chunk=None)
    least = smallest_budget(manifest, free)
    if least is None or least >= smallest:
        return []
    chunk = plan_memory(manifest, free, max(least, budget)).decode_chunk
    if least <= budget:
        return [f"decode_chunk_size {chunk} instead of {request.decode_chunk} fits"]
    return [f"with decode_chunk_size {chunk} instead of {request.decode_chunk}, {size_words(least, up=True)} is enough"]


def size_words(count: int, *, up: bool = False) -> str:
    """``8 GB``, ``4.93 GB``, ``800 MB``: two decimals at most, rounded down, or up so that what is named works."""
    factor, unit = _unit(count)
    hundredths = _rounded_up(count) * 100 // factor if up else count * 100 // factor
    return f"{hundredths / 100:.2f}".rstrip("0").rstrip(".") + f" {unit}"


def _rounded_up(count: int) -> int:
    """The bytes that `size_words` names when it rounds up."""
    step = max(_unit(count)[0] // 100, 1)
    return -(-count // step) * step


def _unit(count: int) -> tuple[int, str]:
    units = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes"))
    return next(unit for unit in units if count >= unit[0] or unit[0] == 1)
