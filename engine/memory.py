"""Device memory that a bundle needs, from what the builder reported of its engines; nothing is loaded to know it.

The report is for the largest sizes of an engine's ranges. Activations are proportional to how many frames run together
(measured for full-size SVD: to 0.1 % from 14 to 25 frames, and for decode chunks of 1 to 25), so those of smaller
sizes follow. The same is taken for pictures, branches and pixels. `svd_trt.engine.vram` chooses by these figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from svd_trt.engine.manifest import Manifest, NetworkEntry
from svd_trt.engine.spec import LARGEST_STEPS, NETWORKS, NetworkSpec

__all__ = ["Footprint", "Mode", "activation_bytes", "footprint", "modes", "streaming_scratch", "vram_bytes"]

_BYTES = {"float32": 4, "uint8": 1}
_ALIGNMENT = 256  # bytes; TensorRT rounds the memory of a context up to it


@dataclass(frozen=True)
class Footprint:
    """Bytes of device memory by part.

    Attributes:
        weights: of all engines, or, where one is loaded at a time, of the one that needs most in all.
        activations: the block that engines compute in: the most that one of them needs, or what that one needs.
        buffers: inputs and outputs: the loop's, and those of the largest other network.
    """

    weights: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        """Everything but the driver's own context, a few hundred megabytes."""
        return self.weights + self.activations + self.buffers


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
    """Bytes for one guided video of the largest size, with as many branches together as the denoiser takes.

    None where the bundle has no engines. The driver's own context comes on top (a few hundred megabytes).
    """
    ranges = manifest.ranges
    sizes = {
        "batch": ranges.batch.clamp(1),
        "pictures": ranges.pictures.clamp(1),
        "branches": ranges.branches.max,
        "frames": ranges.frames.clamp(mode.frames),
        "chunk": ranges.chunk.clamp(mode.decode_chunk),
        "height": ranges.height.max,
        "width": ranges.width.max,
    }
    found = footprint(manifest, sizes, resident=mode.resident, passes=2 if ranges.branches.max == 1 else 1)
    return found.total if found else None


def activation_bytes(entry: NetworkEntry, sizes: Mapping[str, int]) -> int | None:
    """Activations of one engine at ``sizes`` of its symbols; those not named are at their largest."""
    if entry.plan is None or entry.plan.activation_bytes is None:
        return None
    share = math.prod(Fraction(sizes.get(symbol, r.max), r.max) for symbol, r in entry.spec.ranges.items())
    return math.ceil(entry.plan.activation_bytes * share)


def streaming_scratch(weight_bytes: int) -> int:
    """Bytes of activations to allow for the buffers that streamed weights arrive in.

    Only a loaded engine tells how many they are; an eighth of the weights is more than the largest layers of SVD have.
    """
    return math.ceil(weight_bytes / 8)


def footprint(
    manifest: Manifest, sizes: Mapping[str, int], *, resident: bool, passes: int = 1, streamed: int = 0
) -> Footprint | None:
    """What a video needs at ``sizes`` of all symbols; None where the builder's figures are missing.

    Resident engines share one block; where they come and go, it goes with them.

    Args:
        manifest: of the bundle.
        sizes: a value for each of `svd_trt.engine.spec.SYMBOLS`.
        resident: all engines stay loaded.
        passes: of the denoiser in a step; it runs over ``sizes["branches"]`` in each.
        streamed: bytes of the denoiser's weights that stay in host memory.
    """
    needs: list[tuple[int, int]] = []
    for name in NETWORKS:
        entry = manifest.networks[name]
        activations = activation_bytes(entry, sizes)
        if entry.plan is None or entry.plan.weight_bytes is None or activations is None:
            return None
        weights = entry.plan.weight_bytes
        if name == "denoiser" and streamed:
            activations += streaming_scratch(weights)
            weights -= streamed
        needs.append((weights, math.ceil(activations / _ALIGNMENT) * _ALIGNMENT))
    buffers = _buffers(manifest, sizes, passes)
    if resident:
        return Footprint(sum(w for w, _ in needs), max(a for _, a in needs), buffers)
    return Footprint(*max(needs, key=sum), buffers)


def _buffers(manifest: Manifest, sizes: Mapping[str, int], passes: int) -> int:
    """Bytes of the loop's buffers and of the tensors of the largest other network.

    The loop holds the denoiser's tensors: five of latents, the conditions and the coefficients, and a table of these
    with a row a step. A second pass has conditions and coefficients of its own, and one more buffer for what the
    first gave.
    """
    specs = {name: entry.spec for name, entry in manifest.networks.items()}
    loop = _tensor_bytes(specs["denoiser"], sizes)
    latents = loop["latents"]
    conditions = sum(loop[name] for name in ("image_latents", "image_embeds", "added_time_ids", "guidance"))
    others = {name: sum(_tensor_bytes(spec, sizes).values()) for name, spec in specs.items() if name != "denoiser"}
    # One chunk is copied to the host while the next is decoded.
    others["vae_decoder"] *= 2
    tables = passes * LARGEST_STEPS * loop["coefficients"]
    more = (passes - 1) * (conditions + loop["coefficients"] + latents)
    return sum(loop.values()) + more + tables + max(others.values())


def _tensor_bytes(spec: NetworkSpec, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of each input and output by name."""
    return {t.name: math.prod(t.resolve(sizes)) * _BYTES[t.dtype] for t in spec.tensors}
