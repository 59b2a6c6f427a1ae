"""What loaded engines say of their memory, for plans that are made after it is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from svd_trt.engine.manifest import Manifest
from svd_trt.engine.spec import NetworkName

__all__ = ["with_measured"]


def with_measured(manifest: Manifest, measured: Mapping[NetworkName, Sequence[int]]) -> Manifest:
    """``manifest`` with what loaded engines say of their activations, if that is more than what their builder said.

    Args:
        manifest: of the bundle.
        measured: the bytes of each profile at its largest sizes, by network.
    """
    networks = dict(manifest.networks)
    for name, sizes in measured.items():
        entry = networks[name]
        assert entry.plan is not None
        profiles = tuple(
            msgspec.structs.replace(profile, activation_bytes=max(profile.activation_bytes or 0, size))
            for profile, size in zip(entry.plan.profiles, sizes, strict=True)
        )
        networks[name] = msgspec.structs.replace(entry, plan=msgspec.structs.replace(entry.plan, profiles=profiles))
    return msgspec.structs.replace(manifest, networks=networks)
