"""The denoising stage: one network call a step, with latents and coefficients on the device throughout."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from svd_trt.engine.memory import MemoryPlan
from svd_trt.engine.spec import COEFFICIENTS, DEEP_FEATURES, LARGEST_STEPS, SHALLOW, KeptFeatures
from svd_trt.errors import BackendError
from svd_trt.runtime.callback import OnStepEnd
from svd_trt.runtime.cancellation import Cancellation
from svd_trt.runtime.closeable import Closeable
from svd_trt.runtime.device import Array, Buffer, Device, Graph, HostBuffer, Session, synchronized_on_error
from svd_trt.runtime.executor import Executor
from svd_trt.runtime.timings import Timings, timed
from svd_trt.runtime.tracing import traced

__all__ = ["Conditions", "Floats", "Loop", "Passes", "ShallowSteps", "denoise"]

Floats: TypeAlias = npt.NDArray[np.float32]
_Hold: TypeAlias = Callable[[], AbstractContextManager[Session]]
"""Holds the denoiser, or the shallow one, while one step is enqueued."""

Passes: TypeAlias = list[dict[str, Floats]]
"""The denoiser's inputs that are the same in every step of a kind, for each pass of such a step."""

_C_NOISE = COEFFICIENTS.index("c_noise")
_C_SKIP = COEFFICIENTS.index("c_skip")


@dataclass(frozen=True)
class Conditions:
    """What the videos are conditioned on, and how strongly.

    Attributes:
        image_embeds: ``[B, 1, D]``, CLIP's embedding of each picture.
        image_latents: ``[B, C, h, w]``, the VAE's latents of each picture with noise.
        added_time_ids: ``[3]``: fps - 1, motion_bucket_id and noise_aug_strength, the same for all videos.
        guidance: ``[F]``, the scale of classifier-free guidance in each frame.
        guided_steps: whether each step has an unconditional branch beside the conditional one, ``[S]``.
    """

    image_embeds: Floats
    image_latents: Floats
    added_time_ids: Floats
    guidance: Floats
    guided_steps: tuple[bool, ...]

    def of(self, videos: slice) -> Conditions:
        """Select the conditions of some of the videos."""
        return replace(self, image_embeds=self.image_embeds[videos], image_latents=self.image_latents[videos])

    def passes(self, most_branches: int, *, guided: bool) -> Passes:
        """Make the inputs of a step that is ``guided`` or not, for each pass over ``most_branches`` at most.

        Classifier-free guidance is a sum of the branches' predictions, weighted in each frame. The denoiser computes
        the sum (`svd_trt.export.denoiser.Denoiser`); the weights are made here. With guidance, the first branch is
        unconditional: its conditions are zeros and its weight is 1 - scale. The weight of the second, conditional
        branch is the scale.
        """
        embeds, latents = self.image_embeds[None], self.image_latents[None]  # [branches, B, ...]
        weights = np.ones((1, len(self.guidance)), np.float32)  # [branches, F]
        if guided:
            embeds = np.concatenate([np.zeros_like(embeds), embeds])
            latents = np.concatenate([np.zeros_like(latents), latents])
            weights = np.stack([1 - self.guidance, self.guidance])
        times = np.tile(self.added_time_ids, (embeds.shape[1], 1))
        return [
            {
                "image_embeds": embeds[first : first + most_branches],
                "image_latents": latents[first : first + most_branches],
                "added_time_ids": times,
                "guidance": weights[first : first + most_branches],
            }
            for first in range(0, len(weights), most_branches)
        ]


@dataclass(frozen=True)
class ShallowSteps:
    """The steps of a run that leave out the deep levels of the UNet.

    Attributes:
        denoiser: holds the shallow denoiser.
        deep: whether each step runs all levels, ``[S]``; see `svd_trt.runtime.deep_steps`.
    """

    denoiser: _Hold
    deep: tuple[bool, ...]


