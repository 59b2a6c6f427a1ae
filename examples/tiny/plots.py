"""Draws the loss curves, and true and generated clips, for the README of the checkpoint."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt
import world
from PIL import Image, ImageDraw
from score import NUM_FRAMES, SIZE, Settings, diffusers_generator, picture_of

HERE = Path(__file__).parent
Picture = npt.NDArray[np.uint8]


def read_log(path: Path) -> dict[str, list[float]]:
    """The columns of the training log at `path`."""
    with path.open(newline="") as file:
        last = {int(row["step"]): row for row in csv.DictReader(file)}  # a resumed run repeats some steps
    rows = [last[step] for step in sorted(last)]
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def draw_loss(runs: Path, path: Path) -> None:
    """Draws one panel per network. Needs matplotlib."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    panels = [
        ("vae", "psnr", "VAE, PSNR (dB)"),
        ("clip", "heading_error", "image encoder, heading error (degrees)"),
    ]
    panels.append(("unet", "loss", "denoiser, v-prediction loss"))
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.8), layout="constrained")
    for axis, (name, column, title) in zip(axes, panels, strict=True):
        log = read_log(runs / f"{name}.csv")
        axis.plot(log["step"], log[column], linewidth=1)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if column != "psnr":
            axis.set_yscale("log")
    figure.savefig(path, dpi=80)


def sheet(rows: list[tuple[Picture, Picture]], captions: list[str], zoom: int = 2) -> Image.Image:
    """For each (true, generated) pair: the input picture, the true clip, and the generated clip under it."""
    gap, caption_height, side = 4, 14, SIZE * zoom
    row_height = caption_height + 2 * (side + gap) + gap
    canvas = Image.new("RGB", ((NUM_FRAMES + 1) * (side + gap) + 2 * gap, len(rows) * row_height), "white")
    draw = ImageDraw.Draw(canvas)
    for index, ((truth, generated), caption) in enumerate(zip(rows, captions, strict=True)):
        top = index * row_height + caption_height
        draw.text((gap, top - caption_height), caption, fill="black")
        canvas.paste(_enlarged(truth[0], side), (gap, top))
        for line, clip in enumerate((truth, generated)):
            for i, frame in enumerate(clip):
                canvas.paste(_enlarged(frame, side), (3 * gap + side + i * (side + gap), top + line * (side + gap)))
    return canvas


def _enlarged(frame: Picture, side: int) -> Image.Image:
    return Image.fromarray(frame).resize((side, side), Image.Resampling.NEAREST)


def draw_samples(checkpoint: Path, path: Path, pictures: int = 6) -> None:
    """Generates clips of held-out pictures with the pipeline and draws them as a `sheet`."""
    import torch
    from diffusers import StableVideoDiffusionPipeline

    pipeline = StableVideoDiffusionPipeline.from_pretrained(checkpoint).to(torch.float32)
    generate = diffusers_generator(pipeline)
    rows, captions = [], []
    for i, seed in enumerate(world.held_out_seeds(pictures)):
        scene = world.make_scene(seed, NUM_FRAMES)
        truth = world.draw_clip(scene, NUM_FRAMES, SIZE, SIZE)
        generated = generate(picture_of(truth), Settings(scene.fps, scene.motion_bucket_id, seed=i))
        rows.append((truth, generated))
        captions.append(
            f"input | true clip above, generated below | fps {scene.fps}, motion bucket {scene.motion_bucket_id}"
        )
    sheet(rows, captions).quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=HERE / "runs")
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    options = parser.parse_args()
    draw_loss(options.runs, HERE / "loss.png")
    draw_samples(options.checkpoint, HERE / "samples.png")


if __name__ == "__main__":
    main()
