"""Golden values: what every host must get from a bundle, so that it can check itself.

A bundle has them in its folder ``golden``: a picture, values of the noise, of the schedule and of the prepared picture,
and the frames of a short video. The build makes them (`write_golden`), and `check_golden` compares what this runtime
gets with them. ``docs/bundle.md`` says how another host does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import PIL.Image

from svd_trt.engine.bundle import Bundle
from svd_trt.engine.decode_chunks import chunk_choices, largest_chunk
from svd_trt.engine.manifest import GOLDEN_FOLDER, FileEntry, GoldenEntry, Manifest
from svd_trt.engine.spec import NETWORKS
from svd_trt.errors import BundleError, first_line
from svd_trt.runtime.images import load_image
from svd_trt.runtime.noise import TorchGenerator
from svd_trt.runtime.pipeline import VideoPipeline
from svd_trt.runtime.preprocess import clip_pixels, vae_image
from svd_trt.runtime.samplers import SAMPLERS
from svd_trt.runtime.schedules import checkpoint_sigmas, initial_std

__all__ = ["Check", "GoldenValues", "check_golden", "short_video", "short_video_flops", "write_golden"]

FRAME_LEVELS = 2
"""Levels of 255 by which frames of another processor or version of ONNX Runtime may differ."""

_SEEDS = (42, 2**40 + 42)  # torch takes the low 32 bits, so both give the same
# Lengths with and without a rest of 16, and one that torch draws in double precision.
_DRAWS = (("float32", 48), ("float32", 35), ("float32", 7), ("float16", 37))
_STEPS = (1, 2, 5)
_SAMPLES = 500
_PICTURE = (150, 90)  # height and width: a portrait, so that a host that mixes up the axes notices


class Draw(msgspec.Struct, frozen=True):
    """Consecutive normal numbers of a generator."""

    dtype: str
    values: tuple[float, ...]


class Noise(msgspec.Struct, frozen=True):
    """What one seed gives."""

    seed: int
    draws: tuple[Draw, ...]


class Schedule(msgspec.Struct, frozen=True):
    """The default noise levels for a step count, and the coefficients of the default sampler."""

    steps: int
    sigmas: tuple[float, ...]
    initial_scale: float
    coefficients: tuple[tuple[float, ...], ...]


class Tensor(msgspec.Struct, frozen=True):
    """A tensor by its shape, and by values at evenly spaced places of its flat content."""

    shape: tuple[int, ...]
    stride: int
    samples: tuple[float, ...]


class Video(msgspec.Struct, frozen=True):
    """A video of the golden picture. Its frames, uint8 RGB ``shape``, are the bytes of the file ``frames.rgb``."""

    arguments: dict[str, Any]
    shape: tuple[int, ...]
    levels: int
    """By how much a value may differ."""


class GoldenValues(msgspec.Struct, frozen=True):
    """The file ``golden/values.json``."""

    noise: tuple[Noise, ...]
    schedules: tuple[Schedule, ...]
    pixels: Tensor
    """The image encoder's input, from the golden picture."""
    image: Tensor
    """The VAE encoder's input before noise, at the smallest height and width."""
    video: Video | None


class Check(msgspec.Struct, frozen=True):
    """One comparison with a golden value: the largest difference, and the largest that is allowed."""

    name: str
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        """False also if the difference is not a number."""
        return self.difference <= self.allowed


def write_golden(root: Path, manifest: Manifest, *, with_frames: bool) -> GoldenEntry:
    """Write the folder ``golden`` of the bundle at ``root``; its manifest gets the entry later.

    With ``with_frames`` this runs the networks on the CPU.
    """
    folder = root / GOLDEN_FOLDER
    folder.mkdir(exist_ok=True)
    picture, frames_file = folder / "picture.ppm", folder / "frames.rgb"
    _draw_picture().save(picture)
    video = None
    arguments = short_video(manifest) if with_frames else None
    if arguments is not None:
        frames = _frames(Bundle(root, manifest), picture, arguments)
        frames_file.write_bytes(frames.tobytes())
        video = Video(arguments, frames.shape, FRAME_LEVELS)
    values = folder / "values.json"
    encoded = msgspec.json.encode(_values(manifest, picture, video))
    values.write_bytes(msgspec.json.format(encoded, indent=1) + b"\n")
    return GoldenEntry(
        FileEntry.of(root, picture), FileEntry.of(root, values), FileEntry.of(root, frames_file) if video else None
    )


def check_golden(bundle: Bundle) -> list[Check]:
    """Compare what this runtime gets on the CPU with the golden values of ``bundle``.

    Raises:
        BundleError: the bundle has none, or they are damaged.
    """
    entry = bundle.manifest.golden
    if entry is None:
        raise BundleError(f"{bundle.path} has no golden values")
    picture = bundle.path / entry.picture.path
    try:
        wanted = msgspec.json.decode((bundle.path / entry.values.path).read_bytes(), type=GoldenValues)
    except (OSError, msgspec.MsgspecError) as error:
        raise BundleError(f"{bundle.path / entry.values.path} cannot be read ({error})") from error
    got = GoldenValues(
        noise=tuple(Noise(n.seed, _draws(n.seed, [(d.dtype, len(d.values)) for d in n.draws])) for n in wanted.noise),
        schedules=tuple(_schedule(bundle.manifest, s.steps) for s in wanted.schedules),
        **_tensors(bundle.manifest, picture),
        video=wanted.video,
    )
    checks = [
        Check("noise", _worst(_noise_values(got), _noise_values(wanted)), 1e-5),
        Check("float16 noise", _worst(_noise_values(got, half=True), _noise_values(wanted, half=True)), 2e-3),
        Check("schedule", _worst(_schedule_values(got), _schedule_values(wanted), relative=True), 1e-6),
        Check("image encoder's input", _worst(got.pixels.samples, wanted.pixels.samples), 1e-5),
        Check("VAE encoder's input", _worst(got.image.samples, wanted.image.samples), 1e-6),
    ]
    if wanted.video is not None and entry.frames is not None:
        recorded = _read_frames(bundle.path / entry.frames.path, wanted.video.shape)
        frames = _frames(bundle, picture, wanted.video.arguments)
        difference = float(np.abs(frames.astype(int) - recorded).max()) if frames.shape == recorded.shape else np.inf
        checks.append(Check("frames of a video", difference, wanted.video.levels))
    return checks


