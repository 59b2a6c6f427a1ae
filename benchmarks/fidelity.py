"""How far frames are from the reference's: a faster wrong answer shows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from skimage.metrics import structural_similarity

from svd_trt.benchmarks.schema import Fidelity
from svd_trt.export.fidelity import psnr

__all__ = ["compare_frames"]

_WINDOW = 7  # scikit-image's own default


def compare_frames(frames: npt.NDArray[np.uint8], reference: npt.NDArray[np.uint8]) -> Fidelity:
    """PSNR, and SSIM (Wang et al. 2004) by scikit-image, of each frame of ``[F, H, W, 3]`` and of the worst frame.

    Raises:
        ValueError: the shapes differ.
    """
    if frames.shape != reference.shape:
        raise ValueError(f"frames of shape {frames.shape} cannot be compared with {reference.shape}")
    pairs = list(zip(reference, frames, strict=True))
    decibels = [psnr(frame, expected) for expected, frame in pairs]
    ssim = [float(structural_similarity(a, b, channel_axis=-1, win_size=_WINDOW)) for a, b in pairs]
    return Fidelity(psnr_db=decibels, ssim=ssim, worst_psnr_db=min(decibels), worst_ssim=min(ssim))
