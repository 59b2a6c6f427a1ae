"""From a form to a checked picture and checked arguments, in the pipeline's own words, before a job is accepted."""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import PIL.Image

from svd_trt.engine.decode_chunks import chunk_sizes
from svd_trt.errors import ArgumentError, SvdTrtError
from svd_trt.runtime.argument_values import colour_of
from svd_trt.runtime.diffusers_call import advice_for
from svd_trt.runtime.framing import framed
from svd_trt.runtime.generation import groups_of
from svd_trt.runtime.guidance import largest_scale
from svd_trt.runtime.images import load_image
from svd_trt.runtime.longer import parts_of
from svd_trt.runtime.parameters import Parameters
from svd_trt.runtime.picture_files import most_pixels, readable
from svd_trt.runtime.pipeline import VideoPipeline
from svd_trt.runtime.samplers import few_step_notes, known_harm
from svd_trt.runtime.settings import Settings, memory_request, resolve
from svd_trt.serve.limits import Limits, argument_limits, require_within
from svd_trt.serve.refusals import RequestError, refused
from svd_trt.serve.words import api_words
from svd_trt.units import format_count, shorten

__all__ = ["VideoRequest", "checked_request"]

_NAME = "the picture"


@dataclass(frozen=True)
class VideoRequest:
    """What a client asks for, checked.

    Attributes:
        picture: the bytes of its file.
        given: keyword arguments for `VideoPipeline.stream`, with a seed.
        settings: everything decided.
        warnings: what the client should know of the video, one sentence each.
    """

    picture: bytes
    given: dict[str, Any]
    settings: Settings
    warnings: list[str]


def checked_request(picture: bytes, fields: Mapping[str, str], pipe: VideoPipeline, limits: Limits) -> VideoRequest:
    """Check everything that can be checked without the device.

    Args:
        picture: the bytes of the uploaded file.
        fields: the other fields of the form.
        pipe: of the model that was asked for; it may be making a video.
        limits: of the server.

    Raises:
        RequestError: something is not as it must be; the message names it.
    """
    allowed = argument_limits(pipe.bundle.manifest, limits)
    try:
        _require_known(fields)
        given = {name: _value(name, allowed[name]["kind"], text) for name, text in fields.items() if text != ""}
        if given.get("seed") is None:
            given["seed"] = secrets.randbits(32)
        parameters = Parameters(**given)
        manifest = pipe.bundle.manifest
        frames = parameters.num_frames or manifest.ranges.frames.clamp(manifest.model.num_frames)
        require_within(parameters, frames, allowed, limits.frames)
        _require_pixels(picture, limits.pixels)
        warnings: list[str] = []
        settings = _settings(picture, parameters, pipe, warnings.append)
    except SvdTrtError as error:
        told = refused(error, allowed)
        raise RequestError.of(503 if told["type"] == "server_error" else 400, told) from error
    return VideoRequest(picture, given, settings, [api_words(warning) for warning in warnings])


def _settings(picture: bytes, parameters: Parameters, pipe: VideoPipeline, warn: Callable[[str], None]) -> Settings:
    """Decide what the pipeline will decide, and read the picture once, so that a job that waits is one that works."""
    manifest = pipe.bundle.manifest
    request = memory_request(parameters, manifest, 1)
    groups_of(request.videos, manifest.ranges.batch)
    plan = pipe.plan(request)
    if parameters.extend:
        parts_of(request.frames, parameters.extend, plan.decode_chunk_size, manifest.ranges.chunk)
    else:
        chunk_sizes(request.frames, plan.decode_chunk_size, manifest.ranges.chunk)
    background = None if parameters.background is None else colour_of(parameters.background)
    image = load_image(picture, icc=parameters.icc, background=background, name=_NAME, warn=warn)
    mode = parameters.resize_mode
    framed(image, request.height, request.width, mode, background=background, name=_NAME, warn=warn)
    settings = resolve(parameters, manifest, request, plan, parameters.seed)
    schedule = None if parameters.sigmas is not None else settings.schedule or manifest.sampler.schedule
    if harm := known_harm(settings.sampler, schedule, settings.num_inference_steps):
        warn(harm)
    largest = largest_scale(settings.guidance_shape, settings.min_guidance_scale, settings.max_guidance_scale)
    for note in few_step_notes(settings.sampler, settings.num_inference_steps, largest):
        warn(note)
    return settings


def _require_known(fields: Mapping[str, str]) -> None:
    known = Parameters.fields().keys()
    for name in fields:
        if name not in known:
            instead = advice_for(name, known) or f"fields are image, model, {', '.join(sorted(known))}"
            raise RequestError(
                400, "invalid_request", f"there is no field {shorten(repr(name))}; {instead}", field=shorten(name)
            )


def _require_pixels(picture: bytes, most: int) -> None:
    """Read the size from the head of a picture. What Pillow does not know is left to the pipeline, which refuses it."""
    if not picture:
        raise RequestError(400, "invalid_request", f"{_NAME} is empty; send a file", field="image")
    try:
        with readable(_NAME), PIL.Image.open(io.BytesIO(picture)) as image:
            if image.width * image.height <= most:
                return
            size = f"{image.width:,}x{image.height:,}"
    except SvdTrtError as error:
        if not isinstance(error.__cause__, PIL.Image.DecompressionBombError):
            return
        size = f"more than {format_count(max(most_pixels() or 0, most))}"
    raise RequestError(
        413,
        "too_large",
        f"{_NAME} has {size} pixels, and this server takes at most {format_count(most)}; scale it down",
        field="image",
        limit=most,
    )


def _value(name: str, kind: str, text: str) -> Any:
    """The value of an argument that a form gives as text.

    Raises:
        ArgumentError: it is not of the kind of the argument.
    """
    try:
        if kind == "integer":
            return int(text)
        if kind == "number":
            return float(text)
        if kind == "numbers":
            return tuple(float(part) for part in text.split(","))
    except ValueError:
        what = {"integer": "a whole number", "number": "a number", "numbers": "numbers such as 700,10,0"}[kind]
        raise ArgumentError(f"{name} must be {what}, not {shorten(repr(text))}") from None
    return text
