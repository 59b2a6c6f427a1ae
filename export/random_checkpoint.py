"""Checkpoints with random weights, in the real format and at any size, for timing, trying and testing.

The licensed weights cannot be shipped. These have the same classes, files and configuration keys, so everything that
uses them is really exercised; the video is noise. A build draws ``random:svd-xt`` in memory; `write_random_checkpoint`
writes one to disk.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from svd_trt.errors import CheckpointError, OutputError, ResourceError, first_line
from svd_trt.export.preflight import check_space
from svd_trt.export.presets import WEIGHTS_REVISION, Preset, configurations, find_preset
from svd_trt.export.silence import silence_libraries

__all__ = ["empty_model", "parameters_of", "random_model", "random_pipeline", "write_random_checkpoint"]


def empty_model(component: str, configuration: dict[str, Any]) -> nn.Module:
    """``unet``, ``vae`` or ``image_encoder`` of this configuration, with parameters that take no memory yet.

    Raises:
        CheckpointError: the libraries cannot create a model with it.
    """
    try:
        with silence_libraries(), init_empty_weights(include_buffers=False):
            if component == "unet":
                model = UNetSpatioTemporalConditionModel.from_config(configuration)
            elif component == "vae":
                model = AutoencoderKLTemporalDecoder.from_config(configuration)
            else:
                model = CLIPVisionModelWithProjection(CLIPVisionConfig(**configuration))
    except Exception as error:  # the libraries raise a dozen kinds for values that they do not expect
        raise CheckpointError(f"the configuration of the {component} is not SVD's: {first_line(error)}") from error
    assert isinstance(model, nn.Module)
    return model.eval()


def random_model(component: str, preset: Preset, seed: int, dtype: torch.dtype) -> nn.Module:
    """One model of ``preset``, its weights a function of ``seed``, the component and their own names.

    They are drawn in half precision, so that the fp16 and the fp32 model have the same weights. Matrices and kernels
    get the variance of torch's own initialisation, 1 / (3 fan_in): residual branches stay small beside the stream that
    they are added to, and activations stay far below the limits of half precision through the whole network. No two
    parameters are equal, and none is zero or one, so that tests notice when two are mixed up.
    """
    model = empty_model(component, configurations(preset)[component])

    def draw(place: tuple[nn.Module, str, str]) -> None:
        module, name, path = place
        shape = getattr(module, name).shape
        key = hashlib.sha256(f"{WEIGHTS_REVISION}/{seed}/{component}/{path}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7]))
        mean, std = _distribution(name, shape)
        values = torch.empty(shape, dtype=torch.float16).normal_(mean, std, generator=generator)
        setattr(module, name, nn.Parameter(values.to(dtype), requires_grad=False))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(draw, list(parameters_of(model))))
    return model


def random_pipeline(preset: str = "tiny", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A diffusers pipeline, on the CPU, whose weights are drawn from ``seed``.

    Raises:
        ArgumentError: there is no such preset.
    """
    p = find_preset(preset)
    with silence_libraries():
        # Imported here, because the other functions do not need these slow imports.
        from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
        from transformers import CLIPImageProcessor

        return StableVideoDiffusionPipeline(
            vae=random_model("vae", p, seed, dtype),
            image_encoder=random_model("image_encoder", p, seed, dtype),
            unet=random_model("unet", p, seed, dtype),
            scheduler=EulerDiscreteScheduler.from_config(configurations(p)["scheduler"]),
            feature_extractor=CLIPImageProcessor(),
        )


def write_random_checkpoint(
    directory: Path, preset: str = "tiny", seed: int = 0, *, variant: str | None = None
) -> None:
    """Write a random checkpoint in diffusers format; ``variant="fp16"`` stores half precision as the hub does.

    Raises:
        ArgumentError: ``preset`` is unknown.
        OutputError: ``directory`` exists and is not empty, or cannot be written.
        ResourceError: there is not enough disk or memory.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise OutputError(f"{directory} exists and is not an empty folder; choose another place")
    check_space(directory, sum(find_preset(preset).parameters.values()) * (2 if variant == "fp16" else 4))
    try:
        with silence_libraries():
            pipeline = random_pipeline(preset, seed, torch.float16 if variant == "fp16" else torch.float32)
            pipeline.save_pretrained(directory, variant=variant)
    except OSError as error:
        raise OutputError(f"cannot write the checkpoint to {directory}: {error}") from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise ResourceError(
            f"memory ran out while {directory} was written; use --variant fp16 or a larger machine"
        ) from error


def parameters_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Every parameter, as the module that has it, its name in the module, and its full name."""
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            yield module, name, f"{prefix}.{name}"


def _distribution(name: str, shape: torch.Size) -> tuple[float, float]:
    """Mean and standard deviation of a parameter."""
    if name == "mix_factor":
        return 0.0, 1.0  # as different as in a trained network; equal factors would hide that two are mixed up
    if name == "bias":
        return 0.0, 0.05
    if len(shape) == 1 and name == "weight":
        return 1.0, 0.05  # a normalisation's
    fan_in = shape.numel() // shape[0]
    return 0.0, (3 * max(fan_in, 3)) ** -0.5
