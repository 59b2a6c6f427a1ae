"""The shapes of requests and answers in the OpenAPI description. Answers are made as plain data, not of these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from svd_trt.runtime.parameters import Parameters
from svd_trt.serve.refusals import ErrorType
from svd_trt.serve.store import Status
from svd_trt.serve.words import api_words

__all__ = ["ErrorBody", "Health", "ModelList", "Video", "VideoList", "form_schema"]


class ErrorObject(BaseModel):
    """What is wrong, in the pipeline's own words."""

    type: ErrorType
    message: str
    field: str | None
    limit: dict[str, Any] | float | None


class ErrorBody(BaseModel):
    """The body of every answer of 400 and above."""

    error: ErrorObject


class Video(BaseModel):
    """A job."""

    id: str
    object: Literal["video"]
    model: str
    status: Status
    progress: int
    stage: str | None
    position: int | None
    created_at: float
    started_at: float | None
    completed_at: float | None
    seconds_left: float | None
    error: ErrorObject | None
    warnings: list[str]
    arguments: dict[str, Any]


class VideoList(BaseModel):
    """Jobs, the newest first."""

    object: Literal["list"]
    data: list[Video]
    has_more: bool


class Model(BaseModel):
    """A bundle, with the defaults and limits of its arguments by name, and the arguments that each ``quality`` sets."""

    id: str
    object: Literal["model"]
    default_model: bool
    source: str
    precision: str
    backend: str
    limits: dict[str, dict[str, Any]]
    presets: dict[str, dict[str, Any]]


class ModelList(BaseModel):
    """The bundles that are served, the default first."""

    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """Whether the server can make videos."""

    status: Literal["ok"]


def form_schema() -> dict[str, Any]:
    """The form of ``POST /v1/videos``: a picture, and every argument of a generation."""
    properties: dict[str, Any] = {
        "image": {"type": "string", "format": "binary", "description": "The file of a picture."},
        "input_reference": {"type": "string", "format": "binary", "description": "Another name of image."},
        "model": {"type": "string", "description": "Name of a bundle; the default is the first."},
    }
    for name, spec in Parameters.fields().items():
        one: dict[str, Any] = {"description": api_words(spec.metadata["help"])}
        low, high = spec.metadata.get("min"), spec.metadata.get("max")
        if "choices" in spec.metadata:
            one |= {"type": "string", "enum": list(spec.metadata["choices"])}
        elif "numbers" in spec.metadata or "metavar" in spec.metadata:
            one |= {"type": "string"}
        else:
            one |= {"type": "number" if isinstance(spec.default, float) else "integer"}
            one |= {key: value for key, value in (("minimum", low), ("maximum", high)) if value is not None}
        properties[name] = one
    properties["num_videos_per_prompt"] |= {"maximum": 1}
    return {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": properties,
                    "anyOf": [{"required": ["image"]}, {"required": ["input_reference"]}],
                    "additionalProperties": False,
                },
                "example": {"image": "(the bytes of picture.png)", "seed": 42, "num_inference_steps": 25},
            }
        },
    }
