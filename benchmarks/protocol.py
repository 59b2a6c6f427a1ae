"""What the harness and the processes of its contenders tell each other: one JSON object a line."""

from __future__ import annotations

import msgspec

from svd_trt.benchmarks.schema import Stage, Subject

__all__ = ["Job", "Made", "Ready", "Reply", "Request"]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """The first line: what to load."""

    contender: str
    subject: Subject
    picture: str
    bundle: str | None
    threads: int
    gpu: bool
    exact: bool = False
    """Make the reference: without the shortcuts that a GPU takes in fp32 by default."""


class Request(msgspec.Struct, frozen=True):
    """Any line after it: make the video once more."""

    output: str
    """File to write the video to."""
    frames: str | None = None
    """File to keep the frames in, uint8 ``[F, H, W, 3]``, as numpy does."""


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """Loaded."""

    import_s: float
    load_s: float


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """One video."""

    total_s: float
    stages: dict[Stage, float]
    steps: list[float]
    first_step_s: float
    """From the call to the first step's beginning."""
    host_s: float | None
    """Of a step, what it took beyond the network's own time; the median."""
    load_s: float
    """Loading that this video had to wait for; part of the total of the first."""
    peak_rss: int
    peak_vram: int | None
    energy_j: float | None


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """Exactly one of them."""

    ready: Ready | None = None
    made: Made | None = None
    error: str | None = None
