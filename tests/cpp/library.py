"""The C interface of ``runtime/cpp`` through ctypes, as far as the tests compare it with Python."""

from __future__ import annotations

import ctypes as ct
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

END = 1


class Arguments(ct.Structure):
    _fields_ = [
        ("size", ct.c_size_t),
        ("num_frames", ct.c_int64),
        ("num_inference_steps", ct.c_int64),
        ("sigmas", ct.POINTER(ct.c_double)),
        ("sigmas_count", ct.c_size_t),
        ("min_guidance_scale", ct.c_double),
        ("max_guidance_scale", ct.c_double),
        ("fps", ct.c_int64),
        ("motion_bucket_id", ct.c_int64),
        ("noise_aug_strength", ct.c_double),
        ("decode_chunk_size", ct.c_int64),
        ("num_videos_per_prompt", ct.c_int64),
        ("seed", ct.c_uint64),
        ("has_seed", ct.c_int32),
        ("reserved", ct.c_int32),
        ("height", ct.c_int64),
        ("width", ct.c_int64),
        ("sampler", ct.c_char_p),
        ("resize_mode", ct.c_char_p),
        ("background", ct.c_char_p),
        ("guidance_shape", ct.c_char_p),
        ("guidance_interval", ct.POINTER(ct.c_double)),
        ("schedule", ct.c_char_p),
        ("quality", ct.c_char_p),
        ("seeds", ct.POINTER(ct.c_uint64)),
        ("seeds_count", ct.c_size_t),
        ("deep_every", ct.c_int64),
    ]


class Picture(ct.Structure):
    _fields_ = [
        ("size", ct.c_size_t),
        ("data", ct.c_void_p),
        ("width", ct.c_int64),
        ("height", ct.c_int64),
        ("stride", ct.c_int64),
    ]


class Frame(ct.Structure):
    _fields_ = [
        ("size", ct.c_size_t),
        ("data", ct.c_void_p),
        ("width", ct.c_int64),
        ("height", ct.c_int64),
        ("stride", ct.c_int64),
        ("video", ct.c_int64),
        ("index", ct.c_int64),
        ("on_device", ct.c_int32),
        ("reserved", ct.c_int32),
    ]


class RefusedError(Exception):
    """A function failed: its message."""


@dataclasses.dataclass
class Library:
    """The loaded library, and a pipeline of it."""

    dll: Any
    pipeline: ct.c_void_p

    def check(self, status: int) -> None:
        if status < 0:
            raise RefusedError(self.dll.svd_trt_last_error().decode())

    def frames(self, pictures: Sequence[PIL.Image.Image], **arguments: Any) -> npt.NDArray[np.uint8]:
        """All frames ``[N, H, W, 3]`` of a generation with the arguments' names in Python."""
        stream = self._stream(pictures, arguments)
        frames = []
        try:
            frame = Frame(size=ct.sizeof(Frame))
            while (status := self.dll.svd_trt_stream_next(stream, ct.byref(frame))) != END:
                self.check(status)
                data = ct.string_at(frame.data, frame.stride * frame.height)
                frames.append(np.frombuffer(data, np.uint8).reshape(frame.height, frame.width, 3))
        finally:
            self.dll.svd_trt_stream_close(stream)
        return np.stack(frames)

    def latents(self, pictures: Sequence[PIL.Image.Image], **arguments: Any) -> npt.NDArray[np.float32]:
        """The flat latents of a generation."""
        stream = self._stream(pictures, arguments)
        try:
            count = ct.c_size_t()
            self.check(self.dll.svd_trt_stream_latents(stream, None, ct.c_size_t(0), ct.byref(count)))
            values = np.empty(count.value, np.float32)
            self.check(self.dll.svd_trt_stream_latents(stream, values.ctypes.data_as(ct.c_void_p), count, None))
        finally:
            self.dll.svd_trt_stream_close(stream)
        return values

    def _stream(self, pictures: Sequence[PIL.Image.Image], arguments: dict[str, Any]) -> ct.c_void_p:
        given = Arguments()
        size = ct.c_size_t(ct.sizeof(Arguments))
        self.check(self.dll.svd_trt_arguments_init(self.pipeline, ct.byref(given), size))
        kept: list[Any] = []
        for name, value in arguments.items():
            if value is None:
                continue
            if name in ("sigmas", "guidance_interval"):
                kept.append((ct.c_double * len(value))(*value))
                setattr(given, name, kept[-1])
                if name == "sigmas":
                    given.sigmas_count = len(value)
            elif name == "seed" and not isinstance(value, int):
                kept.append((ct.c_uint64 * len(value))(*value))
                given.seeds, given.seeds_count = kept[-1], len(value)
            else:
                setattr(given, name, value.encode() if isinstance(value, str) else value)
        given.has_seed = isinstance(arguments.get("seed"), int)
        arrays = [np.ascontiguousarray(picture) for picture in pictures]
        views = (Picture * len(arrays))(
            *(Picture(ct.sizeof(Picture), a.ctypes.data, a.shape[1], a.shape[0], a.strides[0]) for a in arrays)
        )
        stream = ct.c_void_p()
        count = ct.c_size_t(len(arrays))
        self.check(self.dll.svd_trt_stream_open(self.pipeline, views, count, ct.byref(given), None, ct.byref(stream)))
        return stream


@contextmanager
def opened(library: Path, bundle: Path) -> Iterator[Library]:
    """Load the shared library and open a pipeline."""
    dll = ct.CDLL(str(library))
    dll.svd_trt_last_error.restype = ct.c_char_p
    pipeline = ct.c_void_p()
    found = Library(dll, pipeline)
    found.check(dll.svd_trt_pipeline_open(str(bundle).encode(), None, ct.byref(pipeline)))
    try:
        yield found
    finally:
        dll.svd_trt_pipeline_close(pipeline)
