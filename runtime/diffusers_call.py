"""What diffusers' users type: arguments by position, and what to use instead of what is not here."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from svd_trt.errors import ArgumentError

__all__ = ["advice_for", "by_name", "check_names", "check_tensor_inputs", "missing_attribute"]

_ORDER = (
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "sigmas",
    "min_guidance_scale",
    "max_guidance_scale",
    "fps",
    "motion_bucket_id",
    "noise_aug_strength",
    "decode_chunk_size",
    "num_videos_per_prompt",
    "generator",
    "latents",
    "output_type",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
    "return_dict",
)
"""The arguments after ``image`` of ``StableVideoDiffusionPipeline.__call__`` in diffusers 0.42."""

_INSTEAD = {
    "batch_size": "pass a list of pictures, or num_videos_per_prompt=",
    "callback": "use callback_on_step_end=",
    "callback_steps": "use callback_on_step_end=, which is called after every step",
    "device": "choose it with VideoPipeline.open(..., device=)",
    "eta": "samplers have no eta; use sampler=",
    "guidance_end": "use guidance_interval=, in noise levels",
    "guidance_scale": "use min_guidance_scale= and max_guidance_scale=",
    "guidance_start": "use guidance_interval=, in noise levels",
    "image_embeddings": "the picture is encoded by the pipeline; pass image",
    "manual_seed": "use seed=",
    "negative_prompt": "SVD takes a picture and no text",
    "noise": "use latents= for the noise to start from, or noise_aug_strength= for that of the picture",
    "num_images_per_prompt": "use num_videos_per_prompt=",
    "num_steps": "use num_inference_steps=",
    "prompt": "SVD takes a picture and no text",
    "scheduler": "use sampler=, and schedule= or sigmas=",
    "steps": "use num_inference_steps=",
    "strength": "use noise_aug_strength=",
    "timesteps": "use schedule= or sigmas=",
    "torch_dtype": "the precision is chosen by `svd-trt build --precision`",
}

_ATTRIBUTES = {
    "enable_attention_slicing": "use VideoPipeline.open(..., vram_budget=)",
    "enable_model_cpu_offload": "use VideoPipeline.open(..., vram_budget=)",
    "enable_sequential_cpu_offload": "use VideoPipeline.open(..., vram_budget=)",
    "enable_xformers_memory_efficient_attention": "engines have fused attention already",
    "image_encoder": "networks are engines; the executor can run one",
    "scheduler": "use sampler=, and schedule= or sigmas=, in the call",
    "set_progress_bar_config": "use progress= in the call",
    "to": "choose the device with VideoPipeline.open(..., device=), and the precision with `svd-trt build --precision`",
    "unet": "networks are engines; the executor can run one",
    "vae": "networks are engines; the executor can run one",
}


def by_name(values: Sequence[Any], named: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name, if ``values`` were given by position after the picture, in diffusers' order.

    Args:
        values: by position.
        named: given by name, or at their defaults.
        defaults: of those that are always in ``named``.

    Raises:
        TypeError: there are too many values, or one of them was given by name too.
    """
    if len(values) > len(_ORDER):
        raise TypeError(f"at most {1 + len(_ORDER)} arguments are given by position, not {1 + len(values)}")
    placed = dict(zip(_ORDER, values, strict=False))
    for name in placed:
        if name in named and (name not in defaults or named[name] is not defaults[name]):
            raise TypeError(f"{name} was given by position and by name")
    return {**named, **placed}


def check_names(arguments: Mapping[str, object], known: Collection[str]) -> None:
    """Refuse arguments that nothing knows.

    Raises:
        TypeError: the message says what to use instead, if that is known.
    """
    for name in arguments:
        if name in known:
            continue
        if name in _ORDER:
            raise TypeError(f"{name} is for a call; a stream yields frames, uint8 [H, W, 3] each")
        known_names = {*known, *_ORDER}
        advice = advice_for(name, known_names) or f"known are {', '.join(sorted(known_names))}"
        raise TypeError(f"unexpected keyword argument {name!r}; {advice}")


def advice_for(name: str, known: Collection[str]) -> str | None:
    """What to use instead of the argument ``name``; None if nothing of ``known`` is like it."""
    if name in _INSTEAD:
        return _INSTEAD[name]
    similar = difflib.get_close_matches(name, known, 1)
    return f"use {similar[0]}=" if similar else None


def check_tensor_inputs(names: Sequence[str]) -> None:
    """Check ``callback_on_step_end_tensor_inputs``.

    Raises:
        ArgumentError: it has another name than ``latents``.
    """
    if isinstance(names, str) or not all(name == "latents" for name in names):
        raise ArgumentError(
            f"callback_on_step_end_tensor_inputs is ['latents'] or empty, not {names!r}; a step is one network, "
            "and only its latents leave it"
        )


def missing_attribute(owner: str, name: str) -> AttributeError:
    """Make the error for an attribute that diffusers' pipeline has, or for any other."""
    advice = f"; {_ATTRIBUTES[name]}" if name in _ATTRIBUTES else ""
    return AttributeError(f"{owner!r} object has no attribute {name!r}{advice}")
