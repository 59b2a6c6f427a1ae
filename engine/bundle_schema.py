"""The JSON Schema of ``manifest.json``: ``python -m svd_trt.engine.bundle_schema FILE`` writes it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

from svd_trt.engine.manifest import Manifest

__all__ = ["bundle_schema"]


def bundle_schema() -> dict[str, Any]:
    """The schema as plain data, in the dialect of 2020-12."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(Manifest)}


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(msgspec.json.format(msgspec.json.encode(bundle_schema()), indent=1) + b"\n")
