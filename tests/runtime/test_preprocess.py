"""The encoders' inputs against the code of diffusers that makes them.

Tolerance: 1e-5 absolute in the normalised pixels of the image encoder; the maximum measured is 2.6e-6. The
VAE's input is compared bit for bit.
"""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest

import svd_trt.runtime.preprocess as preprocess
from svd_trt.errors import ArgumentError
from svd_trt.runtime.preprocess import clip_pixels, vae_image
from tests.runtime.memory_peak import peak_of

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PILLOW = int(PIL.__version__.split(".")[0])
SIZES = [
    (224, 224),
    (576, 1024),
    (1024, 576),
    (480, 320),
    (225, 223),
    (223, 449),
    (131, 97),
    (37, 501),
    (16, 16),
    (2, 2),
    (3, 1500),
    (2000, 5),
]


def picture(height: int, width: int, kind: str = "noise") -> PIL.Image.Image:
    if kind == "noise":
        rng = np.random.default_rng(height * 10007 + width)
        return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    rows, columns = np.indices((height, width))
    board = (((rows + columns) % 2) * 255).astype(np.uint8)
    return PIL.Image.fromarray(board).convert("RGB")


def diffusers_clip_pixels(image: PIL.Image.Image) -> npt.NDArray[np.float32]:
    """The input of the image encoder in ``StableVideoDiffusionPipeline._encode_image``."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pipelines = pytest.importorskip("diffusers.pipelines.stable_video_diffusion")
    video_processor = pytest.importorskip("diffusers.video_processor")
    seen: list[Any] = []

    def encode(values: Any) -> SimpleNamespace:
        seen.append(values)
        return SimpleNamespace(image_embeds=torch.zeros(1, 4))

    encode.parameters = lambda: iter([torch.zeros(1)])  # type: ignore[attr-defined]
    pipeline = SimpleNamespace(
        image_encoder=encode,
        video_processor=video_processor.VideoProcessor(do_resize=True, vae_scale_factor=8),
        feature_extractor=transformers.CLIPImageProcessor(image_mean=list(MEAN), image_std=list(STD)),
    )
    pipelines.StableVideoDiffusionPipeline._encode_image(pipeline, image, "cpu", 1, False)
    result: npt.NDArray[np.float32] = seen[0][0].numpy()
    return result


@pytest.mark.parametrize("kind", ["noise", "board"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_clip_pixels_equal_diffusers(height: int, width: int, kind: str) -> None:
    image = picture(height, width, kind)
    actual = clip_pixels(image, mean=MEAN, std=STD)
    assert actual.shape == (3, 224, 224)
    assert actual.dtype == np.float32
    assert actual.flags.c_contiguous
    np.testing.assert_allclose(actual, diffusers_clip_pixels(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(100, 300), (448, 112), (96, 80), (1, 7), (300, 1)])
@pytest.mark.parametrize("size", [(64, 96), (1, 5), (336, 336)])
def test_other_sizes(height: int, width: int, size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion")
    image = picture(height, width)
    actual = clip_pixels(image, size=size, mean=(0, 0, 0), std=(1, 1, 1))
    assert actual.shape == (3, *size)
    # diffusers fails on a single row or column, which equals any number of copies of it, blurred or not.
    copies = image.resize((max(width, 2), max(height, 2)), PIL.Image.Resampling.NEAREST)
    tensor = torch.from_numpy(np.asarray(copies).transpose(2, 0, 1).astype(np.float32) / 255)[None]
    expected = module._resize_with_antialiasing(tensor * 2 - 1, size)
    np.testing.assert_allclose(actual, ((expected + 1) / 2)[0].numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (900, 1), (1, 3000)])
def test_one_pixel_high_or_wide(height: int, width: int) -> None:
    thin = clip_pixels(picture(height, width), mean=MEAN, std=STD)
    assert np.all(np.isfinite(thin))
    for axis, length in ((1, height), (2, width)):
        if length == 1:
            np.testing.assert_allclose(thin, np.broadcast_to(thin.take([0], axis), thin.shape), atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (50, 70), (576, 1024), (3, 4000)])
def test_a_constant_picture_stays_constant(height: int, width: int) -> None:
    image = PIL.Image.new("RGB", (width, height), (10, 128, 255))
    expected = (np.array([10, 128, 255]) / 255 - MEAN) / STD
    actual = clip_pixels(image, mean=MEAN, std=STD)
    np.testing.assert_allclose(actual, np.broadcast_to(expected[:, None, None], actual.shape), atol=1e-5)


@pytest.mark.parametrize("size", [(0, 224), (224, -1), (224,)])
def test_bad_sizes(size: Any) -> None:
    with pytest.raises(ArgumentError, match="size is"):
        clip_pixels(picture(8, 8), size=size, mean=MEAN, std=STD)


@pytest.mark.parametrize(("mean", "std"), [((0.5,), STD), (MEAN, (1.0, 1.0)), (MEAN, (1.0, 0.0, 1.0))])
def test_bad_normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ArgumentError, match="mean and std"):
        clip_pixels(picture(8, 8), mean=mean, std=std)


@pytest.mark.parametrize("target", [(576, 1024), (64, 128), (1024, 576), (8, 8)])
@pytest.mark.parametrize(("height", "width"), [*SIZES, (1, 1), (1, 50)])
def test_vae_image_equals_diffusers(height: int, width: int, target: tuple[int, int]) -> None:
    module = pytest.importorskip("diffusers.video_processor")
    image = picture(height, width)
    processor = module.VideoProcessor(do_resize=True, vae_scale_factor=8)
    actual = vae_image(image, *target)
    assert actual.flags.c_contiguous
    assert actual.dtype == np.float32
    # diffusers resizes in one call, in which Pillow 13 goes down first if the height shrinks more than the width, and
    # some of Pillow 12 do so for very narrow pictures.
    shrinks_more = height * target[1] > width * target[0] and height > target[0]
    down_first = shrinks_more and (PILLOW >= 13 or (PILLOW == 12 and height > 100 * width))
    given = image.resize((target[1], height), PIL.Image.Resampling.LANCZOS) if down_first else image
    np.testing.assert_array_equal(actual, processor.preprocess(given, *target)[0].numpy())


RECORDED = {
    "portrait": ((300, 200), (64, 128), "9d75859c59ea49ef"),
    "portrait, down": ((1000, 200), (64, 128), "a49fc3a5602f3bdc"),
    "landscape": ((200, 300), (64, 128), "86d00d79c8b4a179"),
    "landscape, up and down": ((30, 400), (64, 128), "180c61b5f942ac88"),
    "up": ((30, 40), (64, 128), "1d3d227abcd2645d"),
    "up to portrait": ((40, 30), (128, 64), "a4ee6179ddc91ee9"),
}


@pytest.mark.parametrize("case", RECORDED)
def test_vae_image_does_not_depend_on_pillow(case: str) -> None:
    """The digests are those of one resize with Pillow 11.0, and with 12.3."""
    (height, width), target, digest = RECORDED[case]
    levels = np.rint((vae_image(picture(height, width), *target) + 1) * 127.5).astype(np.uint8)
    assert hashlib.sha256(levels.tobytes()).hexdigest()[:16] == digest


def test_bands_are_the_whole_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(131, 97)
    whole = clip_pixels(image, mean=MEAN, std=STD)
    monkeypatch.setattr(preprocess, "_BAND", 97 * 10)
    np.testing.assert_allclose(clip_pixels(image, mean=MEAN, std=STD), whole, rtol=0, atol=1e-6)


def test_memory_does_not_grow_with_the_picture() -> None:
    """A picture of 48 million pixels, 192 MB in PIL, needs half of its own size more and not several times it."""
    setup = (
        PREPARE + "prepare(PIL.Image.new('RGB', (64, 64), 'red'))\nlarge = PIL.Image.new('RGB', (8000, 6000), 'red')"
    )
    assert peak_of(setup, "prepare(large)") < 110_000_000


PREPARE = """
import PIL.Image
from svd_trt.runtime.preprocess import clip_pixels, vae_image

def prepare(picture):
    clip_pixels(picture, mean=(0, 0, 0), std=(1, 1, 1))
    vae_image(picture, 576, 1024)

small, large = (PIL.Image.new("RGB", size, "red") for size in ((64, 64), (8000, 6000)))
prepare(small)
"""


@pytest.mark.parametrize("size", [(0, 64), (64, -8), (60, 64), (64, 100)])
def test_vae_image_refuses_sizes_off_the_latent_grid(size: tuple[int, int]) -> None:
    with pytest.raises(ArgumentError, match="multiples of 8"):
        vae_image(picture(8, 8), *size)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_other_modes_are_refused(mode: str) -> None:
    image = PIL.Image.new(mode, (8, 8))
    with pytest.raises(ArgumentError, match="load_image"):
        clip_pixels(image, mean=MEAN, std=STD)
    with pytest.raises(ArgumentError, match="load_image"):
        vae_image(image, 8, 8)