def short_video_flops(manifest: Manifest) -> float:
    """Floating-point operations of the golden video, estimated from those of the largest sizes."""
    total = 0.0
    for entry in (manifest.networks[name] for name in NETWORKS):  # it has one step, which is a deep one
        share = 1.0
        for symbol, r in entry.spec.ranges.items():
            share *= (2 if symbol == "branches" and r.max == 2 else r.min) / r.max
        total += entry.flops * share
    return total


def short_video(manifest: Manifest) -> dict[str, Any] | None:
    """Arguments of the shortest video of the smallest size, with guidance and one step; None if it cannot be decoded.

    A bundle with one decode chunk cannot decode every count of frames.
    """
    ranges, videos = manifest.ranges, manifest.ranges.batch.min
    largest = largest_chunk(manifest.model, ranges.height.min, ranges.width.min)
    for frames in range(ranges.frames.min, ranges.frames.max + 1):
        chunks = chunk_choices(frames, videos, ranges.chunk, largest)
        if chunks:
            return {
                "seed": _SEEDS[0],
                "num_inference_steps": 1,
                "num_frames": frames,
                "decode_chunk_size": chunks[0],
                "height": ranges.height.min,
                "width": ranges.width.min,
                "num_videos_per_prompt": videos,
            }
    return None


def _frames(bundle: Bundle, picture: Path, arguments: dict[str, Any]) -> npt.NDArray[np.uint8]:
    """The frames of all videos, ``[B * F, H, W, 3]``."""
    with VideoPipeline.open(bundle, backend="onnxruntime", device="cpu", verify=False) as pipe:
        return np.stack(list(pipe.stream(picture, resize_mode="stretch", **arguments)))  # without its warning


def _read_frames(path: Path, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """The recorded frames, of ``shape``.

    Raises:
        BundleError: the file cannot be read, or has another size.
    """
    try:
        return np.frombuffer(path.read_bytes(), np.uint8).reshape(shape)
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read ({first_line(error)})") from error


def _draw_picture() -> PIL.Image.Image:
    """A picture of gradients and stripes, ``[150, 90, 3]``, that has different values everywhere."""
    y, x = np.indices(_PICTURE)
    channels = [(3 * x + y) % 256, (x * y // 7) % 256, np.where((x // 9 + y // 11) % 2, 220, 35)]
    return PIL.Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def _values(manifest: Manifest, picture: Path, video: Video | None) -> GoldenValues:
    return GoldenValues(
        noise=tuple(Noise(seed, _draws(seed, _DRAWS)) for seed in _SEEDS),
        schedules=tuple(_schedule(manifest, steps) for steps in _STEPS),
        **_tensors(manifest, picture),
        video=video,
    )


def _tensors(manifest: Manifest, picture: Path) -> dict[Literal["pixels", "image"], Tensor]:
    model, image = manifest.model, load_image(picture)
    return {
        "pixels": _describe(clip_pixels(image, mean=model.image_mean, std=model.image_std)),
        "image": _describe(vae_image(image, manifest.ranges.height.min, manifest.ranges.width.min)),
    }


def _draws(seed: int, draws: Sequence[tuple[str, int]]) -> tuple[Draw, ...]:
    generator = TorchGenerator(seed)
    return tuple(Draw(dtype, tuple(generator.randn(length, dtype).tolist())) for dtype, length in draws)


def _schedule(manifest: Manifest, steps: int) -> Schedule:
    sigmas = checkpoint_sigmas(manifest.sampler, steps)
    table = SAMPLERS[manifest.sampler.solver](sigmas)
    return Schedule(
        steps, tuple(sigmas.tolist()), initial_std(manifest.sampler, sigmas), tuple(map(tuple, table.tolist()))
    )


def _describe(tensor: npt.NDArray[np.float32]) -> Tensor:
    flat = tensor.ravel()
    stride = max(1, flat.size // _SAMPLES)
    return Tensor(tensor.shape, stride, tuple(flat[::stride].tolist()))


def _noise_values(values: GoldenValues, *, half: bool = False) -> list[float]:
    return [v for noise in values.noise for d in noise.draws if (d.dtype == "float16") == half for v in d.values]


def _schedule_values(values: GoldenValues) -> list[float]:
    return [v for s in values.schedules for row in (s.sigmas, (s.initial_scale,), *s.coefficients) for v in row]


def _worst(got: Sequence[float], wanted: Sequence[float], *, relative: bool = False) -> float:
    """The largest difference; infinite if the lengths differ, or nothing was compared."""
    if len(got) != len(wanted) or not wanted:
        return float("inf")
    difference = np.abs(np.asarray(got) - np.asarray(wanted))
    return float((difference / np.maximum(np.abs(wanted), 1e-12)).max() if relative else difference.max())
