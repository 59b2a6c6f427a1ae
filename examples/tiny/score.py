"""Scores a checkpoint (with the diffusers pipeline) or an svd-trt bundle on pictures that were not in training.

    python examples/tiny/score.py --pictures 50 --json
    python examples/tiny/score.py --bundle path/to/bundle --pictures 50

`world.py` draws the correct video, so every score compares a video with the true clip. An error is the root mean
square difference of pixels in [0,1]. A position, in pixels, is the centroid of the pixels that differ from the (known)
sky.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import world
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

HERE = Path(__file__).parent
BUCKETS = (32, 80, 128, 176, 224)
CHUNK = 3  # 8 frames are decoded as 3 + 3 + 2
SIZE = 32  # as in model.py, which needs torch, while scoring a bundle does not
NUM_FRAMES = 8
Clip = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Settings:
    """The pipeline's arguments for one video."""

    fps: int
    motion_bucket_id: int
    seed: int
    num_frames: int = NUM_FRAMES
    num_inference_steps: int = 12
    min_guidance_scale: float = 1.0
    max_guidance_scale: float = 3.0
    noise_aug_strength: float = 0.02
    decode_chunk_size: int = NUM_FRAMES


Generate = Callable[[Image.Image, Settings], Clip]


def diffusers_generator(pipeline: Any) -> Generate:
    """Makes videos with a StableVideoDiffusionPipeline, in float32 on the CPU."""
    import torch

    pipeline.set_progress_bar_config(disable=True)

    def generate(image: Image.Image, settings: Settings) -> Clip:
        arguments = dict(vars(settings))
        seed = arguments.pop("seed")
        frames = pipeline(
            image,
            height=image.height,
            width=image.width,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            **arguments,
        ).frames[0]
        clip: Clip = np.round(np.asarray(frames) * 255).astype(np.uint8)
        return clip

    return generate


@contextlib.contextmanager
def bundle_generator(directory: Path) -> Iterator[Generate]:
    """Makes videos with an svd-trt bundle."""
    from svd_trt import VideoPipeline

    with VideoPipeline.open(directory) as pipeline:

        def generate(image: Image.Image, settings: Settings) -> Clip:
            clip: Clip = np.asarray(pipeline(image, output_type="np", **vars(settings)).frames)[0]
            return clip

        yield generate


