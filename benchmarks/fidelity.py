"""How far frames are from the reference's: a faster wrong answer shows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from svd_trt.benchmarks.schema import Fidelity

__all__ = ["IDENTICAL_DB", "compare_frames"]

IDENTICAL_DB = 200.0
"""Stands for the infinite ratio of identical frames, which JSON cannot hold."""

_WINDOW = 7  # scikit-image's own default


def compare_frames(frames: npt.NDArray[np.uint8], reference: npt.NDArray[np.uint8]) -> Fidelity:
    """PSNR and SSIM (Wang et al. 2004) of each frame of ``[F, H, W, 3]`` by scikit-image, and those of the worst.

    Raises:
        ValueError: the shapes differ.
    """
    if frames.shape != reference.shape:
        raise ValueError(f"frames of shape {frames.shape} cannot be compared with {reference.shape}")
    pairs = list(zip(reference, frames, strict=True))
    psnr = [_psnr(a, b) for a, b in pairs]
    ssim = [float(structural_similarity(a, b, channel_axis=-1, win_size=_WINDOW)) for a, b in pairs]
    return Fidelity(psnr_db=psnr, ssim=ssim, worst_psnr_db=min(psnr), worst_ssim=min(ssim))


def _psnr(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    return IDENTICAL_DB if np.array_equal(a, b) else float(peak_signal_noise_ratio(a, b, data_range=255))
