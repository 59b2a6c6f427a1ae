"""Presets of ``quality``: sets of arguments that trade evaluations of the network for closeness to the limit.

``docs/schedules.md`` has the measured cost and error of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["QUALITIES"]

QUALITIES: Mapping[str, Mapping[str, Any]] = {
    "best": {"schedule": "karras", "num_inference_steps": 25, "sampler": "unic"},
    "standard": {"schedule": "ays", "num_inference_steps": 10, "sampler": "unic"},
    "fast": {"schedule": "ays", "num_inference_steps": 8, "sampler": "unic", "guidance_interval": (0.0, 50.0)},
    "draft": {"schedule": "ays", "num_inference_steps": 5, "sampler": "euler"},
}
"""Arguments of each preset, as `svd_trt.runtime.parameters.Parameters` takes them."""
