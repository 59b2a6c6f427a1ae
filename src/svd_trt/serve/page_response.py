"""The page at ``/``, with a policy that lets it run its own script and style and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.responses import Response

__all__ = ["page"]

_SELF = "default-src 'none'; connect-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
_NOBODY = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


@cache
def _read() -> tuple[bytes, str]:
    """The page, and its policy."""
    text = (files("svd_trt.serve") / "page" / "index.html").read_text("utf-8")
    allowed = "".join(f"{kind}-src {_hashes(text, kind)}; " for kind in ("script", "style"))
    return text.encode(), _SELF + allowed + _NOBODY


def _hashes(text: str, tag: str) -> str:
    """The sources of a policy for each ``<script>`` or ``<style>`` in a page."""
    bodies = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", text, re.DOTALL | re.IGNORECASE)
    digests = (base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def page() -> Response:
    """The answer to ``GET /``."""
    content, policy = _read()
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
    return Response(content, media_type="text/html; charset=utf-8", headers=headers)
