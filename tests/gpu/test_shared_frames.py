"""Frames that stay on the GPU: what other libraries read, when they are finished, and when their memory is freed."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from typing import Any

import numpy as np
import PIL.Image
import pytest

from svd_trt import Bundle, VideoPipeline
from svd_trt.errors import ArgumentError, DeviceMemoryError
from svd_trt.runtime.cuda import dlpack
from svd_trt.runtime.cuda.dlpack import ManagedTensor
from tests.gpu.conftest import Rig

FAST: dict[str, Any] = {
    "num_frames": 4,
    "num_inference_steps": 2,
    "height": 40,
    "width": 136,  # a frame has 16,320 bytes, so that the second one is not aligned to 256
    "seed": 42,
    "decode_chunk_size": 2,
    "resize_mode": "crop",
}

_python = ctypes.PyDLL(None)
_python.PyCapsule_GetPointer.restype = ctypes.c_void_p
_python.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_python.PyCapsule_SetName.argtypes = (ctypes.py_object, ctypes.c_char_p)


class Consumer:
    """Takes a tensor as another library does: by its structure alone, which it deletes when it is done."""

    def __init__(self, array: Any, **options: Any) -> None:
        capsule = array.__dlpack__(**options)
        self.managed = ManagedTensor.from_address(_python.PyCapsule_GetPointer(capsule, b"dltensor"))
        _python.PyCapsule_SetName(capsule, b"used_dltensor")
        tensor = self.managed.tensor
        self.shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
        self.address = tensor.data + tensor.byte_offset

    def delete(self) -> None:
        self.managed.deleter(ctypes.addressof(self.managed))


@pytest.fixture
def expected(dynamic_pipe: VideoPipeline, picture: PIL.Image.Image) -> Any:
    return dynamic_pipe(picture, output_type="np", **FAST).frames[0]


def test_numpy_and_files_get_copies(
    rig: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image, expected: Any, tmp_path: Any
) -> None:
    allowed = 0 if rig.cuda else 2
    with rig.open(dynamic_bundle) as pipe:
        video = pipe(picture, output_type="dlpack", **FAST)
        streamed = list(pipe.stream(picture, output_type="dlpack", **FAST))
        again = pipe(picture, output_type="np", **FAST).frames[0]
    for frames in (video.frames[0], streamed):  # the pipeline is closed
        assert [frame.shape for frame in frames] == [(40, 136, 3)] * 4
        assert {frame.__dlpack_device__() for frame in frames} == {(2, 0)}
        got = np.stack([np.asarray(frame) for frame in frames])
        assert np.abs(got.astype(int) - expected).max() <= allowed
        np.testing.assert_array_equal(got, again)
        np.testing.assert_array_equal(np.stack([np.from_dlpack(frame, device="cpu") for frame in frames]), again)
        assert np.asarray(frames[0], np.float32).dtype == np.float32
    video.save(tmp_path / "v.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), again)
    del video, streamed, frames
    gc.collect()


def test_a_longer_video_goes_on_from_frames_on_the_gpu(
    rig: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    """A part of 4 frames makes one, and the picture of the third part is a frame of the first."""
    arguments = FAST | {"extend": 2}
    with rig.open(dynamic_bundle) as pipe:
        expected = pipe(picture, output_type="np", **arguments).frames[0]
        frames = pipe(picture, output_type="dlpack", **arguments).frames[0]
        np.testing.assert_array_equal(np.stack([np.asarray(frame) for frame in frames]), expected)
    del frames
    gc.collect()


@pytest.mark.gpu
def test_torch_reads_frames_in_place(dynamic_bundle: Bundle, picture: PIL.Image.Image, expected: Any) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    with VideoPipeline.open(dynamic_bundle, device="cuda") as pipe:
        for frame, wanted in zip(pipe.stream(picture, output_type="dlpack", **FAST), expected, strict=True):
            tensor = torch.from_dlpack(frame)
            assert tensor.data_ptr() == frame.__cuda_array_interface__["data"][0]
            assert np.abs(tensor.cpu().numpy().astype(int) - wanted).max() <= 2


def test_a_library_reads_frames_in_place_on_its_own_stream_without_waiting(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image, expected: Any
) -> None:
    """On the stand-in nothing runs before something waits for it, so frames that are not finished would be wrong."""
    cuda: Any = standin.cuda
    with standin.open(dynamic_bundle) as pipe:
        context = pipe.device.context  # type: ignore[attr-defined]
        taken = [Consumer(frame, stream=-1) for frame in pipe.stream(picture, output_type="dlpack", **FAST)]
        copies = cuda.count("cuMemcpyDtoHAsync")
        for consumer, wanted in zip(taken, expected, strict=True):
            tensor = consumer.managed.tensor
            assert (tensor.device.device_type, tensor.device.device_id) == (2, 0)
            assert (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes) == (1, 8, 1)
            assert consumer.shape == wanted.shape
            np.testing.assert_array_equal(cuda.view(consumer.address, wanted.shape, np.uint8), wanted)
        assert cuda.count("cuMemcpyDtoHAsync") == copies
        stream = context.call("cuStreamCreate", 1)
        host = context.call("cuMemHostAlloc", wanted.nbytes, 0)
        context.call("cuMemcpyDtoHAsync", host, taken[-1].address, wanted.nbytes, stream)
        for consumer in reversed(taken):
            consumer.delete()  # the copy is still running: freeing must wait for it
        np.testing.assert_array_equal(cuda.view(host, wanted.shape, np.uint8), wanted)
        context.call("cuMemFreeHost", host)
        context.call("cuStreamDestroy", stream)


class Owner:
    """Stands for the memory of frames."""


def test_a_consumer_that_refuses_the_gpu_says_so_and_keeps_nothing() -> None:
    """numpy drops the capsule while its own error is set, in which no Python code could run."""

    class Frame:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

        def __dlpack__(self, **_: Any) -> Any:
            return dlpack.make_capsule(0x1000, 16, (2, 2, 3), (2, 0), owner=owner)

    owner: Any = Owner()
    alive = weakref.ref(owner)
    with pytest.raises((BufferError, RuntimeError), match=r"(?i)device"):
        np.from_dlpack(Frame())  # type: ignore[arg-type]
    capsule = Frame().__dlpack__()
    owner = None
    gc.collect()
    assert alive() is not None, "a capsule that nobody took still needs the memory"
    del capsule
    gc.collect()
    assert alive() is None


def test_frames_are_not_copied_to_the_host(standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image) -> None:
    cuda: Any = standin.cuda
    copies = []
    with standin.open(dynamic_bundle) as pipe:
        for output_type in ("np", "dlpack"):
            before = cuda.count("cuMemcpyDtoHAsync")
            frames = list(pipe.stream(picture, output_type=output_type, **FAST))  # type: ignore[arg-type]
            copies.append(cuda.count("cuMemcpyDtoHAsync") - before)
            assert len(frames) == 4
            del frames
    assert copies[0] - copies[1] == 2, "there is one copy for each chunk less"


def test_memory_is_freed_with_the_last_frame_of_a_chunk(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    cuda: Any = standin.cuda
    with standin.open(dynamic_bundle) as pipe:
        list(pipe.stream(picture, output_type="dlpack", **FAST))
        before, taken = cuda.live.allocations, pipe.device.context.taken  # type: ignore[attr-defined]
        frames = list(pipe.stream(picture, output_type="dlpack", **FAST))
        assert cuda.live.allocations == before + 2
        consumer = Consumer(frames[0])
        unused = frames[1].__dlpack__()
        del frames[:2]
        assert cuda.live.allocations == before + 2
        del unused
        consumer.delete()
        assert cuda.live.allocations == before + 1
        frames.clear()
        assert cuda.live.allocations == before
        assert pipe.device.context.taken == taken  # type: ignore[attr-defined]
        kept = next(iter(pipe.stream(picture, output_type="dlpack", **FAST)))
    assert cuda.live.contexts == 1
    assert np.asarray(kept).any()
    thread = threading.Thread(target=kept.__repr__)
    thread.start()
    thread.join()
    del kept
    gc.collect()
    del thread
    gc.collect()
    assert cuda.live.contexts == cuda.live.allocations == 0


def test_closing_a_stream_early_frees_what_was_decoded(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    with standin.open(dynamic_bundle) as pipe:
        stream = pipe.stream(picture, output_type="dlpack", **(FAST | {"decode_chunk_size": 1, "num_frames": 6}))
        frame = next(stream)
        stream.close()
        assert np.asarray(frame).any()
        del frame
    gc.collect()


def test_a_frame_that_is_dropped_during_a_capture_is_freed_later(
    standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image
) -> None:
    """The driver ends a capture in which memory is freed, and a garbage collection may come at any time."""
    cuda: Any = standin.cuda
    with standin.open(dynamic_bundle) as pipe:
        device: Any = pipe.device
        frames = list(pipe.stream(picture, output_type="dlpack", **FAST))
        before = cuda.live.allocations

        def work() -> None:
            frames.clear()

        with device.capture(work) as graph:
            graph._warm = True
            graph()
            assert graph.captured
        assert cuda.live.allocations == before
        assert len(list(pipe.stream(picture, output_type="dlpack", **FAST))) == 4
        assert cuda.live.allocations == before - 2


def test_other_devices_and_copies_are_refused(standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image) -> None:
    with standin.open(dynamic_bundle) as pipe:
        frame = next(pipe.stream(picture, output_type="dlpack", **FAST))
        for wrong in ({"dl_device": (2, 1)}, {"copy": True}, {"dl_device": (1, 0), "copy": False}):
            with pytest.raises(BufferError, match=r"the frame is on \(2, 0\); copy it with the library that reads it"):
                frame.__dlpack__(**wrong)
        with pytest.raises(ValueError, match="without a copy"):
            np.array(frame, copy=False)
        Consumer(frame, dl_device=(2, 0), copy=False, max_version=(1, 0)).delete()
        assert repr(frame) == "DeviceArray(shape=(40, 136, 3), dtype=uint8, device=cuda:0)"
        with pytest.raises(ArgumentError, match="output_type of a stream must be np or dlpack, not 'pil'"):
            pipe.stream(picture, output_type="pil", **FAST)  # type: ignore[arg-type]
        del frame


@pytest.mark.parametrize("reason", ["budget", "driver"])
def test_too_little_memory_for_frames_is_an_error_of_the_stream(
    reason: str, standin: Rig, dynamic_bundle: Bundle, picture: PIL.Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda: Any = standin.cuda
    with standin.open(dynamic_bundle) as pipe:
        device: Any = pipe.device
        share, context = device.share_frames, device.context

        def share_in_little(shape: Any) -> Any:
            if reason == "budget":
                context.budget = context.taken
            else:
                cuda.fail("cuMemAlloc", 2)
            return share(shape)

        with monkeypatch.context() as patch:
            patch.setattr(device, "share_frames", share_in_little)
            with pytest.raises(DeviceMemoryError, match="frames for the caller"):
                list(pipe.stream(picture, output_type="dlpack", **FAST))
        context.budget = None
        assert len(list(pipe.stream(picture, output_type="dlpack", **FAST))) == 4
        taken, allocations = context.taken, cuda.live.allocations
        list(pipe.stream(picture, output_type="dlpack", **FAST))
        assert (context.taken, cuda.live.allocations) == (taken, allocations)
