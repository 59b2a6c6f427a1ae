"""What clients are told names arguments, and no options of a command line."""

from __future__ import annotations

import io
import json
import re

import msgspec
import PIL.Image
import pytest

from svd_trt import Bundle
from svd_trt.runtime.parameters import Parameters
from svd_trt.serve.limits import Limits, argument_limits
from svd_trt.serve.words import api_words
from tests.serve.conftest import FAST, Served, error_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "--resize-mode crop or pad keeps its shape (resize_mode='crop' in Python)",
            "resize_mode=crop or pad keeps its shape",
        ),
        (
            "--sampler unic, --schedule ays or 9 steps are better (sampler='unic', schedule='ays' in Python)",
            "sampler=unic, schedule=ays or 9 steps are better",
        ),
        (
            "build one with another --height, or with extend=2 (--extend)",
            "build one with another --height, or with extend=2",
        ),
        ("from --min- to --max-guidance-scale", "from min_ to max_guidance_scale"),
        ("build with --shallow-steps (svd-trt build --unet)", "build with --shallow-steps (svd-trt build --unet)"),
    ],
)
def test_options_become_arguments(text: str, expected: str) -> None:
    assert api_words(text) == expected


@pytest.mark.parametrize("name", Parameters.fields())
def test_help_texts_have_no_syntax_of_a_command_line(name: str) -> None:
    """The page shows them, without what they say of the default."""
    text = api_words(Parameters.fields()[name].metadata["help"]).partition("  [")[0]
    assert text.endswith(".")
    assert re.findall(r"--\S*|\boptions?\b|\b[A-Z]{2,}\b|\w+_(?= )", text, re.ASCII) == []


def test_the_help_of_presets_says_what_each_sets() -> None:
    text = Parameters.fields()["quality"].metadata["help"]
    assert (
        "fast takes 8 steps (ays, unic, guided between noise levels 0 and 50), draft takes 5 steps (ays, euler)" in text
    )


def test_warnings_and_errors_of_the_server_name_arguments(served: Served) -> None:
    file = io.BytesIO()
    PIL.Image.new("RGBA", (80, 20), (255, 0, 0, 9)).save(file, "PNG")
    overshoots = {"sampler": "dpmpp-2m", "schedule": "karras", "num_inference_steps": 4, "num_frames": 2}
    warnings = served.accepted(file.getvalue(), **overshoots)["warnings"]
    assert [re.findall(r"[a-z_]+=[a-z0-9]+", warning) for warning in warnings] == [
        ["background=white"],
        ["resize_mode=crop"],
        ["sampler=unic", "schedule=ays"],
    ]
    told = [*warnings, json.dumps(served.client.get("/v1/models").json())]
    told += [json.dumps(served.client.get("/openapi.json").json()["paths"]["/v1/videos"])]
    assert not [text for text in told if re.search(r"--(?!shallow-steps)|in Python", text)]
    error = error_of(served.post(file.getvalue(), num_frames=12), 400, "invalid_request")
    assert error["message"].endswith("build one with another --frames, or go on after 8 frames with extend=4")
    assert served.accepted(file.getvalue(), **FAST, background="white", resize_mode="crop")["warnings"] == []


def test_a_bundle_of_an_earlier_version_has_the_words_of_this_one(tiny_bundle: Bundle) -> None:
    manifest = tiny_bundle.manifest
    old = {name: msgspec.structs.replace(info, help="Old.") for name, info in manifest.host.arguments.items()}
    host = msgspec.structs.replace(manifest.host, arguments=old)
    limits = argument_limits(msgspec.structs.replace(manifest, host=host), Limits())
    assert limits["num_inference_steps"]["help"] == "Denoising steps."
    assert limits["guidance_interval"]["help"].endswith("[default: all steps]")
