"""Names of the machine that a server is on, and the name in a header ``Host``."""

from __future__ import annotations

__all__ = ["LOOPBACK", "host_name"]

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""Names of this machine. A page at another port of it is another site."""


def host_name(host: str) -> str:
    """The name in a header ``Host``, without its port."""
    return host.lower().rpartition("]")[0].strip("[") if host.startswith("[") else host.lower().partition(":")[0]
