"""What a pipeline returns: whole videos, or frames as they are decoded."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import GeneratorType
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import PIL.Image

from svd_trt.engine.memory import MemoryPlan
from svd_trt.engine.spec import NetworkName
from svd_trt.errors import ArgumentError, CancelledError, MissingDependencyError, OutputError
from svd_trt.runtime.cancellation import Cancellation
from svd_trt.runtime.chosen_profiles import ChosenProfile
from svd_trt.runtime.decode import Frames
from svd_trt.runtime.settings import Settings
from svd_trt.runtime.timings import Timings
from svd_trt.runtime.turns import Turns
from svd_trt.units import shorten

__all__ = ["FrameType", "OutputType", "VideoOutput", "VideoStream", "converter", "stays_on_device"]

OutputType: TypeAlias = Literal["pil", "np", "pt", "latent", "dlpack"]
FrameType: TypeAlias = Literal["np", "dlpack"]


def converter(output_type: str) -> Callable[[npt.NDArray[Any]], Any]:
    """Find what makes ``output_type`` of frames ``[B, F, H, W, 3]``, or of latents; see `VideoOutput.frames`.

    Raises:
        ArgumentError: there is no such type.
        MissingDependencyError: ``pt`` needs torch, which is not installed.
    """
    if output_type in ("np", "latent"):
        return np.asarray
    if output_type == "dlpack":
        return lambda frames: frames
    if output_type == "pil":
        return lambda frames: [[PIL.Image.fromarray(frame) for frame in video] for video in frames]
    if output_type == "pt":
        try:
            torch: Any = importlib.import_module("torch")  # only if it is asked for: running a bundle needs no torch
        except ImportError as error:
            raise MissingDependencyError("output_type 'pt'", "export") from error
        return lambda frames: torch.from_numpy(frames).permute(0, 1, 4, 2, 3).contiguous().float() / 255
    raise ArgumentError(
        f"output_type must be pil, np, pt, dlpack or latent, not {shorten(repr(output_type))}; np is uint8 from 0 to "
        "255, pt is float from 0 to 1, and dlpack leaves the frames on the device"
    )


def stays_on_device(output_type: str) -> bool:
    """True if the frames of a stream stay on the device.

    Raises:
        ArgumentError: a stream has no such type.
    """
    if output_type not in ("np", "dlpack"):
        raise ArgumentError(
            f"output_type of a stream must be np or dlpack, not {shorten(repr(output_type))}; its frames are uint8 "
            "[H, W, 3], and a call has other types"
        )
    return output_type == "dlpack"


@dataclass(frozen=True)
class VideoOutput:
    """The videos of one call.

    Attributes:
        frames: by output type: ``pil``, a list of pictures for each video; ``np``, uint8 from 0 to 255,
            ``[B, F, H, W, 3]``; ``pt``, a tensor of torch, float32 from 0 to 1, ``[B, F, 3, H, W]``; ``dlpack``, a list
            of arrays for each video, uint8 ``[H, W, 3]``, on the device; ``latent``, float32 ``[B, F, 4, h, w]``,
            as diffusers' ``output_type="latent"``.
        parameters: what they were generated with, every default decided; ``parameters.seed`` gives them again.
        backend: the device that they were generated on.
        memory: how the device's memory was used.
        timings: seconds by stage.
        metadata: what a file says about how the video was generated.
        profiles: the profiles that runs of each engine took; empty if no TensorRT engines ran.
    """

    frames: Any
    parameters: Settings
    backend: str
    memory: MemoryPlan
    timings: Timings
    metadata: Mapping[str, Any]
    profiles: Mapping[NetworkName, list[ChosenProfile]]

    def __getitem__(self, key: int | str) -> Any:
        """``output[0]`` and ``output["frames"]`` are the frames, as of diffusers' output."""
        return {"frames": self.frames}[key] if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any]:
        """``(frames,)``, as of diffusers' output."""
        return (self.frames,)

    def save(self, path: str | os.PathLike[str], *, fps: float | Fraction | None = None) -> list[str]:
        """Write each video to ``path`` (its suffix chooses the format), with a number if there are several.

        ``fps`` is the rate of the file, such as ``Fraction(24000, 1001)``; by default that of the generation.

        Returns the paths written.

        Raises:
            OutputError: unknown suffix, not writable, or the output is latents.
        """
        from svd_trt.runtime.video import check_output, numbered, open_writer

        videos = [_pixels(video) for video in self.frames]
        if videos[0].dtype != np.uint8:
            raise OutputError("latents cannot be written as a video; ask for output_type 'pil', 'np' or 'pt'")
        paths = [numbered(path, index, len(videos)) for index in range(len(videos))]
        for target in paths:
            check_output(target)
        for target, video in zip(paths, videos, strict=True):
            height, width = video.shape[1:3]
            rate = self.parameters.fps if fps is None else fps
            with open_writer(target, height=height, width=width, fps=rate, metadata=self.metadata) as writer:
                writer.write(video)
        return paths


