"""The denoising loop: one network call a step, latents and coefficients on the device throughout."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from svd_trt.engine.spec import COEFFICIENTS
from svd_trt.errors import ArgumentError
from svd_trt.runtime.device import Buffer, Device, Session

if TYPE_CHECKING:
    from svd_trt.runtime.pipeline import VideoPipeline

__all__ = ["Conditions", "StepCallback", "denoise"]

Floats: TypeAlias = npt.NDArray[np.float32]
StepCallback: TypeAlias = "Callable[[VideoPipeline, int, float, dict[str, Any]], Mapping[str, Any] | None]"

_C_NOISE = COEFFICIENTS.index("c_noise")


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


def denoise(
    pipe: VideoPipeline,
    session: Session,
    latents: Floats,
    conditions: Conditions,
    table: Floats,
    callback: StepCallback | None,
    on_step: Callable[[float], object],
) -> Floats:
    """Step ``latents`` ``[B, F, C, h, w]`` through ``table`` ``[S, 7]`` of coefficients.

    Two pairs of buffers change places, so a step allocates nothing; the host sees the latents only where a callback
    asks for them. A step is one call of the network, or two where it takes one guidance branch at a time.

    Args:
        pipe: handed to the callback; its device holds the buffers.
        session: the denoiser.
        latents: noise at the first sigma.
        conditions: of these videos.
        table: a sampler's coefficients, a row a step.
        callback: see `VideoPipeline.__call__`.
        on_step: called after each step with its seconds.
    """
    device = pipe.device
    most_branches = pipe.bundle.manifest.ranges.branches.max
    passes: list[dict[str, Buffer]] = [
        {name: device.upload(array) for name, array in inputs.items()} for inputs in conditions.passes(most_branches)
    ]
    rows = [device.upload_rows(_without_skip(table)) for _ in passes[1:]] + [device.upload_rows(table)]
    zeros = device.upload(np.zeros_like(latents))  # nothing writes to it
    now, following = device.upload(latents), device.empty(latents.shape, np.float32)
    before, denoised = device.upload(np.zeros_like(latents)), device.empty(latents.shape, np.float32)
    partial = device.empty(latents.shape, np.float32)
    for step in range(len(table)):
        started = time.perf_counter()
        done = zeros
        for index, fixed in enumerate(passes):
            target = denoised if index == len(passes) - 1 else partial
            session.enqueue(
                fixed
                | {
                    "latents": now,
                    "previous_denoised": before,
                    "partial_denoised": done,
                    "coefficients": rows[index][step],
                    "next_latents": following,
                    "denoised": target,
                }
            )
            done = target
        now, following, before, denoised = following, now, denoised, before
        if callback is not None:
            now = _call_back(callback, pipe, device, step, float(table[step, _C_NOISE]), now)
        on_step(time.perf_counter() - started)
    return device.download(now)


def _without_skip(table: Floats) -> Floats:
    """The coefficients of passes before the last, to which the latents themselves do not contribute."""
    result = table.copy()
    result[:, COEFFICIENTS.index("c_skip")] = 0
    return result


def _call_back(
    callback: StepCallback, pipe: VideoPipeline, device: Device, step: int, timestep: float, latents: Buffer
) -> Buffer:
    host = device.download(latents)
    answer = callback(pipe, step, timestep, {"latents": host})
    if answer is not None and not isinstance(answer, Mapping):
        raise ArgumentError(f'callback_on_step_end must return None or {{"latents": ...}}, not {type(answer).__name__}')
    changed = (answer or {}).get("latents")
    if changed is None:
        return latents
    replacement = np.ascontiguousarray(changed, np.float32)
    if replacement.shape != host.shape:
        raise ArgumentError(f"callback_on_step_end returned latents of shape {replacement.shape}, not {host.shape}")
    return device.upload(replacement)
