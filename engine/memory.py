"""Device memory that a bundle needs, from what the builder reported of its engines; nothing is loaded to know it.

The report is for the largest sizes of an engine's ranges. Activations are proportional to how many frames run together
(measured for full-size SVD: to 0.1 % from 14 to 25 frames, and for decode chunks of 1 to 25), so those of smaller
sizes follow. The same is taken for pictures, branches and pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from svd_trt.engine.manifest import Manifest, NetworkEntry
from svd_trt.engine.spec import NETWORKS, NetworkName

__all__ = ["Mode", "activation_bytes", "modes", "vram_bytes"]

_BYTES = {"float32": 4, "uint8": 1}


@dataclass(frozen=True)
class Mode:
    """A way to make a video of ``frames`` frames.

    Attributes:
        frames: of the video.
        decode_chunk: frames decoded together.
        resident: all engines stay loaded; otherwise each is loaded when it is its turn, and let go.
    """

    frames: int
    decode_chunk: int
    resident: bool


def modes(manifest: Manifest) -> list[Mode]:
    """The modes worth comparing: the trained frame counts that the bundle serves, and few to all frames a chunk."""
    frames, chunk = manifest.ranges.frames, manifest.ranges.chunk
    counts = [n for n in (14, 25) if n in frames] or sorted({frames.min, frames.max})
    found = []
    for resident in (True, False):
        for n in counts:
            chunks = {chunk.clamp(n), chunk.clamp(8), chunk.min}
            found += [Mode(n, size, resident) for size in sorted(chunks, reverse=True) if size <= n]
    return found


def vram_bytes(manifest: Manifest, mode: Mode) -> int | None:
    """Bytes for one video of the largest size: weights, one block of activations for all, inputs and outputs.

    None where the bundle has no engines. The driver's own context comes on top (a few hundred megabytes).
    """
    needs = {name: _network(manifest, name, mode) for name in NETWORKS}
    if any(need is None for need in needs.values()):
        return None
    known = [need for need in needs.values() if need is not None]
    if mode.resident:
        return sum(weights for weights, _ in known) + max(working for _, working in known)
    return max(weights + working for weights, working in known)


def activation_bytes(entry: NetworkEntry, sizes: Mapping[str, int]) -> int | None:
    """Activations of one engine at ``sizes`` of its symbols; those not named are at their largest."""
    if entry.plan is None or entry.plan.activation_bytes is None:
        return None
    share = math.prod(Fraction(sizes.get(symbol, r.max), r.max) for symbol, r in entry.spec.ranges.items())
    return math.ceil(entry.plan.activation_bytes * share)


def _network(manifest: Manifest, name: NetworkName, mode: Mode) -> tuple[int, int] | None:
    """Bytes of weights, and of everything else while it runs."""
    entry = manifest.networks[name]
    sizes = {"frames": mode.frames, "chunk": mode.decode_chunk, "batch": 1, "pictures": 1}
    sizes = {symbol: entry.spec.ranges[symbol].clamp(n) for symbol, n in sizes.items() if symbol in entry.spec.ranges}
    activations = activation_bytes(entry, sizes)
    if entry.plan is None or entry.plan.weight_bytes is None or activations is None:
        return None
    at = {symbol: sizes.get(symbol, r.max) for symbol, r in entry.spec.ranges.items()}
    tensors = sum(math.prod(t.resolve(at)) * _BYTES[t.dtype] for t in entry.spec.tensors)
    return entry.plan.weight_bytes, activations + tensors
