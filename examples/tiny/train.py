"""Trains the tiny Stable Video Diffusion from random weights to `checkpoint/` with one command:

    python examples/tiny/train.py

It has four stages: the VAE, the image encoder, the latents of many clips, and the denoiser. Each stage saves its state
under `runs/`, and the same command resumes after an interruption. Training takes about two hours on two CPU cores with
AVX512-BF16. The checkpoint is replaced every 500 denoiser steps, the pictures `loss.png` and `samples.png` at the end.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# How long idle threads spin. A high count slows training on shared cores; with a low one, threads wake late. torch
# reads this when it is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import train_clip
import train_unet
import train_vae
from diffusers import StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from model import make_image_processor, make_scheduler, save_pipeline
from plots import draw_loss, draw_samples

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=HERE / "runs", help="folder of the states and logs, for resuming")
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--vae-steps", type=int, default=train_vae.STEPS)
    parser.add_argument("--clip-steps", type=int, default=train_clip.STEPS)
    parser.add_argument("--clips", type=int, default=train_unet.CLIPS)
    parser.add_argument("--steps", type=int, default=train_unet.STEPS, help="training steps of the denoiser")
    options = parser.parse_args()

    vae = train_vae.train(options.runs, options.vae_steps)
    encoder = train_clip.train(options.runs, options.clip_steps)
    clips = train_unet.encode_clips(vae, encoder, options.runs, options.clips)

    def publish(unet: UNetSpatioTemporalConditionModel) -> None:
        pipeline = StableVideoDiffusionPipeline(
            vae=vae,
            image_encoder=encoder,
            unet=unet,
            scheduler=make_scheduler(),
            feature_extractor=make_image_processor(),
        )
        save_pipeline(pipeline, options.checkpoint)

    train_unet.train(clips, options.runs, publish, options.steps)
    draw_loss(options.runs, HERE / "loss.png")
    draw_samples(options.checkpoint, HERE / "samples.png")


if __name__ == "__main__":
    main()