def _pixels(video: Any) -> npt.NDArray[Any]:
    """The frames of one video, ``[F, H, W, 3]``, of any output type; latents as they are."""
    if hasattr(video, "permute"):  # floats in a tensor of torch; each is a whole number of 255ths
        floats = video.permute(0, 2, 3, 1).cpu().numpy()
        return np.asarray(np.rint(floats * 255), np.uint8)
    return np.stack([np.asarray(frame) for frame in video])


class VideoStream(Iterator[Frames]):
    """Frames of a generation, one uint8 ``[H, W, 3]`` at a time, all of the first video, then of the next.

    Several threads may use a stream, and other videos of its pipeline may be made between two frames.

    Attributes:
        parameters: what the video is generated with, every default decided.
        num_videos: how many videos there are.
        backend: the device that it runs on.
        memory: how the device's memory is used.
        timings: seconds by stage, complete after the last frame.
        metadata: what the video's file says about how it was generated.
        profiles: the profiles that runs of each engine take; empty if no TensorRT engines run.
    """

    def __init__(
        self,
        chunks: GeneratorType[Frames, None, None],
        *,
        turns: Turns,
        cancellation: Cancellation,
        parameters: Settings,
        num_videos: int,
        backend: str,
        memory: MemoryPlan,
        timings: Timings,
        metadata: Mapping[str, Any],
        profiles: Mapping[NetworkName, list[ChosenProfile]],
    ) -> None:
        self.parameters = parameters
        self.num_videos = num_videos
        self.backend = backend
        self.memory = memory
        self.timings = timings
        self.metadata = metadata
        self.profiles = profiles
        self._turns = turns
        self._cancellation = cancellation
        self._chunks = chunks
        self._frames = (frame for chunk in chunks for frame in chunk)

    def __next__(self) -> Frames:
        """Return the next frame; wait for it, and while another thread uses the pipeline.

        Raises:
            CancelledError: another thread cancelled or closed the stream.
            ArgumentError: called from a callback of this stream.
            BackendError: the device failed, the pipeline was closed, or this is a forked process.
        """
        with self._turns.taken():
            if self._chunks.gi_running:
                raise ArgumentError("a callback cannot take frames from the stream that calls it; return from it first")
            if self._chunks.gi_frame is not None:  # None if all frames were generated, or after `close`
                try:
                    self._cancellation.check()
                except BaseException:
                    self._end()
                    raise
            return next(self._frames)

    def cancel(self) -> None:
        """Make the stream end: `CancelledError` is raised for the next frame, or for the one that is being waited for.

        Any thread and any signal handler may call it, and it returns at once. On the CPU the step that is being
        computed ends early; a GPU finishes up to two steps.
        """
        if not self._turns.foreign:
            self._cancellation.cancel(CancelledError("the video was cancelled"))

    def close(self) -> None:
        """Cancel the frames that are not generated yet, and free the stream's memory.

        Any thread may call it. If another thread waits for a frame, `CancelledError` is raised there. In a forked
        process this does nothing.
        """
        if self._turns.foreign:
            return
        self._cancellation.cancel(CancelledError("the stream was closed"))
        with self._turns.taken():
            if not self._chunks.gi_running:  # it is in a callback of this stream, which then ends after the callback
                self._end()

    def _end(self) -> None:
        self._frames.close()
        self._chunks.close()
