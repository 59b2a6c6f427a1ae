"""The inputs of the image encoder and of the VAE encoder, from the picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import PIL.Image

from svd_trt.errors import ArgumentError

__all__ = ["clip_pixels", "vae_image"]

FloatArray = npt.NDArray[np.float32]

_VAE_FACTOR = 8  # pixels per latent, along each axis
_BAND = 1 << 22  # pixels that are converted to floating point together
_CUBIC = -0.75  # torch's coefficient of the cubic convolution kernel (Keys 1981); PIL and OpenCV differ


def clip_pixels(
    image: PIL.Image.Image,
    *,
    size: tuple[int, int] = (224, 224),
    mean: Sequence[float],
    std: Sequence[float],
) -> FloatArray:
    """The input of the CLIP image encoder: float32 ``[3, size[0], size[1]]``, normalised.

    The result equals, within 1e-5, that of diffusers' ``StableVideoDiffusionPipeline._encode_image``: a Gaussian blur
    against aliasing, a bicubic resize with aligned corners to ``size`` (height, width), then ``(x - mean) / std`` per
    channel. Both filters are linear and separable, so one small matrix per axis applies them. The rows of the matrices
    sum to 1, so the pipeline's conversion to [-1, 1] and back has no effect and is left out.

    A picture of one pixel in height or width, which the pipeline fails to pad, counts as constant along that axis.

    Args:
        image: RGB, from `svd_trt.runtime.images.load_image`.
        size: height and width of the result.
        mean: of each channel, from the checkpoint.
        std: of each channel, from the checkpoint.

    Raises:
        ArgumentError: the image has another mode, or ``size``, ``mean`` or ``std`` is malformed.
    """
    if len(size) != 2 or min(size) < 1:
        raise ArgumentError(f"size is a height and a width of at least 1, not {size}")
    if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
        raise ArgumentError(f"mean and std are three numbers each, std above 0, not {mean} and {std}")
    _require_rgb(image)
    rows = _resampling(image.height, size[0])
    columns = _resampling(image.width, size[1])
    # In bands and one channel at a time, because float32 takes four times the memory of the picture.
    height = max(_BAND // image.width, 1)
    squeezed = np.zeros((3, size[0], image.width), dtype=np.float32)
    for top in range(0, image.height, height):
        bottom = min(top + height, image.height)
        band = _rgb(image.crop((0, top, image.width, bottom)))  # [b, W, 3]
        for channel in range(3):
            squeezed[channel] += rows[:, top:bottom] @ (band[:, :, channel].astype(np.float32) / 255.0)
    return (squeezed @ columns.T - _per_channel(mean)) / _per_channel(std)


def vae_image(image: PIL.Image.Image, height: int, width: int) -> FloatArray:
    """The input of the VAE encoder before noise is added: float32 ``[3, height, width]`` in [-1, 1].

    The result equals that of diffusers' ``VideoProcessor(do_resize=True, vae_scale_factor=8).preprocess(image, height,
    width)`` to the bit: a Lanczos resize by PIL, which does not keep the aspect ratio. It goes across first and then
    down, as PIL 11 does. PIL 13 goes down first if the height shrinks more than the width, and 12 does so for very
    narrow pictures, which changes pixels a little (by 7 levels of 255 in random noise). With a call for each axis,
    frames do not depend on PIL's version.

    Args:
        image: RGB, from `svd_trt.runtime.images.load_image`.
        height: of the result, in pixels.
        width: of the result, in pixels.

    Raises:
        ArgumentError: the image has another mode, or ``height`` or ``width`` is not a positive multiple of 8.
    """
    if min(height, width) < 1 or height % _VAE_FACTOR or width % _VAE_FACTOR:
        raise ArgumentError(f"height and width are multiples of {_VAE_FACTOR}, not {height} and {width}")
    _require_rgb(image)
    across = image.resize((width, image.height), resample=PIL.Image.Resampling.LANCZOS)
    pixels = _rgb(across.resize((width, height), resample=PIL.Image.Resampling.LANCZOS))
    return np.ascontiguousarray(2.0 * (pixels.transpose(2, 0, 1).astype(np.float32) / 255.0) - 1.0)


def _require_rgb(image: PIL.Image.Image) -> None:
    if image.mode != "RGB":
        raise ArgumentError(f"the image has mode {image.mode}, not RGB; read it with load_image")


def _rgb(image: PIL.Image.Image) -> npt.NDArray[np.uint8]:
    """The pixels, ``[H, W, 3]``."""
    _require_rgb(image)
    return np.asarray(image)


def _per_channel(values: Sequence[float]) -> FloatArray:
    return np.asarray(values, dtype=np.float32).reshape(3, 1, 1)


@lru_cache(maxsize=8)
def _resampling(length: int, size: int) -> FloatArray:
    """The read-only matrix ``[size, length]`` that blurs one axis and resizes it to ``size``.

    It follows diffusers' ``_resize_with_antialiasing``: each output pixel is a cubic sum of four taps, and each tap is
    a Gaussian sum of input pixels.
    """
    taps, cubic = _bicubic(length, size)  # [size, 4] each
    gaussian = _gaussian(length / size)  # [K]
    offsets = np.arange(gaussian.size) - gaussian.size // 2
    sources = _reflect(taps[:, :, None] + offsets, length)  # [size, 4, K]
    weights = cubic[:, :, None] * gaussian  # [size, 4, K]
    matrix = np.empty((size, length), dtype=np.float32)
    for row in range(size):  # one at a time, because the sums are float64
        matrix[row] = np.bincount(sources[row].ravel(), weights[row].ravel(), minlength=length)
    matrix.setflags(write=False)  # the cache returns the same array to every caller
    return matrix


def _gaussian(factor: float) -> npt.NDArray[np.float64]:
    """Weights ``[K]`` of the blur before shrinking by ``factor``: K is odd, about 4 sigma; [0, 1, 0] to enlarge."""
    sigma = max((factor - 1.0) / 2.0, 0.001)
    radius = int(max(4.0 * sigma, 3)) // 2
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2.0 * sigma**2))
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def _bicubic(length: int, size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Indices and weights, ``[size, 4]`` each, of torch's bicubic ``interpolate(align_corners=True)``."""
    # torch keeps positions in float32; their rounding changes the weights by more than 1e-5 for wide pictures.
    step = np.float32(length - 1) / np.float32(size - 1) if size > 1 else np.float32(0)
    position = step * np.arange(size, dtype=np.float32)
    start = np.minimum(np.floor(position), length - 1).astype(np.int64)
    t = np.clip(position.astype(np.float64) - start, 0.0, 1.0)
    weights = np.stack([_far(t + 1), _near(t), _near(1 - t), _far(2 - t)], axis=1)
    indices = np.clip(start[:, None] + np.arange(-1, 3), 0, length - 1)
    return indices, weights


def _near(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The cubic convolution kernel for distances 0 to 1."""
    return ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1


def _far(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The cubic convolution kernel for distances 1 to 2."""
    return ((_CUBIC * x - 5 * _CUBIC) * x + 8 * _CUBIC) * x - 4 * _CUBIC


def _reflect(index: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """Reflect indices at the ends of the axis without repeating the end pixels, as often as a short axis needs."""
    period = max(2 * (length - 1), 1)
    folded = np.mod(index, period)
    return np.asarray(np.minimum(folded, period - folded), dtype=np.int64)
