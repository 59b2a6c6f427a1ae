"""What one request may ask for, beyond what the bundle allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from svd_trt.engine.manifest import Manifest
from svd_trt.runtime.parameters import Parameters
from svd_trt.serve.refusals import RequestError
from svd_trt.serve.words import api_words

__all__ = ["Limits", "argument_limits", "require_within"]


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        queue: jobs that may wait, of all models.
        upload_bytes: of the whole body of a request.
        pixels: of a picture, before it is decoded.
        steps: denoising steps of a video.
        frames: of a video, those of ``extend`` included.
        seconds: that a video may take once it is begun.
        upload_seconds: that a client may take to send a request.
    """

    queue: int = 32
    upload_bytes: int = 20_000_000
    pixels: int = 40_000_000
    steps: int = 100
    frames: int = 250
    seconds: float = 3600.0
    upload_seconds: float = 60.0


def argument_limits(manifest: Manifest, limits: Limits) -> dict[str, dict[str, Any]]:
    """Defaults and limits of every argument: those of the bundle, or of the server if they are tighter."""
    most = {
        "num_frames": limits.frames,
        "extend": limits.frames - 1,
        "num_inference_steps": limits.steps,
        "num_videos_per_prompt": 1,
    }
    described = {}
    for name, info in manifest.host.arguments.items():
        high = info.max
        if name in most:
            high = most[name] if high is None else min(high, most[name])
        default = info.default if high is None or not isinstance(info.default, int) else min(info.default, high)
        one: dict[str, Any] = {"kind": info.kind, "default": default, "min": info.min, "max": high}
        # The words of this version, for a bundle that an earlier one built; they end with what no default stands for.
        words = Parameters.fields()[name].metadata["help"] if name in Parameters.fields() else info.help
        one["help"] = api_words(words if default is None else words.partition("  [")[0])
        if info.choices:
            one["choices"] = list(info.choices)
        if name in ("height", "width"):
            one["multiple"] = manifest.host.symbols[name].multiple
        described[name] = one
    return described


def require_within(parameters: Parameters, frames: int, allowed: Mapping[str, Mapping[str, Any]], most: int) -> None:
    """Check what the server allows less of than the bundle.

    Args:
        parameters: of the request.
        frames: ``num_frames`` with the bundle's default.
        allowed: `argument_limits`.
        most: frames of a video.

    Raises:
        RequestError: the message names the argument and the limit.
    """
    for name in ("num_inference_steps", "num_videos_per_prompt"):
        value, high = getattr(parameters, name), allowed[name]["max"]
        if value > high:
            asked = "; ask once for each video" if name == "num_videos_per_prompt" else ""
            raise RequestError(
                400,
                "invalid_request",
                f"{name} may be at most {high} on this server, not {value}{asked}",
                field=name,
                limit={"min": allowed[name]["min"], "max": allowed[name]["max"]},
            )
    if frames + parameters.extend > most:
        name = "extend" if parameters.extend else "num_frames"
        raise RequestError(
            400,
            "invalid_request",
            f"a video may have at most {most} frames on this server, not {frames + parameters.extend}; "
            f"ask for a smaller {name}",
            field=name,
            limit={"min": allowed[name]["min"], "max": allowed[name]["max"]},
        )