def denoise(
    executor: Executor,
    latents: Floats,
    conditions: Conditions,
    table: Floats,
    *,
    noise: Floats | None = None,
    plan: MemoryPlan,
    deep: tuple[bool, ...],
    on_step_end: OnStepEnd | None,
    on_step: Callable[[int], object],
    timings: Timings,
    cancellation: Cancellation,
) -> Floats:
    """Run the denoising loop over videos that are denoised together.

    Args:
        executor: has the denoiser and the loop's buffers.
        latents: noise at the first sigma, ``[B, F, C, h, w]``.
        conditions: of these videos.
        table: the sampler's coefficients, ``[S, 7]``.
        noise: for the first steps, ``[n, B, F, C, h, w]``, in the place of the denoised latents of the step before.
        plan: says whether the guidance branches run one after the other.
        deep: whether each step runs all levels of the UNet, ``[S]``; the others run the shallow denoiser.
        on_step_end: see `svd_trt.runtime.callback`.
        on_step: called with 0 once the denoiser is loaded, and with 1 after every step.
        timings: gets ``denoise``, ``steps`` and ``load``.
        cancellation: ends the loop after the current step, or within it if the device can do that.

    Returns:
        The denoised latents, ``[B, F, C, h, w]``.

    Raises:
        BackendError: the latents are not finite at the end, or the device failed.
    """
    with timed(timings, "load"):
        executor.load("denoiser")
        if not all(deep):
            executor.load(SHALLOW)
    steps: list[float] = timings.setdefault("steps", [])
    on_step(0)

    def on_step_done(seconds: float) -> None:
        steps.append(seconds)
        on_step(1)
        cancellation.check()

    with timed(timings, "denoise"), executor.denoising(plan):
        start = np.ascontiguousarray(latents, np.float32)
        most = 1 if plan.split_guidance else 2
        kinds = {guided: conditions.passes(most, guided=guided) for guided in sorted({*conditions.guided_steps})}
        capacity = max(LARGEST_STEPS, len(table))  # steps that the loop has room for
        shapes = {g: [{n: a.shape for n, a in inputs.items()} for inputs in passes] for g, passes in kinds.items()}
        manifest = executor.bundle.manifest
        kept = manifest.graph.kept(manifest.precision)
        make = partial(Loop, executor.device, kinds, start.shape, capacity, kept)
        loop = executor.loop((start.shape, shapes, capacity), start.shape, make)
        denoiser, shallow = (partial(executor.session, name, cancellation.event) for name in ("denoiser", SHALLOW))
        steps_of = None if all(deep) else ShallowSteps(shallow, deep)
        guided = conditions.guided_steps
        result = loop.run(denoiser, start, kinds, guided, table, on_step_end, on_step_done, steps_of, noise)
    if not np.isfinite(result).all():
        raise BackendError(
            "denoising ended in values that are not finite: fp16 overflowed (build with --precision fp32), "
            "or a callback returned such latents"
        )
    return result


@dataclass(frozen=True)
class _Kind:
    """Memory and graphs of the steps with guidance, or of those without.

    Attributes:
        fixed: inputs of each pass that are the same in every step, on the device.
        hosts: where they are copied from.
        graphs: of an even and of an odd step, by whether the step is deep.
    """

    fixed: list[dict[str, Buffer]]
    hosts: list[dict[str, HostBuffer]]
    graphs: dict[bool, list[Graph]]


