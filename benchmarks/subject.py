"""What is to be made: the sizes of a preset or a checkpoint, and the arithmetic in it."""

from __future__ import annotations

from typing import Any, Literal

from svd_trt.benchmarks.schema import Subject
from svd_trt.errors import ArgumentError, SvdTrtError, first_line

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
    if frames < 2 or height % 8 or width % 8:
        asked = f"{frames} frames of {width}x{height}"
        raise ArgumentError(f"{asked}: a video has at least 2, and its sizes are multiples of 8")
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


def with_flops(subject: Subject) -> tuple[Subject, str | None]:
    """Count the arithmetic of diffusers' own networks, on tensors without memory; and why where it stays unknown."""
    import msgspec

    try:
        step, decode = _count(subject)
    except (SvdTrtError, RuntimeError, ValueError, NotImplementedError) as error:
        return subject, f"arithmetic was not counted: {first_line(error)}"
    return msgspec.structs.replace(subject, step_flops=step, decode_flops=decode), None


def _count(s: Subject) -> tuple[float, float]:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from svd_trt.export.checkpoint import open_checkpoint
    from svd_trt.export.random_checkpoint import empty_model

    checkpoint = open_checkpoint(s.model)
    model = checkpoint.description.model
    latent = (s.height // model.vae_scale_factor, s.width // model.vae_scale_factor)
    channels = model.latent_channels
    with torch.device("meta"), torch.no_grad():
        unet: Any = empty_model("unet", dict(checkpoint.configurations["unet"])).to("meta")
        vae: Any = empty_model("vae", dict(checkpoint.configurations["vae"])).to("meta")
        with FlopCounterMode(display=False) as step:
            sample = torch.empty(2, s.frames, 2 * channels, *latent)
            unet(sample, torch.empty(1), torch.empty(2, 1, model.embed_dim), torch.empty(2, 3))
        with FlopCounterMode(display=False) as decode:
            vae.decode(torch.empty(s.frames, channels, *latent), num_frames=s.frames)
    return float(step.get_total_flops()), float(decode.get_total_flops())
