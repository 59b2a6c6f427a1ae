"""Noise schedules, samplers and presets by name: what the arguments decide, and the videos that they give."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from svd_trt import ArgumentError, VideoPipeline
from svd_trt.export.fidelity import psnr
from svd_trt.runtime.parameters import Parameters
from svd_trt.runtime.quality_presets import QUALITIES
from svd_trt.runtime.samplers import known_harm
from svd_trt.runtime.schedules import SCHEDULES, ays_sigmas
from svd_trt.runtime.settings import Settings
from tests.runtime.textbook import TEXTBOOK

SIZE: dict[str, Any] = {"num_frames": 3, "height": 72, "width": 96, "seed": 42}


def decided(pipe: VideoPipeline, picture: PIL.Image.Image, **arguments: Any) -> Settings:
    """What a generation would be made with; nothing runs."""
    stream = pipe.stream(picture, resize_mode="stretch", **(SIZE | arguments))
    stream.close()
    return stream.parameters


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({}, (None, 25, "euler")),
        ({"quality": "best"}, ("karras", 25, "unic")),
        ({"quality": "standard"}, ("ays", 10, "unic")),
        ({"quality": "fast"}, ("ays", 8, "unic")),
        ({"quality": "draft"}, ("ays", 5, "euler")),
        ({"quality": "draft", "num_inference_steps": 25}, ("ays", 25, "euler")),
        ({"quality": "standard", "sampler": "euler"}, ("ays", 10, "euler")),
        ({"quality": "draft", "schedule": "karras", "sampler": "dpmpp_2m"}, ("karras", 5, "dpmpp-2m")),
        ({"quality": "standard", "sigmas": (9.0, 1.0, 0.0)}, (None, 2, "unic")),
        ({"schedule": "exponential", "num_inference_steps": 3, "num_frames": 2}, ("exponential", 3, "euler")),
        ({"quality": None, "schedule": None, "num_inference_steps": None}, (None, 25, "euler")),
    ],
    ids=str,
)
def test_what_is_given_wins_over_the_preset(
    dynamic_pipe: VideoPipeline, picture: PIL.Image.Image, arguments: dict[str, Any], wanted: tuple[Any, ...]
) -> None:
    settings = decided(dynamic_pipe, picture, **arguments)
    assert (settings.schedule, settings.num_inference_steps, settings.sampler) == wanted
    assert settings.quality == arguments.get("quality")
    assert settings.guidance_interval == ((0, 50) if arguments.get("quality") == "fast" else None)
    assert len(settings.sigmas) == settings.num_inference_steps + 1
    if settings.schedule == "ays":
        assert settings.sigmas == tuple(ays_sigmas(settings.num_inference_steps).tolist())
    # What a file's metadata say makes the same video again.
    again = {name: value for name, value in settings.as_dict().items() if name not in ("resize_mode",)}
    assert decided(dynamic_pipe, picture, **again) == settings


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"schedule": "ays", "sigmas": (1.0, 0.0)}, "schedule and sigmas were both given; give one of them"),
        ({"schedule": "AYS"}, "schedule must be one of karras, exponential, ays, not 'AYS'"),
        ({"sampler": "heun"}, "sampler must be one of euler, unic, dpmpp-2m, ab2, lcm, not 'heun'"),
        ({"quality": "ultra"}, "quality must be one of best, standard, fast, draft, not 'ultra'"),
        ({"quality": ["best"]}, "quality must be one of"),
        ({"schedule": 7}, "schedule must be one of karras, exponential, ays, not 7"),
    ],
    ids=str,
)
def test_names_that_are_none(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError) as error:
        Parameters(**arguments)
    assert words in str(error.value)


def test_an_interval_that_is_given_wins(dynamic_pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    settings = decided(dynamic_pipe, picture, quality="fast", guidance_interval=(0, 1e6))
    assert settings.guidance_interval == (0, 1e6)


def test_presets_are_arguments() -> None:
    for preset in QUALITIES.values():
        Parameters(**preset)
        assert all(Parameters.fields()[name].default is None for name in preset), "what is given could not win"


@pytest.mark.parametrize(
    ("sampler", "schedule", "steps", "warned"),
    [
        ("dpmpp-2m", "karras", 15, True),
        ("dpmpp-2m", "karras", 3, True),
        ("dpmpp-2m", "karras", 16, False),
        ("dpmpp-2m", "karras", 2, False),  # both steps are Euler's
        ("dpmpp-2m", "ays", 8, False),
        ("dpmpp-2m", None, 8, False),
        ("unic", "karras", 8, False),
    ],
)
def test_combinations_that_are_known_to_be_harmful(sampler: str, schedule: Any, steps: int, warned: bool) -> None:
    assert (known_harm(sampler, schedule, steps) is not None) == warned


@pytest.mark.parametrize(("steps", "figures"), [(3, "5 steps, its error is 0.085"), (9, "8 steps, its error is 0.065")])
def test_the_figure_is_that_of_the_nearest_count_below(steps: int, figures: str) -> None:
    assert f"with {figures}" in (known_harm("dpmpp-2m", "karras", steps) or "")


def test_harm_is_said_once(dynamic_pipe: VideoPipeline, picture: PIL.Image.Image) -> None:
    """The checkpoint's own schedule is Karras' too; sigmas of the caller's are the caller's business."""
    few: dict[str, Any] = {"sampler": "dpmpp_2m", "num_inference_steps": 9}
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("svd_trt").addHandler(handler)
    try:
        decided(dynamic_pipe, picture, **few | {"num_inference_steps": 16})
        decided(dynamic_pipe, picture, **few, sigmas=(700.0, 70.0, 7.0, 0.7, 0.0))
        decided(dynamic_pipe, picture, **few, schedule="ays")
        assert messages == []
        decided(dynamic_pipe, picture, **few)
        decided(dynamic_pipe, picture, **few, schedule="karras")
    finally:
        logging.getLogger("svd_trt").removeHandler(handler)
    assert len(messages) == 2
    for message in messages:
        assert "dpmpp-2m overshoots on the karras schedule with 9 steps" in message


@pytest.mark.parametrize("schedule", ["ays", "karras"])
@pytest.mark.parametrize("sampler", TEXTBOOK)
def test_videos_are_those_of_the_textbook(
    sampler: str,
    schedule: str,
    dynamic_pipe: VideoPipeline,
    reference: Any,
    picture: PIL.Image.Image,
    record_property: Any,
) -> None:
    """diffusers' pipeline runs the other side, with the sampler in the form in which its paper derives it."""
    ours, by_euler = (
        dynamic_pipe(picture, output_type="np", num_inference_steps=6, schedule=schedule, sampler=name, **SIZE).frames
        for name in (sampler, "euler")
    )
    options = SIZE | {"sigmas": SCHEDULES[schedule](dynamic_pipe.bundle.manifest.sampler, 6).tolist()}
    generator = torch.manual_seed(options.pop("seed"))
    own = reference.scheduler
    reference.scheduler = TEXTBOOK[sampler].from_config(own.config)
    try:
        theirs = reference(picture, generator=generator, output_type="np", **options).frames
    finally:
        reference.scheduler = own
    value = psnr(ours, (theirs * 255).round().astype(np.uint8))
    record_property("psnr_db", value)
    assert value >= 75
    assert psnr(by_euler, ours) < 60, "the samplers must differ for this to show anything"
