"""What is to be made: the sizes of a preset or a checkpoint, and the arithmetic in it."""

from __future__ import annotations

import sys
from typing import Any, Literal

from svd_trt.benchmarks.schema import Subject
from svd_trt.errors import ArgumentError, SvdTrtError

__all__ = ["make_subject", "with_flops"]

# Frames, height, width, steps: what a person would wait for.
_SIZES = {"tiny": (4, 64, 128, 2), "mid": (8, 256, 256, 5)}
_FULL_SIZE = (None, 576, 1024, 25)


def make_subject(
    model: str,
    *,
    frames: int | None,
    height: int | None,
    width: int | None,
    steps: int | None,
    decode_chunk_size: int | None,
    seed: int,
    precision: Literal["fp32", "fp16"],
) -> Subject:
    """What is given, and the preset's or the checkpoint's own sizes for the rest.

    Raises:
        CheckpointError: the model is none.
        ArgumentError: a size that no model makes.
    """
    from svd_trt.export.checkpoint import open_checkpoint

    kind, _, preset = model.partition(":")
    own = _SIZES.get(preset.partition("@")[0], _FULL_SIZE) if kind == "random" else _FULL_SIZE
    if frames is None:
        frames = own[0] or open_checkpoint(model).description.model.num_frames
    height, width, steps = height or own[1], width or own[2], steps or own[3]
    if frames < 2 or height % 64 or width % 64:
        asked = f"{frames} frames of {width}x{height}"
        raise ArgumentError(f"{asked}: a video has at least 2, and its sizes are multiples of 64")
    assert height is not None
    assert width is not None
    assert steps is not None
    return Subject(
        model=model,
        precision=precision,
        frames=frames,
        height=height,
        width=width,
        steps=steps,
        decode_chunk_size=min(decode_chunk_size or frames, frames),
        seed=seed,
    )


def with_flops(subject: Subject) -> Subject:
    """Count the arithmetic of diffusers' own networks, on tensors without memory; unknown stays unknown."""
    import msgspec

    try:
        step, decode = _count(subject)
    except (SvdTrtError, RuntimeError, ValueError, NotImplementedError) as error:
        print(f"arithmetic not counted: {error}", file=sys.stderr)  # noqa: T201
        return subject
    return msgspec.structs.replace(subject, step_flops=step, decode_flops=decode)


def _count(s: Subject) -> tuple[float, float]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from svd_trt.export.checkpoint import open_checkpoint
    from svd_trt.export.presets import configurations, find_preset
    from svd_trt.export.random_checkpoint import empty_model
    from svd_trt.export.random_source import RandomCheckpoint

    checkpoint = open_checkpoint(s.model)
    if not isinstance(checkpoint, RandomCheckpoint):
        raise ArgumentError("only presets are counted")
    preset = find_preset(s.model.partition(":")[2].partition("@")[0])
    factor = 2 ** (len(preset.vae_channels) - 1)
    latent = (s.height // factor, s.width // factor)
    made = configurations(preset)
    with torch.device("meta"), torch.no_grad():
        unet: Any = empty_model("unet", made["unet"]).to("meta")
        vae: Any = empty_model("vae", made["vae"]).to("meta")
        with FlopCounterMode(display=False) as step:
            sample = torch.empty(2, s.frames, 8, *latent)
            unet(sample, torch.empty(1), torch.empty(2, 1, preset.embed_dim), torch.empty(2, 3))
        with FlopCounterMode(display=False) as decode:
            vae.decode(torch.empty(s.frames, 4, *latent), num_frames=s.frames)
    return float(step.get_total_flops()), float(decode.get_total_flops())
