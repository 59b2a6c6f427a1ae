"""Pictures and latents from arrays of any library, from bytes and from open files; frames that others read in place."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import torch

from svd_trt import VideoPipeline
from svd_trt.errors import ArgumentError, ImageError
from svd_trt.runtime.arrays import is_array, to_numpy
from svd_trt.runtime.images import load_image, pictures_in
from svd_trt.runtime.latents import checked_latents

FAST: dict[str, Any] = {"num_frames": 3, "num_inference_steps": 2, "height": 48, "width": 64, "seed": 1}


class Dlpack:
    """Has `__dlpack__` and nothing else, as the standard of the array API asks for."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self._array.__dlpack_device__()
        return device


class OldDlpack(Dlpack):
    """As libraries before DLPack 1.0: it knows a stream, and no devices, versions or copies."""

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self._array.__dlpack__()


class Array:
    """Has `__array__` alone, as arrays of TensorFlow."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.array(self._array, dtype or self._array.dtype)


class OnGpu(Dlpack):
    """As an array of CuPy: numpy must not take it, and its copy in host memory must be asked for."""

    def __init__(self, array: Any) -> None:
        super().__init__(array)
        self.asked: list[Any] = []

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __dlpack__(self, *, dl_device: Any = None, **options: Any) -> Any:
        self.asked.append(dl_device)
        if dl_device != (1, 0):
            raise BufferError("it is on a GPU")
        return self._array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


class OnlyOnGpu(OnGpu):
    def __dlpack__(self, *, stream: Any = None) -> Any:  # type: ignore[override]
        raise BufferError("it is on a GPU")


KINDS: dict[str, Any] = {
    "numpy": lambda array: array,
    "torch": torch.from_numpy,
    "dlpack": Dlpack,
    "old-dlpack": OldDlpack,
    "array": Array,
    "gpu": OnGpu,
}


@pytest.fixture
def pixels(picture: PIL.Image.Image) -> npt.NDArray[np.uint8]:
    return np.array(picture)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_come_from_arrays_of_any_library(kind: str, pixels: npt.NDArray[np.uint8]) -> None:
    make = KINDS[kind]
    floats = pixels.astype(np.float32) / 255
    for array in (pixels, floats, pixels.transpose(2, 0, 1), floats.transpose(2, 0, 1)):
        np.testing.assert_array_equal(np.asarray(load_image(make(array))), pixels)
    several = np.stack([pixels, pixels[::-1]])
    for batch in (several, several.transpose(0, 3, 1, 2), several.astype(np.float64) / 255):
        found = [np.asarray(load_image(one)) for one in pictures_in(make(batch))]
        np.testing.assert_array_equal(np.stack(found), several)
    found = [np.asarray(load_image(one)) for one in pictures_in([make(several), make(pixels)])]
    np.testing.assert_array_equal(np.stack(found), [*several, pixels])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_are_first_or_last_by_the_shape(channels: int) -> None:
    values = np.random.default_rng(1).integers(0, 256, (9, 14, channels), np.uint8)
    last, first = load_image(values), load_image(values.transpose(2, 0, 1))
    assert last.size == first.size == (14, 9)
    assert last.tobytes() == first.tobytes()
    ambiguous = np.zeros((3, 8, 3), np.uint8)
    assert load_image(ambiguous).size == (8, 3), "then they are last"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_tensors_of_torch_of_every_float_type_and_with_a_gradient(dtype: Any) -> None:
    values = (torch.arange(5 * 7 * 3) % 9).reshape(5, 7, 3) / 8
    expected = np.rint(values.numpy() * 255)
    tensor = values.clone().to(dtype).requires_grad_()
    np.testing.assert_allclose(np.asarray(load_image(tensor)), expected, atol=1)
    shape = (1, 5, 7, 3, 1)
    np.testing.assert_array_equal(checked_latents(tensor.reshape(shape), shape), values.reshape(shape).numpy())


def test_bfloat16_of_other_libraries() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = (np.arange(5 * 7 * 3) % 9).reshape(5, 7, 3) / 8
    array = values.astype(ml_dtypes.bfloat16)
    assert to_numpy(Array(array), "it").dtype == np.float32
    np.testing.assert_array_equal(np.asarray(load_image(array)), np.rint(values * 255))


def test_a_subclass_of_a_tensor_that_another_library_defines() -> None:
    class Mine(torch.Tensor):
        pass

    values = torch.rand((5, 7, 3)).as_subclass(Mine).requires_grad_()
    assert type(values) is Mine
    np.testing.assert_array_equal(to_numpy(values, "it"), values.detach().as_subclass(torch.Tensor).numpy())


def test_a_copy_in_host_memory_is_asked_for(pixels: npt.NDArray[np.uint8]) -> None:
    array = OnGpu(pixels)
    np.testing.assert_array_equal(to_numpy(array, "it"), pixels)
    assert array.asked == [(1, 0)]
    with pytest.raises(ArgumentError, match=r"latents cannot be read as an array \(.*\); pass a copy in host memory"):
        checked_latents(OnlyOnGpu(pixels), (1,))
    with pytest.raises(ArgumentError, match=r"the picture cannot be read as an array \(.*\); pass a copy in host"):
        pictures_in(OnlyOnGpu(pixels))


def test_arrays_in_host_memory_are_not_copied() -> None:
    values = np.arange(24, dtype=np.float32)
    for make in (torch.from_numpy, Dlpack, OldDlpack):
        assert np.shares_memory(to_numpy(make(values), "it"), values)
    assert not is_array(np.ndarray)
    assert not is_array([values])


@pytest.mark.parametrize("kind", KINDS)
def test_latents_come_from_arrays_of_any_library(
    kind: str, dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    start = np.random.default_rng(2).standard_normal((1, 3, 4, 6, 8)).astype(np.float32)
    expected = dynamic_pipe(picture, latents=start, output_type="latent", **FAST).frames
    got = dynamic_pipe(picture, latents=KINDS[kind](start), output_type="latent", **FAST).frames
    np.testing.assert_array_equal(got, expected)


def test_pictures_come_from_bytes_and_open_files(picture_file: Path, pixels: npt.NDArray[np.uint8]) -> None:
    content = picture_file.read_bytes()
    with picture_file.open("rb") as file:
        for source in (content, bytearray(content), memoryview(content), io.BytesIO(content), file):
            np.testing.assert_array_equal(np.asarray(load_image(pictures_in(source)[0])), pixels)
    with pytest.raises(ImageError, match="the picture"):
        load_image(b"picture.png")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((2, 2, 3, 8, 8), np.uint8), r"shape \[2, 2, 3, 8, 8\]: pass .*\[channels, height, width\]"),
        (torch.zeros((8, 9, 10)), r"shape \[8, 9, 10\]"),
        (torch.zeros((3, 8, 9), dtype=torch.int64), "array of int64: pass uint8, or floats between 0 and 1"),
        (torch.full((3, 8, 9), 2.0), "values from 2 to 2: rescale"),
        (torch.full((3, 8, 9), float("nan")), "nan"),
        (np.zeros((0, 3, 8, 9), np.uint8), "no picture was given"),
        (7, "an image is a path, the bytes of a file or an open one, a PIL image, or an array of numpy, torch"),
    ],
)
def test_other_pictures_are_refused(wrong: Any, message: str) -> None:
    with pytest.raises((ImageError, ArgumentError), match=message):
        load_image(pictures_in(wrong)[0])


def test_other_libraries_read_frames_and_latents_in_place(
    dynamic_pipe: VideoPipeline, picture: PIL.Image.Image
) -> None:
    frames = dynamic_pipe(picture, output_type="np", **FAST).frames
    streamed = next(dynamic_pipe.stream(picture, **FAST))
    latents = dynamic_pipe(picture, output_type="latent", **FAST).frames
    for array, dtype in ((frames, torch.uint8), (streamed, torch.uint8), (latents, torch.float32)):
        assert array.__dlpack_device__() == (1, 0)
        tensor = torch.from_dlpack(array)
        assert tensor.dtype == dtype
        assert tensor.data_ptr() == array.__array_interface__["data"][0]
        tensor.flatten()[0] = 77
        assert array.flat[0] == 77, "torch has a copy"
    shared = dynamic_pipe(picture, output_type="dlpack", **FAST).frames
    assert [len(video) for video in shared] == [3], "a list for each video"
    in_stream = next(dynamic_pipe.stream(picture, output_type="dlpack", **FAST))
    np.testing.assert_array_equal(torch.from_dlpack(shared[0][0]).numpy(), torch.from_dlpack(in_stream).numpy())
    before = streamed.copy()
    dynamic_pipe(picture, **FAST)
    np.testing.assert_array_equal(streamed, before, err_msg="a later video wrote to frames that the caller has")
    np.testing.assert_array_equal(streamed[0, 1:], frames[0, 0, 0, 1:])
