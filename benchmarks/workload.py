"""The workload of a benchmark: the sizes of its video, the arithmetic in it, and the bundles that can make it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from svd_trt.benchmarks.results import Workload, write_file
from svd_trt.engine.bundle import Bundle
from svd_trt.engine.spec import Range
from svd_trt.errors import ArgumentError, OutputError, SvdTrtError, first_line
from svd_trt.progress import Progress

__all__ = ["BundleKind", "Bundles", "count_flops", "make_workload"]

BundleKind: TypeAlias = Literal[
    "default", "cuda", "portable", "plain", "tensorrt", "tensorrt-plain", "tensorrt-rtx", "tensorrt-rtx-plain"
]
"""``default`` is what ``svd-trt build`` makes for ONNX Runtime, ``cuda`` the same with its own operators also in half
precision, ``portable`` with standard ONNX operators alone, ``plain`` without rewrites. The others hold TensorRT
engines, with and without rewrites."""

_BUILD_OPTIONS: dict[BundleKind, dict[str, Any]] = {
    "default": {"backend": "onnxruntime"},
    "cuda": {"backend": "onnxruntime", "operators": "onnxruntime"},
    "portable": {"backend": "onnxruntime", "operators": "onnx"},
    "plain": {"backend": "onnxruntime", "rewrites": False},
    "tensorrt": {"backend": "tensorrt"},
    "tensorrt-plain": {"backend": "tensorrt", "rewrites": False},
    "tensorrt-rtx-plain": {"backend": "tensorrt-rtx", "rewrites": False},
    "tensorrt-rtx": {"backend": "tensorrt-rtx"},
}

_Sizes: TypeAlias = tuple[int | None, int, int, int]
"""Frames (None for the checkpoint's own number), height, width, steps."""

_SIZES: dict[str, _Sizes] = {"tiny": (4, 64, 128, 2), "mid": (8, 256, 256, 5)}
_FULL_SIZE: _Sizes = (None, 576, 1024, 25)


def make_workload(
    model: str,
    *,
    frames: int | None,
    height: int | None,
    width: int | None,
    steps: int | None,
    decode_chunk_size: int | None,
    seed: int,
    precision: Literal["fp32", "fp16"],
) -> Workload:
    """The sizes that are given, and the preset's or the checkpoint's own for those that are None.

    Raises:
        CheckpointError: ``model`` names no checkpoint.
        ArgumentError: no model makes a video of this size.
    """
    from svd_trt.export.checkpoint_kinds import open_checkpoint

    kind, _, preset = model.partition(":")
    default = _SIZES.get(preset.partition("@")[0], _FULL_SIZE) if kind == "random" else _FULL_SIZE
    frames = frames or default[0] or open_checkpoint(model).description.model.num_frames
    height, width, steps = height or default[1], width or default[2], steps or default[3]
    if frames < 2 or height % 8 or width % 8:
        raise ArgumentError(
            f"{frames} frames of {width}x{height}: a video has at least 2, and its sizes are multiples of 8"
        )
    return Workload(
        model=model,
        precision=precision,
        frames=frames,
        height=height,
        width=width,
        steps=steps,
        decode_chunk_size=min(decode_chunk_size or frames, frames),
        seed=seed,
    )


def count_flops(workload: Workload) -> tuple[Workload, str | None]:
    """The workload with the arithmetic of diffusers' own networks, or unchanged with the reason if counting failed."""
    try:
        step, decode = _count(workload)
    except (SvdTrtError, RuntimeError, ValueError, NotImplementedError) as error:
        return workload, f"arithmetic was not counted: {first_line(error)}"
    return msgspec.structs.replace(workload, step_flops=step, decode_flops=decode), None


def _count(workload: Workload) -> tuple[float, float]:
    """FLOP of a step and of the decode, by running the networks on tensors without memory."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from svd_trt.export.checkpoint_kinds import open_checkpoint
    from svd_trt.export.random_checkpoint import empty_model

    checkpoint = open_checkpoint(workload.model)
    model, frames = checkpoint.description.model, workload.frames
    latent = (workload.height // model.vae_scale_factor, workload.width // model.vae_scale_factor)
    channels = model.latent_channels
    with torch.device("meta"), torch.no_grad():
        unet: Any = empty_model("unet", dict(checkpoint.configurations["unet"])).to("meta")
        vae: Any = empty_model("vae", dict(checkpoint.configurations["vae"])).to("meta")
        with FlopCounterMode(display=False) as step:
            sample = torch.empty(2, frames, 2 * channels, *latent)
            unet(sample, torch.empty(1), torch.empty(2, 1, model.embed_dim), torch.empty(2, 3))
        with FlopCounterMode(display=False) as decode:
            vae.decode(torch.empty(frames, channels, *latent), num_frames=frames)
    return float(step.get_total_flops()), float(decode.get_total_flops())


class _Built(msgspec.Struct, frozen=True):
    """How long a bundle took to build, kept beside it for later runs."""

    seconds: float | None


@dataclass(frozen=True)
class Bundles:
    """Bundles of a workload, kept in a folder from run to run.

    Attributes:
        workload: model, precision and sizes.
        folder: where bundles are kept.
        given: a bundle of the caller's, used instead of the one with the same engines; for the default one if it has
            none.
        progress: called with the kind that is being built.
        sizes: ranges of heights and widths; None is the workload's size alone.
    """

    workload: Workload
    folder: Path
    given: Path | None
    progress: Progress
    sizes: tuple[Range, Range] | None = None

    def get(self, kind: BundleKind) -> tuple[Path, float | None]:
        """The bundle, built if need be, and the seconds that building it took; None if that is not known.

        Raises:
            SvdTrtError: it cannot be built.
        """
        if self.given is not None and kind in _kinds_of(self.given):
            return self.given, None
        from svd_trt.export.build import build_bundle
        from svd_trt.export.options import BuildOptions

        workload = self.workload
        height, width = self.sizes or (_only(workload.height), _only(workload.width))
        options = BuildOptions(
            height=height,
            width=width,
            frames=Range(2, workload.frames, workload.frames),
            decode_chunk=Range(1, workload.decode_chunk_size, workload.frames),
            precision=workload.precision,
            **_BUILD_OPTIONS[kind],
        )
        name = f"{workload.model}-{workload.precision}-{workload.frames}x{height}x{width}-{kind}"
        path = self.folder / "".join(c if c.isalnum() or c in "-." else "-" for c in name)
        record = path.with_suffix(".built.json")
        self.progress(f"build {kind} bundle", 0, 0)
        try:
            started = time.perf_counter()
            result = build_bundle(workload.model, path, options)
            seconds: float | None = round(time.perf_counter() - started, 1)
            if result.up_to_date:
                return path, _read_seconds(record)
            if any(stage.reused for stage in result.stages):  # from an interrupted build, or from a cache
                seconds = None
            write_file(record, msgspec.json.encode(_Built(seconds)))
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.folder}: {error.strerror}; choose another place with --cache"
            ) from error
        return path, seconds


def _only(value: int) -> Range:
    return Range(value, value, value)


def _read_seconds(record: Path) -> float | None:
    try:
        return msgspec.json.decode(record.read_bytes(), type=_Built).seconds
    except (OSError, msgspec.DecodeError):
        return None


def _kinds_of(path: Path) -> tuple[BundleKind, ...]:
    """The kinds that the bundle can replace. Every bundle has ONNX networks, which ONNX Runtime can run."""
    manifest = Bundle.open(path, verify=False).manifest
    if manifest.tensorrt is not None:
        return "default", manifest.tensorrt.name
    return ("default", "cuda") if manifest.graph.operators == "onnxruntime" else ("default",)