class Loop(Closeable):
    """The loop's memory on the device for one shape, and graphs of its steps. Every run of that shape uses it again.

    Two pairs of buffers swap roles, so there are two different steps, an even and an odd one, and a graph of each; if
    some steps have guidance and others have none, two of each; with shallow steps, twice as many. Both denoisers take
    the same buffers: what a deep step writes to the features, the shallow steps after it read. The coefficients are a
    table on the device; a step copies its row to the place that the graph reads. A step allocates nothing, and the host
    waits only for the end of steps that it reports.

    Args:
        device: where the memory is.
        kinds: `Conditions.passes` of the shapes that will be used, by whether the steps have guidance.
        shape: of the latents, ``[B, F, C, h, w]``.
        capacity: the most steps that a run may have.
        kept: the features that the denoiser keeps for shallow steps, if it does.
    """

    def __init__(
        self,
        device: Device,
        kinds: Mapping[bool, Passes],
        shape: tuple[int, ...],
        capacity: int,
        kept: KeptFeatures | None = None,
    ) -> None:
        self._device = device
        self._session: Session | None = None
        self._steps: list[_Kind] = []
        self._shallow: ShallowSteps | None = None
        most_passes = max(map(len, kinds.values()))
        with ExitStack() as stack:

            def empty(like: tuple[int, ...], name: str) -> Buffer:
                return stack.enter_context(device.empty(like, np.float32, name))

            def host(like: tuple[int, ...], name: str) -> HostBuffer:
                return stack.enter_context(device.host(like, np.float32, name))

            def make(passes: Passes) -> _Kind:
                fixed = [{n: empty(a.shape, n) for n, a in inputs.items()} for inputs in passes]
                hosts = [{n: host(a.shape, n) for n, a in inputs.items()} for inputs in passes]
                works = [partial(self._run_passes, self._bind(parity, fixed)) for parity in (0, 1)]
                graphs = {
                    deep: [stack.enter_context(device.capture(work)) for work in works]
                    for deep in ((True, False) if kept else (True,))
                }
                return _Kind(fixed, hosts, graphs)

            self._latents = [empty(shape, "latents") for _ in range(2)]
            self._denoised = [empty(shape, "denoised") for _ in range(2)]
            self._zeros = empty(shape, "partial_denoised")  # only the start of a run writes to it
            self._partial = empty(shape, "partial_denoised") if most_passes > 1 else self._zeros
            # Of the last passes of a step: one pass takes the last of each.
            self._coefficients = [empty((len(COEFFICIENTS),), "coefficients") for _ in range(most_passes)]
            table = (capacity, len(COEFFICIENTS))
            self._tables = [empty(table, "table of coefficients") for _ in range(most_passes)]
            self._tables_host = [host(table, "table of coefficients") for _ in range(most_passes)]
            # Of the steps with most branches. Others take the start of the last, because a step that has other
            # branches than the one before is deep.
            largest = kinds[max(kinds)] if kept else []
            self._features = [stack.enter_context(_empty_features(device, shape, p, kept)) for p in largest if kept]
            self._host = [host(shape, "latents") for _ in range(2)]
            self._noise_host = [host(shape, "noise") for _ in range(2)]
            self._fetched = [stack.enter_context(device.event()) for _ in range(2)]
            # The ends of a step, of the one before it, and of the one after it, which may be in flight.
            self._ends = [stack.enter_context(device.event()) for _ in range(3)]
            self._kinds = {guided: make(passes) for guided, passes in kinds.items()}
            self._held = stack.pop_all()

    def run(
        self,
        denoiser: _Hold,
        latents: Floats,
        kinds: Mapping[bool, Passes],
        guided_steps: Sequence[bool],
        table: Floats,
        on_step_end: OnStepEnd | None,
        on_step: Callable[[float], object],
        shallow: ShallowSteps | None = None,
        noise: Floats | None = None,
    ) -> Floats:
        """Step ``latents`` ``[B, F, C, h, w]`` through ``table`` ``[S, 7]`` of coefficients; return the last latents.

        Args:
            denoiser: holds the network while one step is enqueued.
            latents: noise at the first sigma.
            kinds: `Conditions.passes`, by whether the steps have guidance.
            guided_steps: whether each step has it, ``[S]``.
            table: a sampler's coefficients, a row a step.
            on_step_end: may replace the latents after a step.
            on_step: called with the seconds of each step.
            shallow: the steps that run the shallow denoiser; None runs none.
            noise: of the first steps, ``[n, B, F, C, h, w]``, which they get as ``previous_denoised``.
        """
        self._shallow = shallow
        with synchronized_on_error(self._device):
            self._begin(latents, kinds, table)
            self._steps = [self._kinds[guided] for guided in guided_steps]
            noise = latents[None][:0] if noise is None else noise
            for step in self._finished_steps(denoiser, len(table), noise, fetch=on_step_end is not None):
                on_step(self._ends[step % 3].seconds_since(self._ends[(step - 1) % 3]))
                if on_step_end is not None:
                    self._fetched[step % 2].wait()
                    replaced = on_step_end(step, float(table[step, _C_NOISE]), self._host[step % 2].array)
                    if replaced is not None:
                        self._replace(denoiser, replaced, step, len(table))
            last = len(table) - 1
            self._fetch(last)
            self._fetched[last % 2].wait()
            return self._host[last % 2].array.copy()

    def close(self) -> None:
        """Free all buffers, events and graphs."""
        self._held.close()

    def _begin(self, latents: Floats, kinds: Mapping[bool, Passes], table: Floats) -> None:
        for guided, passes in kinds.items():
            kind = self._kinds[guided]
            for fixed, hosts, inputs in zip(kind.fixed, kind.hosts, passes, strict=True):
                for name, array in inputs.items():
                    self._send(hosts[name], fixed[name], array)
        for index, (host, rows) in enumerate(zip(self._tables_host, self._tables, strict=True)):
            is_last = index == len(self._tables) - 1
            host.array[: len(table)] = table
            if not is_last:  # the latents themselves are added once, in the last pass
                host.array[:, _C_SKIP] = 0
            self._device.send(host, rows)
        zeros, start = self._host
        self._send(zeros, self._zeros, np.zeros_like(latents))
        self._device.send(zeros, self._denoised[0])
        self._send(start, self._latents[0], latents)
        self._ends[-1].record()
        self._ends[-1].wait()  # the steps reuse the host buffers

    def _send(self, host: HostBuffer, buffer: Buffer, array: Array) -> None:
        host.array[...] = array
        self._device.send(host, buffer)

    def _finished_steps(self, denoiser: _Hold, steps: int, noise: Floats, *, fetch: bool) -> Iterator[int]:
        """Enqueue every step, and yield each when it is done, while up to ``steps_in_flight`` are enqueued."""
        in_flight: deque[int] = deque()
        for step in range(steps):
            with traced(f"step {step}"):
                if step < len(noise):
                    # Over the denoised latents of the step before, which such a sampler does not use. The step that
                    # had this host buffer before is two steps back and has ended.
                    self._send(self._noise_host[step % 2], self._denoised[step % 2], noise[step])
                self._enqueue(denoiser, step, fetch=fetch)
            in_flight.append(step)
            if len(in_flight) >= self._device.steps_in_flight:
                self._ends[in_flight[0] % 3].wait()
                yield in_flight.popleft()
        for step in in_flight:
            self._ends[step % 3].wait()
            yield step

    def _enqueue(self, denoiser: _Hold, step: int, *, fetch: bool) -> None:
        kind = self._steps[step]
        passes = len(kind.fixed)
        for table, coefficients in zip(self._tables[-passes:], self._coefficients[-passes:], strict=True):
            self._device.copy(table.rows(step, step + 1), coefficients)
        shallow = None if self._shallow is None or self._shallow.deep[step] else self._shallow.denoiser
        with (shallow or denoiser)() as self._session:
            kind.graphs[shallow is None][step % 2]()
        self._ends[step % 3].record()
        if fetch:
            self._fetch(step)

    def _run_passes(self, passes: list[dict[str, Buffer]]) -> None:
        """Enqueue one step, in one pass or in one per branch."""
        assert self._session is not None
        for tensors in passes:
            self._session.enqueue(tensors)

    def _bind(self, parity: int, passes: list[dict[str, Buffer]]) -> list[dict[str, Buffer]]:
        """List what each pass of a step reads and writes: from the latents of ``parity`` to the other ones."""
        bound = []
        done = self._zeros
        coefficients = self._coefficients[-len(passes) :]
        features = self._features_of(passes)
        for index, fixed in enumerate(passes):
            target = self._denoised[1 - parity] if index == len(passes) - 1 else self._partial
            bound.append(
                fixed
                | {
                    "latents": self._latents[parity],
                    "previous_denoised": self._denoised[parity],
                    "partial_denoised": done,
                    "coefficients": coefficients[index],
                    "next_latents": self._latents[1 - parity],
                    "denoised": target,
                }
                | features[index]
            )
            done = target
        return bound

    def _features_of(self, passes: list[dict[str, Buffer]]) -> list[dict[str, Buffer]]:
        """List what each pass keeps, or takes from the deep step before; nothing without a shallow denoiser."""
        if not self._features:
            return [{} for _ in passes]
        own = zip(self._features[-len(passes) :], passes, strict=True)
        return [{DEEP_FEATURES: buffer.rows(0, fixed["guidance"].shape[0])} for buffer, fixed in own]

    def _fetch(self, step: int) -> None:
        self._device.fetch(self._latents[(step + 1) % 2], self._host[step % 2], self._fetched[step % 2])

    def _replace(self, denoiser: _Hold, latents: Floats, step: int, steps: int) -> None:
        """Continue from other latents after ``step``. If the next step is already enqueued, enqueue it again.

        The next step read the latents and wrote to the other pair of buffers, so what it started from is still there.
        """
        host = self._host[step % 2]
        host.array[...] = latents
        self._device.send(host, self._latents[(step + 1) % 2])
        following = step + 1
        if following < steps and self._device.steps_in_flight > 1:
            self._device.wait_for(self._fetched[following % 2])  # it may still be copying what is written next
            with traced(f"step {following} again"):
                self._enqueue(denoiser, following, fetch=True)


def _empty_features(
    device: Device, latents: tuple[int, ...], inputs: Mapping[str, Floats], kept: KeptFeatures
) -> Buffer:
    """Make a buffer for what a pass keeps, ``[G, B, F, C', h/2, w/2]``, for ``latents`` ``[B, F, C, h, w]``."""
    videos, frames, _, height, width = latents
    branches = len(inputs["guidance"])
    return device.empty((branches, videos, frames, kept.channels, height // 2, width // 2), kept.dtype, DEEP_FEATURES)
