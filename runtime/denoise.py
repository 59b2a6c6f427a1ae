"""The denoising loop: one network call a step, latents and coefficients on the device throughout."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from svd_trt.engine.spec import COEFFICIENTS
from svd_trt.errors import ArgumentError
from svd_trt.runtime.closeable import Closeable
from svd_trt.runtime.device import Array, Buffer, Device, HostBuffer, Session, settled

if TYPE_CHECKING:
    from svd_trt.runtime.pipeline import VideoPipeline

__all__ = ["Conditions", "Lease", "Loop", "StepCallback"]

Floats: TypeAlias = npt.NDArray[np.float32]
StepCallback: TypeAlias = "Callable[[VideoPipeline, int, float, dict[str, Any]], Mapping[str, Any] | None]"
Lease: TypeAlias = Callable[[], AbstractContextManager[Session]]
"""Lends a network for as long as one enqueue takes."""

_C_NOISE = COEFFICIENTS.index("c_noise")
_C_SKIP = COEFFICIENTS.index("c_skip")


@dataclass(frozen=True)
class Conditions:
    """What the videos are conditioned on."""

    image_embeds: Floats  # [B, 1, D]
    image_latents: Floats  # [B, C, h, w]
    added_time_ids: Floats  # [3], the same for all
    guidance: Floats  # [F], scale of classifier-free guidance in each frame

    def part(self, videos: slice) -> Conditions:
        """The conditions of some of the videos."""
        return Conditions(self.image_embeds[videos], self.image_latents[videos], self.added_time_ids, self.guidance)

    @property
    def guided(self) -> bool:
        """As in diffusers: a scale of 1 or less everywhere is the conditional prediction alone."""
        return bool(self.guidance.max() > 1)

    def passes(self, most_branches: int) -> list[dict[str, Floats]]:
        """The denoiser's inputs that stay the same in every step, for each pass over at most so many branches.

        Guided, the first branch is unconditional: zeros, weighted 1 - scale; the second is weighted by the scale.
        """
        embeds, latents = self.image_embeds[None], self.image_latents[None]
        weights = np.ones((1, len(self.guidance)), np.float32)
        if self.guided:
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


class Loop(Closeable):
    """The loop's memory on the device for one shape, and its recorded steps; used again for every run of that shape.

    Two pairs of buffers change places, so there are two different steps, an even and an odd one, which the device
    records. Coefficients lie on the device as a table; a step copies its row to where the recording reads it. A step
    allocates nothing, and the host waits for nothing but the end of steps that it has to tell of.

    Args:
        device: where.
        passes: the inputs that are the same in every step, for each pass: a first value of each.
        shape: of the latents, ``[B, F, C, h, w]``.
        steps: the most that a run may have.
    """

    def __init__(self, device: Device, passes: list[dict[str, Floats]], shape: tuple[int, ...], steps: int) -> None:
        self.steps = steps
        self.shape = shape
        self._device = device
        self._session: Session | None = None
        with ExitStack() as stack:

            def empty(like: tuple[int, ...], name: str) -> Buffer:
                return stack.enter_context(device.empty(like, np.float32, name))

            def host(like: tuple[int, ...], name: str) -> HostBuffer:
                return stack.enter_context(device.host(like, np.float32, name))

            self._fixed = [{n: empty(a.shape, n) for n, a in inputs.items()} for inputs in passes]
            self._fixed_host = [{n: host(a.shape, n) for n, a in inputs.items()} for inputs in passes]
            self._latents = [empty(shape, "latents") for _ in range(2)]
            self._denoised = [empty(shape, "denoised") for _ in range(2)]
            self._zeros = empty(shape, "partial_denoised")  # nothing writes to it but the beginning of a run
            self._partial = empty(shape, "partial_denoised") if len(passes) > 1 else self._zeros
            self._coefficients = [empty((len(COEFFICIENTS),), "coefficients") for _ in passes]
            self._tables = [empty((steps, len(COEFFICIENTS)), "table of coefficients") for _ in passes]
            self._rows = [[table.rows(step, step + 1) for table in self._tables] for step in range(steps)]
            self._tables_host = [host((steps, len(COEFFICIENTS)), "table of coefficients") for _ in passes]
            self._tensors = [self._bind(parity) for parity in (0, 1)]
            self._host = [host(shape, "latents") for _ in range(2)]
            self._fetched = [stack.enter_context(device.mark()) for _ in range(2)]
            # A step's end, the one before it, and the one after it, which may be under way.
            self._ends = [stack.enter_context(device.mark()) for _ in range(3)]
            self._recorded = [stack.enter_context(device.record(partial(self._passes, parity))) for parity in (0, 1)]
            self._held = stack.pop_all()

    def run(
        self,
        pipe: VideoPipeline,
        lease: Lease,
        latents: Floats,
        conditions: list[dict[str, Floats]],
        table: Floats,
        callback: StepCallback | None,
        on_step: Callable[[float], object],
    ) -> Floats:
        """Step ``latents`` ``[B, F, C, h, w]`` through ``table`` ``[S, 7]`` of coefficients; the last latents.

        Args:
            pipe: handed to the callback.
            lease: lends the denoiser.
            latents: noise at the first sigma.
            conditions: `Conditions.passes`.
            table: a sampler's coefficients, a row a step.
            callback: see `VideoPipeline.__call__`.
            on_step: called after each step with its seconds.
        """
        with settled(self._device):
            self._begin(latents, conditions, table)
            for step in self._finished(lease, len(table), fetch=callback is not None):
                on_step(self._ends[step % 3].seconds_since(self._ends[(step - 1) % 3]))
                if callback is not None:
                    self._fetched[step % 2].wait()
                    timestep = float(table[step, _C_NOISE])
                    replaced = _call_back(callback, pipe, step, timestep, self._host[step % 2].array)
                    if replaced is not None:
                        self._replace(lease, replaced, step, len(table))
            self._fetch(len(table) - 1)
            self._fetched[(len(table) - 1) % 2].wait()
            return self._host[(len(table) - 1) % 2].array.copy()

    def close(self) -> None:
        """Free everything."""
        self._held.close()

    def _begin(self, latents: Floats, conditions: list[dict[str, Floats]], table: Floats) -> None:
        for fixed, hosts, inputs in zip(self._fixed, self._fixed_host, conditions, strict=True):
            for name, array in inputs.items():
                self._send(hosts[name], fixed[name], array)
        for index, (host, rows) in enumerate(zip(self._tables_host, self._tables, strict=True)):
            last = index == len(self._tables) - 1
            host.array[: len(table)] = table
            if not last:  # the latents themselves contribute once, in the last pass
                host.array[:, _C_SKIP] = 0
            self._device.send(host, rows)
        zeros, start = self._host
        self._send(zeros, self._zeros, np.zeros_like(latents))
        self._send(zeros, self._denoised[0], None)
        self._send(start, self._latents[0], latents)
        self._ends[-1].record()
        self._ends[-1].wait()  # the host's memory is used again from here on

    def _send(self, host: HostBuffer, buffer: Buffer, array: Array | None) -> None:
        if array is not None:
            host.array[...] = array
        self._device.send(host, buffer)

    def _finished(self, lease: Lease, steps: int, *, fetch: bool) -> Iterator[int]:
        """Enqueue every step, and yield each when it is done, with as many enqueued after it as the device wants."""
        flight: deque[int] = deque()
        for step in range(steps):
            self._enqueue(lease, step, fetch=fetch)
            flight.append(step)
            if len(flight) >= self._device.steps_in_flight:
                self._ends[flight[0] % 3].wait()
                yield flight.popleft()
        for step in flight:
            self._ends[step % 3].wait()
            yield step

    def _enqueue(self, lease: Lease, step: int, *, fetch: bool) -> None:
        for row, coefficients in zip(self._rows[step], self._coefficients, strict=True):
            self._device.copy(row, coefficients)
        with lease() as self._session:
            self._recorded[step % 2]()
        self._ends[step % 3].record()
        if fetch:
            self._fetch(step)

    def _passes(self, parity: int) -> None:
        """One step: from the latents of ``parity`` to the others, in one pass or in one for each guidance branch."""
        assert self._session is not None
        for tensors in self._tensors[parity]:
            self._session.enqueue(tensors)

    def _bind(self, parity: int) -> list[dict[str, Buffer]]:
        """What the denoiser reads and writes in each pass of such a step."""
        bound = []
        done = self._zeros
        for index, fixed in enumerate(self._fixed):
            target = self._denoised[1 - parity] if index == len(self._fixed) - 1 else self._partial
            bound.append(
                fixed
                | {
                    "latents": self._latents[parity],
                    "previous_denoised": self._denoised[parity],
                    "partial_denoised": done,
                    "coefficients": self._coefficients[index],
                    "next_latents": self._latents[1 - parity],
                    "denoised": target,
                }
            )
            done = target
        return bound

    def _fetch(self, step: int) -> None:
        self._device.fetch(self._latents[(step + 1) % 2], self._host[step % 2], self._fetched[step % 2])

    def _replace(self, lease: Lease, latents: Floats, step: int, steps: int) -> None:
        """Go on from other latents after ``step``. A step that was enqueued meanwhile is done again.

        It read the latents and wrote to the other pair of buffers, so what it started from is still there.
        """
        host = self._host[step % 2]
        host.array[...] = latents
        self._device.send(host, self._latents[(step + 1) % 2])
        following = step + 1
        if following < steps and self._device.steps_in_flight > 1:
            self._device.after(self._fetched[following % 2])  # it may still be copied out of what is written next
            self._enqueue(lease, following, fetch=True)


def _call_back(
    callback: StepCallback, pipe: VideoPipeline, step: int, timestep: float, latents: Floats
) -> Floats | None:
    """Latents to go on from, where the callback returned some."""
    answer = callback(pipe, step, timestep, {"latents": latents.copy()})
    if answer is not None and not isinstance(answer, Mapping):
        raise ArgumentError(f'callback_on_step_end must return None or {{"latents": ...}}, not {type(answer).__name__}')
    changed = (answer or {}).get("latents")
    if changed is None:
        return None
    try:
        replacement = np.ascontiguousarray(changed, np.float32)
    except (TypeError, ValueError):
        raise ArgumentError("callback_on_step_end returned latents that are not an array of numbers") from None
    if replacement.shape != latents.shape:
        raise ArgumentError(f"callback_on_step_end returned latents of shape {replacement.shape}, not {latents.shape}")
    return replacement