def rms(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float:
    """Root mean square difference of uint8 pictures, in [0,1]."""
    return float(np.sqrt(np.mean((x.astype(np.float64) - y.astype(np.float64)) ** 2)) / 255)


def psnr(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float:
    """Peak signal-to-noise ratio in dB, 99 for equal pictures."""
    return float(min(99.0, -20 * np.log10(max(rms(x, y), 1e-9))))


def track(clip: Clip, scene: world.Scene) -> npt.NDArray[np.float64]:
    """Mean movement per frame (x, y) in pixels: the slope of a line through the rocket's centroids."""
    sky = world.draw_sky(scene, *clip.shape[1:3])
    weight = np.maximum(np.abs(clip / 255.0 - sky).max(-1) - 0.15, 0.0) + 1e-9  # [F,H,W]
    total = weight.sum((1, 2))
    rows, columns = np.arange(clip.shape[1]), np.arange(clip.shape[2])
    x = (weight.sum(1) * columns).sum(1) / total
    y = (weight.sum(2) * rows).sum(1) / total
    times = np.arange(len(clip)) - (len(clip) - 1) / 2
    slope: npt.NDArray[np.float64] = np.array([(times * x).sum(), (times * y).sum()]) / (times**2).sum()
    return slope


def angle_to_nose(clip: Clip, scene: world.Scene) -> float:
    """The angle in degrees between the movement in the clip and the direction of the rocket's nose."""
    x, y = track(clip, scene)
    turn = np.arctan2(y, x) - scene.heading
    return float(abs(np.degrees(np.arctan2(np.sin(turn), np.cos(turn)))))


def boundary_jump(clip: Clip, truth: Clip) -> float:
    """The change of the error at the seams between chunks of `CHUNK` frames, RMS."""
    error = (clip.astype(np.float64) - truth.astype(np.float64)) / 255
    seams = range(CHUNK, len(clip), CHUNK)
    return statistics.fmean(float(np.sqrt(np.mean((error[i] - error[i - 1]) ** 2))) for i in seams)


@dataclass
class Tally:
    """The scores of each picture."""

    first_psnr: list[float] = field(default_factory=list)
    angle: list[float] = field(default_factory=list)
    speed: list[tuple[float, float]] = field(default_factory=list)  # generated, true; pixels per frame
    error: list[float] = field(default_factory=list)
    repeat_error: list[float] = field(default_factory=list)
    random_error: list[float] = field(default_factory=list)
    vae_psnr: list[float] = field(default_factory=list)
    chunked: list[tuple[float, float, float]] = field(default_factory=list)  # seams: chunked, whole; PSNR between
    sweep: dict[int, list[float]] = field(default_factory=lambda: {bucket: [] for bucket in BUCKETS})


def picture_of(clip: Clip) -> Image.Image:
    return Image.fromarray(clip[0])


def score_picture(tally: Tally, generate: Generate, scene: world.Scene, settings: Settings) -> None:
    """Scores first frame, direction, speed, error, and the seams between decoded chunks."""
    truth = world.draw_clip(scene, NUM_FRAMES, SIZE, SIZE)
    clip = generate(picture_of(truth), settings)
    tally.first_psnr.append(psnr(clip[0], truth[0]))
    tally.angle.append(angle_to_nose(clip, scene))
    tally.speed.append((float(np.hypot(*track(clip, scene))), float(np.hypot(*track(truth, scene)))))
    tally.error.append(rms(clip, truth))
    tally.repeat_error.append(rms(np.repeat(truth[:1], NUM_FRAMES, axis=0), truth))
    chunked = generate(picture_of(truth), replace(settings, decode_chunk_size=CHUNK))
    tally.chunked.append((boundary_jump(chunked, truth), boundary_jump(clip, truth), psnr(chunked, clip)))


def score_sweep(tally: Tally, generate: Generate, seed: int, settings: Settings) -> None:
    """Scores the speed at five motion buckets, on a picture in which the fastest flight stays in view."""
    scene = world.make_scene(seed, NUM_FRAMES, fps=settings.fps, motion_bucket_id=max(BUCKETS))
    picture = picture_of(world.draw_clip(scene, 1, SIZE, SIZE))
    for bucket in BUCKETS:
        clip = generate(picture, replace(settings, motion_bucket_id=bucket))
        tally.sweep[bucket].append(float(np.hypot(*track(clip, scene))))


def reconstruct(pipeline: Any, clip: Clip) -> Clip:
    """Encodes and decodes the clip with the VAE."""
    import torch

    x = torch.from_numpy(clip).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(x).latent_dist.mode()
        decoded = pipeline.vae.decode(latents, num_frames=len(x)).sample
    out: Clip = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return out


def summarise(tally: Tally, settings: Settings, pictures: int) -> dict[str, Any]:
    """The report: scores, and whether each target is reached."""
    mean = statistics.fmean
    error, repeat = mean(tally.error), mean(tally.repeat_error)
    sweep = {str(bucket): mean(values) for bucket, values in tally.sweep.items()}
    moves = list(sweep.values())
    seam, no_seam, chunk_psnr = (mean(column) for column in zip(*tally.chunked, strict=True))
    scores: dict[str, Any] = {
        "vae_psnr_db": mean(tally.vae_psnr) if tally.vae_psnr else None,
        "first_frame_psnr_db_median": statistics.median(tally.first_psnr),
        "direction_within_30_degrees": mean(angle <= 30 for angle in tally.angle),
        "direction_error_degrees_median": statistics.median(tally.angle),
        "speed_ratio_to_truth_median": statistics.median(g / t for g, t in tally.speed),
        "pixels_per_frame_by_motion_bucket": sweep,
        "true_pixels_per_frame_by_motion_bucket": {str(b): SIZE * world.displacement(b, settings.fps) for b in BUCKETS},
        "error": error,
        "error_repeat_first_frame": repeat,
        "error_random_weights": mean(tally.random_error) if tally.random_error else None,
        "error_below_repeat": 1 - error / repeat,
        "chunk_seam_jump": seam,
        "chunk_seam_jump_without_chunks": no_seam,
        "chunked_to_whole_decode_psnr_db": chunk_psnr,
    }
    targets = {
        "direction_within_30_degrees >= 0.90": scores["direction_within_30_degrees"] >= 0.90,
        "displacement strictly increasing": all(a < b for a, b in pairwise(moves)),
        "error_below_repeat >= 0.30": scores["error_below_repeat"] >= 0.30,
        "first_frame_psnr_db_median >= 20": scores["first_frame_psnr_db_median"] >= 20,
    }
    shared = {k: v for k, v in vars(settings).items() if k not in ("fps", "motion_bucket_id")}
    return {"pictures": pictures, "settings": shared, "scores": scores, "targets": targets}


def score(generate: Generate, pipeline: Any, random: Generate | None, pictures: int, base: Settings) -> dict[str, Any]:
    """Scores `generate`. `pipeline` adds the score of the VAE, and `random` adds the baseline."""
    tally = Tally()
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("scoring", total=pictures)
        for i, seed in enumerate(world.held_out_seeds(pictures)):
            scene = world.make_scene(seed, NUM_FRAMES)
            truth = world.draw_clip(scene, NUM_FRAMES, SIZE, SIZE)
            own = replace(base, fps=scene.fps, motion_bucket_id=scene.motion_bucket_id, seed=base.seed + i)
            score_picture(tally, generate, scene, own)
            if i % 2 == 0:
                score_sweep(tally, generate, seed, replace(base, seed=base.seed + i))
            if pipeline is not None:
                tally.vae_psnr.append(psnr(reconstruct(pipeline, truth), truth))
            if random is not None and i % 5 == 0:
                tally.random_error.append(rms(random(picture_of(truth), own), truth))
            progress.advance(bar)
    return summarise(tally, base, pictures)


def print_table(report: dict[str, Any]) -> None:
    table = Table("score", "value", title=f"{report['pictures']} held-out pictures")
    for name, value in {**report["settings"], **report["scores"], **report["targets"]}.items():
        if isinstance(value, dict):
            value = "  ".join(f"{k}: {v:.2f}" for k, v in value.items())
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint", help="diffusers directory")
    source.add_argument("--bundle", type=Path, help="svd-trt bundle; without scores of the VAE and of random weights")
    parser.add_argument("--pictures", type=int, default=50)
    parser.add_argument("--steps", type=int, default=Settings.num_inference_steps)
    parser.add_argument("--max-guidance", type=float, default=Settings.max_guidance_scale)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="JSON on stdout instead of a table")
    options = parser.parse_args()
    base = Settings(7, 127, options.seed, num_inference_steps=options.steps, max_guidance_scale=options.max_guidance)
    if options.bundle:
        with bundle_generator(options.bundle) as generate:
            report = score(generate, None, None, options.pictures, base)
    else:
        import torch
        from diffusers import StableVideoDiffusionPipeline
        from model import make_pipeline

        pipeline = StableVideoDiffusionPipeline.from_pretrained(options.checkpoint).to(torch.float32)
        generate, random = diffusers_generator(pipeline), diffusers_generator(make_pipeline(seed=0))
        report = score(generate, pipeline, random, options.pictures, base)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_table(report)


if __name__ == "__main__":
    main()
